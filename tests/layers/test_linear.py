"""The linear layer of very few tokens: its kernel against exact products, in any company, and what it compiles to."""

import pytest
import torch
from compile_sm90 import compile_kernel
from interpret import interpreted
from torch import nn

from epmoe.kernels import linear as linear_triton
from epmoe.kernels.linear import MOST_TOKENS, linear, serves

# tokens, inputs, outputs: odd sizes, a row that is a power of two, gpt-oss-20b's q/k/v and output projections
SMALL = [(1, 96, 200), (2, 33, 101), (1, 128, 1), (2, 130, 64)]
LARGE = [(1, 2880, 5120), (2, 2880, 5120), (1, 4096, 2880), (2, 4096, 2880)]


def compare(tokens: int, inputs: int, outputs: int, bias: bool, device: str, dtype: torch.dtype) -> None:
    """Within a rounding to dtype, and 1e-5 of the size of the terms, which float32 sums may be off."""
    random = torch.Generator().manual_seed(outputs)
    layer = nn.Linear(inputs, outputs, bias).requires_grad_(False)
    layer.weight.copy_(torch.randn(outputs, inputs, generator=random) * 0.1)
    if bias:
        layer.bias.copy_(torch.randn(outputs, generator=random))
    x_TH = torch.randn(tokens, inputs, generator=random).to(dtype)
    layer = layer.to(device, dtype)
    out_TN = linear_triton.linear(x_TH.to(device), layer)
    assert out_TN.shape == (tokens, outputs) and out_TN.dtype == dtype
    weight_NH, bias_N = layer.weight.cpu().double(), layer.bias.cpu().double() if bias else 0
    exact_TN = x_TH.double() @ weight_NH.T + bias_N
    size_TN = x_TH.double().abs() @ weight_NH.abs().T
    error_TN = (out_TN.cpu().double() - exact_TN).abs()
    assert (error_TN <= torch.finfo(dtype).eps / 2 * exact_TN.abs() + 1e-5 * size_TN).all()
    # a token's bits do not depend on the other
    for token in range(tokens):
        assert torch.equal(linear_triton.linear(x_TH[token : token + 1].to(device), layer)[0], out_TN[token])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("size", SMALL, ids=str)
def test_kernel(size: tuple[int, int, int], bias: bool) -> None:
    interpreted(compare, *size, bias, "cpu", torch.float32)


def test_what_the_kernel_serves() -> None:
    """bf16 of one or two tokens on a GPU; the interpreter, which cannot multiply bf16, float32."""
    x_TH = torch.empty(MOST_TOKENS + 1, 8, dtype=torch.bfloat16, device="meta")
    assert serves(x_TH[:1]) and serves(x_TH[:MOST_TOKENS])
    assert not serves(x_TH[:0]) and not serves(x_TH) and not serves(x_TH[:1].float())
    assert serves(torch.empty(1, 8)) and not serves(torch.empty(1, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("inputs", [2880, 4096])
@pytest.mark.parametrize("tokens", range(1, MOST_TOKENS + 1))
def test_compiles_without_spills(tokens: int, inputs: int, arch: int) -> None:
    signature = {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16"), "outputs": "i32"}
    constants = {"T": tokens, "H": inputs, "HP": 4096, "R": linear_triton.ROWS, "PDL": arch >= 90}
    cost = compile_kernel(
        linear_triton.linear_kernel, signature, constants, linear_triton.WARPS, arch=arch, divisible=("outputs",)
    )
    assert cost["spills"] == 0, cost
    assert (cost["waits"], cost["early"]) == (arch >= 90, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", SMALL + LARGE, ids=str)
def test_kernel_on_a_gpu(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    for bias in (True, False):
        compare(*size, bias, "cuda", dtype)


@pytest.mark.gpu
def test_waits_for_the_kernel_before_it() -> None:
    """A chain in a CUDA graph, where a kernel comes in before the one in front of it has ended: the bits of one by one.

    Each product is the next one's input, through a norm that lets the product begin early.
    """
    from epmoe.kernels import norm as norm_triton

    random = torch.Generator().manual_seed(0)
    layers = [nn.Linear(2880, 2880).requires_grad_(False).to("cuda", torch.bfloat16) for _ in range(16)]
    for layer in layers:
        layer.weight.copy_(torch.randn(2880, 2880, generator=random) * 0.02)
    ones_H = torch.ones(2880, device="cuda", dtype=torch.bfloat16)
    start_TH = torch.randn(1, 2880, generator=random).to("cuda", torch.bfloat16)
    x_TH = start_TH.clone()

    def chain(*, apart: bool) -> torch.Tensor:
        out_TH = x_TH
        for layer in layers * 4:
            _, norm_TH = norm_triton.add_norm(out_TH, out_TH[:, None], ones_H, 1e-5)
            if apart:
                torch.cuda.synchronize()
            out_TH = linear(norm_TH, layer)
            if apart:
                torch.cuda.synchronize()
        return out_TH

    wanted_TH = chain(apart=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_TH = chain(apart=False)
    for _ in range(50):
        found_TH.zero_()
        graph.replay()
        assert torch.equal(found_TH, wanted_TH)
