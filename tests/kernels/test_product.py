"""The product in one order: its values against exact ones, the order itself, and what its tiles compile to.

Letters: T rows · H columns · N outputs.
"""

from dataclasses import dataclass

import pytest
import torch
from compile_sm90 import MOST_SHARED, MOST_TENSOR, compile_kernel
from interpret import interpreted

from epmoe.kernels import runs, vendor, vocabulary
from epmoe.kernels.product import Tile, product_kernel, tiled
from epmoe.kernels.ways import TABLES


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    columns: int
    outputs: int
    bias: bool = True
    run: int = 0


CASES = [
    Case("one row", 1, 96, 200),
    Case("no rows", 0, 96, 200),
    Case("odd sizes", 3, 33, 101, bias=False),
    Case("a step and a half", 16, 192, 128),
    Case("two tiles of rows", 33, 130, 64),
    Case("runs", 5, 512, 40, run=128),
    Case("runs that end within a step", 5, 500, 40, run=128),
]
TILE = Tile(64, 32, 64, 4, 2)


def compare(case: Case, device: str, dtype: torch.dtype) -> None:
    """Within 1e-5 of the size of the terms: rounding errors of float32 sums, not of bf16 or TF32 operands."""
    random = torch.Generator().manual_seed(case.rows)
    x_TH = torch.randn(case.rows, case.columns, generator=random).to(dtype)
    weight_NH = (torch.randn(case.outputs, case.columns, generator=random) * 0.1).to(dtype)
    bias_N = torch.randn(case.outputs, generator=random).to(dtype) if case.bias else None
    # rows of the result that stand apart, with something between them
    wide_TN = torch.full((case.rows, case.outputs + 7), 3.0, device=device)
    moved = [None if each is None else each.to(device) for each in (x_TH, weight_NH, bias_N)]
    assert moved[0] is not None and moved[1] is not None
    out_TN = tiled(moved[0], moved[1], moved[2], TILE, wide_TN[:, : case.outputs], case.run).cpu()
    exact_TN = x_TH.double() @ weight_NH.double().T + (0 if bias_N is None else bias_N.double())
    size_TN = x_TH.double().abs() @ weight_NH.double().abs().T + 1
    assert ((out_TN.double() - exact_TN).abs() <= 1e-5 * size_TN).all()
    assert (wide_TN[:, case.outputs :] == 3).all(), "wrote beside its result"
    rounded_TN = tiled(moved[0], moved[1], moved[2], TILE, run=case.run).cpu()
    assert rounded_TN.dtype == dtype and torch.equal(rounded_TN, out_TN.to(dtype))


def in_order(device: str, dtype: torch.dtype) -> None:
    """2^24 absorbs each 1 of the steps after it, until the last step takes it away: two sums would keep some of them.

    The ones fall on even and odd steps of every tile, each on a step of its own.
    """
    weight_NH = torch.zeros(65, 128 * 6)
    weight_NH[:, 0] = 2.0**24
    weight_NH[:, 128:-128:192] = 1.0
    weight_NH[:, -1] = -(2.0**24)
    x_TH = torch.ones(17, weight_NH.shape[1])
    for tile in (TILE, Tile(16, 16, 128, 4, 2), vendor.FEW, vendor.MANY):
        assert not tiled(x_TH.to(device, dtype), weight_NH.to(device, dtype), None, tile).any(), tile
    # In runs, their sums are added upwards: of the second to the last but one, each is a 1 that is absorbed.
    weight_NH.zero_()
    weight_NH[:, 0], weight_NH[:, -1] = 2.0**24, -(2.0**24)
    weight_NH[:, 128:-128:128] = 1.0
    assert not tiled(x_TH.to(device, dtype), weight_NH.to(device, dtype), None, TILE, run=128).any()
    weight_NH[:, -128] = 1.0  # the last run is a sum of its own: -2^24 + 1
    assert (tiled(x_TH.to(device, dtype), weight_NH.to(device, dtype), None, TILE, run=128) == 1).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_in_the_interpreter(case: Case) -> None:
    interpreted(compare, case, "cpu", torch.float32)


def test_sums_in_order_in_the_interpreter() -> None:
    interpreted(in_order, "cpu", torch.float32)


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    for case in (*CASES, Case("q/k/v", 70, 2880, 5120), Case("router", 70, 2880, 32, run=256)):
        compare(case, "cuda", torch.bfloat16)
    in_order("cuda", torch.bfloat16)


WAYS = {
    way.tile for tables in TABLES.values() for table in tables.values() for _, way in table if way.kernel == "tiled"
}
TILES = {*WAYS, vendor.FEW, vendor.MANY, *vocabulary.TILES} - {None}


def compiled(tile: Tile, run: int, arch: int, result: str = "*bf16", hidden: int = 2880) -> dict[str, int]:
    signature = {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), "*bf16"), "out_ptr": result}
    signature |= dict.fromkeys(("tokens", "outputs", "stride"), "i32")
    constants = {"H": hidden, "R": tile.rows, "M": tile.tokens, "K": tile.depth, "RUN": run, "PDL": arch >= 90}
    cost = compile_kernel(product_kernel, signature, constants, tile.warps, tile.stages, arch, ("outputs", "stride"))
    assert cost["spills"] == 0 and cost["serialized"] == 0, cost
    assert cost["shared"] <= MOST_SHARED[arch] and cost["tensor"] <= MOST_TENSOR, cost
    assert (cost["waits"], cost["early"]) == (arch >= 90, 0)
    return cost


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("tile", sorted(each for each in TILES if each), ids=str)
def test_compiles_without_spills(tile: Tile, arch: int) -> None:
    cost = compiled(tile, 0, arch, "*fp32" if tile in vocabulary.TILES else "*bf16")
    assert arch != 90 or cost["wgmma"], "Hopper's tensor cores are not used"


@pytest.mark.parametrize("hidden", [32, 96, 128, 136])
@pytest.mark.parametrize("tile", [Tile(64, 16, 128, 4, 4), vendor.MANY], ids=str)
def test_the_bias_comes_last_however_few_columns_there_are(tile: Tile, hidden: int) -> None:
    """Where a step has all of them, too: few.py and the library add it then."""
    assert compiled(tile, 0, 90, hidden=hidden)["biased"] == 0
    assert compiled(tile, 128, 90, hidden=hidden)["biased"] == 0


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_runs_compile_without_spills(arch: int) -> None:
    """By `mma`, as all of the router's kernels, on every generation: no bits follow from the number of tokens."""
    cost = compiled(runs.ONE_BY_ONE, 256, arch)
    assert cost["wgmma"] == cost["tensor"] == 0
