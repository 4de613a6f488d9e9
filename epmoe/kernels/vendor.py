"""The library's dense products, called only at numbers of rows at which they were seen to have product.py's bits.

A library picks its order of summation by the shape of a product. Where it does not split the columns it adds products
of 16 one after the other, as the kernels here do; which shapes these are is its own business and may change with a
release. So before a product is first called, all sizes in question are compared on random rows (tens of milliseconds,
once in a process), and a step's rows are filled up to the next size at which every bit agreed.

Letters: T rows · S rows after filling up · H columns · N outputs.
"""

from functools import cache
from typing import NamedTuple

import torch

from epmoe.kernels.product import Tile, tiled
from epmoe.rehearsal import rehearsing

# What the library is compared with, and what runs where it differs. One H200: 14.5 and 16.5 µs for 64 rows of q/k/v and
# of the output projection, the library 12.1 and 12.0; 26 and 17.6 for 128, the library 13.3 and 13.0.
FEW = Tile(64, 32, 128, 4, 4)  # up to 64 rows
MANY = Tile(64, 64, 128, 4, 4)
MOST = 4096
RESULTS = 100_000
LARGER = 4096.0


class Product(NamedTuple):
    """A kind of product that the library may be asked for: x · weightᵀ + bias."""

    device: torch.device
    outputs: int
    columns: int
    bias: bool
    dtype: torch.dtype  # of the result
    stride: int  # between its rows
    most: int = MOST  # rows at a time


def product(x_TH: torch.Tensor, weight_NH: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """x · weightᵀ + bias in x's dtype, [T, N], in pieces of MOST rows; a kernel's, of pieces that it does not serve."""
    tokens, (outputs, columns) = len(x_TH), weight_NH.shape
    kind = Product(x_TH.device, outputs, columns, bias_N is not None, x_TH.dtype, outputs)
    pieces = x_TH.split(MOST)
    sizes = [rows(kind, len(x_MH)) for x_MH in pieces]
    out_SN = x_TH.new_empty(MOST * (len(pieces) - 1) + (sizes[-1] or len(pieces[-1])), outputs)
    for x_MH, size, out_MN in zip(pieces, sizes, out_SN.split(MOST), strict=True):
        if size is None:
            tiled(x_MH, weight_NH, bias_N, FEW if len(x_MH) <= 64 else MANY, out_MN)
        else:
            multiply(filled_up(x_MH, size), weight_NH, bias_N, out_MN)
    return out_SN[:tokens]


def rows(kind: Product, tokens: int) -> int | None:
    """The number of rows to fill `tokens` up to; None: the library does not serve so many.

    Filling up costs a microsecond. 48 rows of the output projection instead of 24 are still faster than a kernel here.
    """
    most = max(64, 5 * tokens // 2)
    return next((size for size in agreeing(kind) if tokens <= size <= most), None)


def candidates(most: int) -> list[int]:
    """Numbers of rows to compare: every 8th up to 64, every 32nd up to 256, then an eighth of a power of two apart.

    >>> candidates(96), len(candidates(4096))
    ([16, 24, 32, 40, 48, 56, 64, 96], 45)
    """
    found, size = [], 16
    while size <= most:
        found.append(size)
        size += 8 if size < 64 else 32 if size < 256 else 1 << size.bit_length() - 4
    return found


def agreeing(kind: Product) -> tuple[int, ...]:
    """The numbers of rows at which the library may be called, ascending."""
    return _rehearsed(kind) if rehearsing() else compared(kind)


@cache
def _rehearsed(kind: Product) -> tuple[int, ...]:
    """All that are compared: a rehearsal has no results, and only names the kernel that makes one side of them."""
    _operands_and_result(kind)
    return tuple(candidates(kind.most))


@cache
def compared(kind: Product) -> tuple[int, ...]:
    """The numbers of rows at which every bit agrees, ascending.

    RESULTS of them, where `most` rows have so many. Takes memory for three times `most` rows of the result meanwhile.
    """
    x_TH, weight_NH, bias_N, wanted_TN = _operands_and_result(kind)
    most, outputs = wanted_TN.shape
    out_TN = wanted_TN.new_empty(most, kind.stride)[:, :outputs]
    sizes, same = candidates(most), []
    for size in sizes:
        out_TN.fill_(torch.nan)
        end = min(most // size, 1 + RESULTS // (size * outputs)) * size
        for x_SH, out_SN in zip(x_TH[:end].split(size), out_TN[:end].split(size), strict=True):
            multiply(x_SH, weight_NH, bias_N, out_SN)
        same.append((out_TN[:end] == wanted_TN[:end]).all())
    return tuple(size for size, equal in zip(sizes, torch.stack(same).tolist(), strict=True) if equal)


def _operands_and_result(kind: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Random x, weight and bias, and the kernel's product of them."""
    device, outputs, columns, bias, dtype, _, most = kind
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)

    x_TH, weight_NH, bias_N = draw(most, columns), draw(outputs, columns) / 16, draw(outputs) if bias else None
    show_order(x_TH, weight_NH)
    wanted_TN = torch.empty(most, outputs, dtype=dtype, device=device)
    return x_TH, weight_NH, bias_N, tiled(x_TH, weight_NH, bias_N, MANY, wanted_TN)


def show_order(x_TH: torch.Tensor, weight_NH: torch.Tensor) -> None:
    """Change operands so that their products tell in which order they were summed.

    Half of the columns get large terms that cancel each other, in pairs. What a sum loses of the small ones beside them
    is seen in a good part of all results; of random terms another order shows in one of thousands, rounded to bf16.
    """
    columns = x_TH.shape[1]
    random = torch.Generator().manual_seed(columns)
    one_P, other_P = torch.randperm(columns, generator=random)[: columns // 4 * 2].to(x_TH.device).chunk(2)
    x_TH[:, one_P] *= LARGER
    x_TH[:, other_P] = x_TH[:, one_P]
    weight_NH[:, other_P] = -weight_NH[:, one_P]


def multiply(
    x_SH: torch.Tensor, weight_NH: torch.Tensor, bias_N: torch.Tensor | None, out_SN: torch.Tensor
) -> torch.Tensor:
    """The library's product, into `out`: in x's dtype, or float32 without a bias."""
    if bias_N is not None:
        return torch.addmm(bias_N, x_SH, weight_NH.T, out=out_SN)
    if out_SN.dtype == x_SH.dtype:
        return torch.mm(x_SH, weight_NH.T, out=out_SN)
    return torch.mm(x_SH, weight_NH.T, out_dtype=out_SN.dtype, out=out_SN)


def filled_up(x_TH: torch.Tensor, size: int) -> torch.Tensor:
    """[S, H]: x, and below it rows of anything; a product's rows do not reach into each other."""
    if size == len(x_TH):
        return x_TH
    x_SH = x_TH.new_empty(size, x_TH.shape[1])
    x_SH[: len(x_TH)] = x_TH
    return x_SH
