"""A linear layer of a step's tokens, y = x · weightᵀ + bias: attention's projections; the library's float32 products.

A row's bits must not follow from how many rows come with it, and a library picks its order of summation by the shape of
a product. So all products with one weight have one shape: as many rows as a tile has, the last ones filled up. On GPUs
this serves what the kernels do not, float32.

Ranks may share the outputs of a layer, some whole runs each (`Runs`): then each run is a product of its own.

Letters: T tokens · H inputs · N outputs, in S runs of R · of a product of any two matrices: [M, K] times [K, N], in B
pairs.
"""

from functools import partial
from typing import cast

import torch
from torch import nn

# Rows of every product. On a CPU, 300 rows of 1000 x 2880 in float32 take 28 ms in tiles of 16, the library's own
# product 18; one row takes 1.4 ms in a tile of 16 and 0.3 in one of 1. A GPU's was not chosen by measurement.
TILE, GPU_TILE = 16, 64


class Runs(nn.Linear):
    """A linear layer of which a rank may have some runs of outputs alone, `run` outputs each."""

    def __init__(self, inputs: int, runs: int, run: int, bias: bool) -> None:
        super().__init__(inputs, runs * run, bias)
        self.run = run


def linear(x_TH: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """[T, H] → [T, N] in x's dtype, summed in float32 and rounded once."""
    product = partial(_by_runs, layer) if isinstance(layer, Runs) else layer
    out_TN: torch.Tensor = torch.cat([product(tile_MH) for tile_MH in tiles(x_TH)])[: len(x_TH)]
    return out_TN


def _by_runs(layer: Runs, x_MH: torch.Tensor) -> torch.Tensor:
    """[M, N]: a batch of products on a CPU, which makes each as if alone; a GPU's library may look at their number."""
    weight_SRH, bias_N = layer.weight.unflatten(0, (-1, layer.run)), cast(torch.Tensor | None, layer.bias)
    if x_MH.device.type != "cpu":
        biases = [None] * len(weight_SRH) if bias_N is None else bias_N.split(layer.run)
        pairs = zip(weight_SRH, biases, strict=True)
        return torch.cat([nn.functional.linear(x_MH, weight_RH, bias_R) for weight_RH, bias_R in pairs], dim=1)
    x_SMH = x_MH.expand(len(weight_SRH), -1, -1)
    if bias_N is None:
        out_SMR = torch.bmm(x_SMH, weight_SRH.mT)
    else:
        out_SMR = torch.baddbmm(bias_N.view(-1, 1, layer.run), x_SMH, weight_SRH.mT)
    return out_SMR.transpose(0, 1).flatten(1)


def tiles(x_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows as the library is to multiply them, a tile at a time, with zeros below the last."""
    if not len(x_TH):
        return (x_TH,)
    rows = TILE if x_TH.device.type == "cpu" else GPU_TILE
    return nn.functional.pad(x_TH, (0, 0, 0, -len(x_TH) % rows)).split(rows)


def product_f32(a_MK: torch.Tensor, b_KN: torch.Tensor, out_MN: torch.Tensor | None = None) -> torch.Tensor:
    """The product of two matrices, or of two batches [B, M, K] and [B, K, N], summed in float32 and given in float32.

    Written into `out_MN` where that is given, which may be part of a matrix.
    """
    product = torch.bmm if a_MK.dim() == 3 else torch.mm
    if a_MK.dtype == torch.float32 or a_MK.device.type == "cpu":  # torch has out_dtype on accelerators only
        return product(a_MK.float(), b_KN.float(), out=out_MN)
    # out_dtype and out are one overload, which does not take None
    return product(a_MK, b_KN, out_dtype=torch.float32, **({} if out_MN is None else {"out": out_MN}))
