"""The product of very few rows: bit for bit the one in product.py, also where it begins early."""

import pytest
import torch
from compile_sm90 import MOST_SHARED, compile_kernel
from torch import nn

from epmoe.kernels.few import few_kernel
from epmoe.kernels.product import Tile
from epmoe.kernels.ways import TABLES

WAYS = {way.tile for tables in TABLES.values() for table in tables.values() for _, way in table if way.kernel == "few"}
TILES = sorted(tile for tile in WAYS if tile)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("columns", [2880, 4096])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_compiles_without_spills(tile: Tile, columns: int, arch: int) -> None:
    signature = {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16")}
    signature |= dict.fromkeys(("tokens", "outputs"), "i32")
    constants = {"H": columns, "R": tile.rows, "M": tile.tokens, "K": tile.depth, "S": tile.stages, "PDL": arch >= 90}
    cost = compile_kernel(few_kernel, signature, constants, tile.warps, arch=arch, divisible=("outputs",))
    assert cost["spills"] == 0 and cost["shared"] <= MOST_SHARED[arch], cost
    assert (cost["waits"], cost["early"]) == (arch >= 90, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_bits_of_the_other_kernel(tile: Tile, bias: bool) -> None:
    """Of every number of rows that it has room for; sizes that no tile divides, and fewer columns than the ring has."""
    from epmoe.kernels.few import few
    from epmoe.kernels.product import tiled
    from epmoe.kernels.vendor import MANY

    for outputs, columns in ((5120, 2880), (2880, 4096), (101, 136), (3, 8), (16, 2888)):
        layer = nn.Linear(columns, outputs, bias).requires_grad_(False).to("cuda", torch.bfloat16)
        x_TH = torch.randn(tile.tokens, columns, device="cuda").bfloat16()
        wanted_TN = tiled(x_TH, layer.weight, layer.bias, MANY)
        for tokens in range(1, tile.tokens + 1):
            x_TH[tokens:] = torch.nan  # not among the rows, and so not among their terms
            assert torch.equal(few(x_TH[:tokens], layer.weight, layer.bias, tile), wanted_TN[:tokens]), (
                outputs,
                tokens,
            )
            x_TH = torch.randn(tile.tokens, columns, device="cuda").bfloat16()
            wanted_TN = tiled(x_TH, layer.weight, layer.bias, MANY)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
def test_waits_for_the_kernel_before_it(tokens: int) -> None:
    """A chain in a CUDA graph, where a kernel comes in before the one in front of it has ended: the bits of one by one.

    Each product is the next one's input, through a norm that lets the product begin before it has its own input.
    """
    from epmoe.kernels.linear import linear
    from epmoe.kernels.norm import add_norm, add_norm_linear

    layers = [nn.Linear(2880, 2880).requires_grad_(False).to("cuda", torch.bfloat16) for _ in range(16)]
    router = nn.Linear(2880, 32).requires_grad_(False).to("cuda", torch.bfloat16)
    for layer in layers:
        layer.weight.normal_(0, 0.02)
    ones_H = torch.ones(2880, device="cuda", dtype=torch.bfloat16)
    x_TH = torch.randn(tokens, 2880, device="cuda").bfloat16()

    def chain(*, apart: bool) -> torch.Tensor:
        out_TH, logits = x_TH, []
        for layer in layers * 4:
            _, norm_TH = add_norm(out_TH, out_TH[:, None], ones_H, 1e-5)
            if apart:
                torch.cuda.synchronize()
            out_TH = linear(norm_TH, layer)
            if apart:
                torch.cuda.synchronize()
            logits.append(add_norm_linear(out_TH, out_TH[:, None], ones_H, 1e-5, router)[2])
        return torch.cat([out_TH, *logits], 1)

    wanted_TX = chain(apart=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found_TX = chain(apart=False)
    for _ in range(50):
        found_TX.zero_()
        graph.replay()
        assert torch.equal(found_TX, wanted_TX)
