"""The router's product in runs: three kernels, for few tokens, more and many, of one order.

Letters: T tokens · H columns · E outputs.
"""

import pytest
import torch
from compile_sm90 import MOST_SHARED, compile_kernel
from interpret import interpreted
from torch import nn

from epmoe.kernels import norm, runs
from epmoe.kernels.product import Tile


def layer(columns: int, outputs: int, bias: bool = True) -> nn.Linear:
    random = torch.Generator().manual_seed(outputs)
    made = nn.Linear(columns, outputs, bias).requires_grad_(False)
    made.weight.copy_(torch.randn(outputs, columns, generator=random) * 0.1)
    return made


def compare(tokens: int, columns: int, outputs: int, device: str, dtype: torch.dtype) -> None:
    """Within a rounding to dtype, and 1e-5 of the size of the terms, which float32 sums may be off."""
    made = layer(columns, outputs)
    x_TH = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    made = made.to(dtype)
    exact_TE = x_TH.double() @ made.weight.double().T + made.bias.double()
    size_TE = x_TH.double().abs() @ made.weight.double().abs().T + 1
    found_TE = runs.product(x_TH.to(device), made.to(device)).cpu()
    assert found_TE.shape == (tokens, outputs) and found_TE.dtype == dtype
    error_TE = (found_TE.double() - exact_TE).abs()
    assert (error_TE <= torch.finfo(dtype).eps / 2 * exact_TE.abs() + 1e-5 * size_TE).all()


def upwards(device: str, dtype: torch.dtype) -> None:
    """2^24 in the first run absorbs the 1 of each after it, until the last takes it away: another order keeps some.

    So does the first run's own 1, and the last one's.
    """
    columns, run = 4096, 256
    made = layer(columns, 5, bias=False).to(device, dtype)
    made.weight.zero_()
    made.weight[:, run:-run:run] = 1.0
    made.weight[:, 0], made.weight[:, -1] = 2.0**24, -(2.0**24)
    ones_H = torch.ones(columns, device=device, dtype=dtype)
    for tokens in (1, 300, 30_000 if device == "cuda" else 0):
        x_TH = torch.ones(tokens, columns, device=device, dtype=dtype)
        assert not runs.product(x_TH, made).any(), tokens
    x_TH = torch.ones(1, columns, device=device, dtype=dtype)
    assert not norm.add_norm_linear(x_TH, x_TH[:, None] * 0, ones_H, 0.0, made)[2].any()
    made.weight[:, -1] = 0
    assert (runs.product(x_TH, made) == 2.0**24).all()


# side by side, in both tiles; one after the other; fewer columns than runs have; an empty one
SIZES = [(3, 96, 5), (1, 2880, 32), (130, 40, 300), (1100, 33, 128), (2, 8, 3), (0, 96, 5)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_in_the_interpreter(size: tuple[int, int, int]) -> None:
    interpreted(compare, *size, "cpu", torch.float32)


def test_runs_are_added_upwards_in_the_interpreter() -> None:
    interpreted(upwards, "cpu", torch.float32)


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    for size in (*SIZES, (5000, 2880, 32), (300, 2880, 128)):
        compare(*size, "cuda", torch.bfloat16)
    upwards("cuda", torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("tile", runs.SIDE_BY_SIDE.values(), ids=str)
def test_compiles_without_spills(tile: Tile, arch: int) -> None:
    signature = {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16"), "tokens": "i32"}
    constants = {"H": 2880, "E": 32, "B": tile.rows, "M": tile.tokens, "R": runs.RUNS, "C": 256, "D": tile.depth}
    constants |= {"PDL": arch >= 90}
    cost = compile_kernel(runs.runs_kernel, signature, constants, tile.warps, tile.stages, arch)
    assert cost["spills"] == cost["wgmma"] == cost["tensor"] == 0 and cost["shared"] <= MOST_SHARED[arch], cost
    assert (cost["waits"], cost["early"]) == (arch >= 90, 0)
