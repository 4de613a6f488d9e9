"""A linear layer of any number of bf16 rows: what linear.py computes, in one order of summation.

Few rows by the kernels here (few.py, product.py), more by the library where it has the same bits (vendor.py); which
from when on, says a table (ways.py). A row's bits follow from none of that.

Letters: T tokens · H inputs · N outputs.
"""

import torch
from torch import nn

from epmoe.kernels import native, vendor
from epmoe.kernels.few import few
from epmoe.kernels.gpu import generation
from epmoe.kernels.product import Tile, tiled
from epmoe.kernels.ways import way_for

INTERPRETED = Tile(64, 32, 128, 4, 2)  # in Triton's interpreter, which is slow for each program and step


def serves(x_TH: torch.Tensor) -> bool:
    """Whether the product of these rows is made here: of bf16, in Triton's interpreter of float32."""
    return native(x_TH)


def linear(x_TH: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """As `linear.linear`: [T, H] → [T, N]."""
    tokens, (outputs, columns), bias_N = len(x_TH), layer.weight.shape, layer.bias
    if x_TH.device.type == "cpu":
        return tiled(x_TH, layer.weight, bias_N, INTERPRETED)
    kernel, tile = way_for(generation(x_TH.device), outputs, columns, tokens)
    if tile is None:
        return vendor.product(x_TH, layer.weight, bias_N)
    if kernel == "few" and tokens and columns % 8 == 0:
        return few(x_TH, layer.weight, bias_N, tile)
    return tiled(x_TH, layer.weight, bias_N, tile)
