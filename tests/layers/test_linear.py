"""The linear layer of any number of rows: against exact products, in any company.

tests/layers/test_dense_order.py has the bits at every number of rows.
"""

import pytest
import torch
from interpret import interpreted
from torch import nn

from epmoe.kernels import linear as linear_triton
from epmoe.kernels.linear import serves

# tokens, inputs, outputs: odd sizes, a row that is a power of two, gpt-oss-20b's q/k/v and output projections
SMALL = [(1, 96, 200), (2, 33, 101), (1, 128, 1), (2, 130, 64), (35, 64, 70), (0, 64, 70)]
LARGE = [(tokens, *size) for tokens in (1, 2, 16, 17, 200) for size in ((2880, 5120), (4096, 2880))]


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
    # a token's bits do not depend on the others
    for token in range(min(tokens, 3)):
        assert torch.equal(linear_triton.linear(x_TH[token : token + 1].to(device), layer)[0], out_TN[token])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("size", SMALL, ids=str)
def test_kernel(size: tuple[int, int, int], bias: bool) -> None:
    interpreted(compare, *size, bias, "cpu", torch.float32)


def test_what_the_kernels_serve() -> None:
    """bf16 on a GPU; the interpreter, which cannot multiply bf16, float32."""
    x_TH = torch.empty(1000, 8, dtype=torch.bfloat16, device="meta")
    assert serves(x_TH) and serves(x_TH[:1]) and serves(x_TH[:0]) and not serves(x_TH[:1].float())
    assert serves(torch.empty(1, 8)) and not serves(torch.empty(1, 8, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("size", SMALL + LARGE, ids=str)
def test_kernel_on_a_gpu(size: tuple[int, int, int]) -> None:
    for bias in (True, False):
        compare(*size, bias, "cuda", torch.bfloat16)
