"""The projection to the vocabulary of any number of bf16 rows: what vocabulary.py computes, in one order of summation.

Up to MOST_ROWS rows in one launch (product.py), which reads the weight once, nearly as fast as memory gives it; more by
the library, chunk by chunk, where it has the same bits (vendor.py). So a logit's bits depend neither on the part of
the vocabulary nor on the rows that come with it.

Letters: T rows · H hidden · V vocabulary · C ids of a chunk · S rows of a product, filled up.
"""

import torch

from epmoe.kernels import native, vendor
from epmoe.kernels.product import Tile, tiled
from epmoe.kernels.vendor import Product

# Up to so many rows one kernel is faster than the library's products of chunks: on one H200, 201,088 x 2,880, 263 µs
# against 307 for 1 row, 304 against 342 for 64.
MOST_ROWS = 64
# Rows that the library has at a time: the comparison with it needs as much memory as their logits.
AT_A_TIME = 256

# On one H200, for 201,088 x 2,880: steps of 128 columns take 263, 271, 280 and 336 µs for 1, 4, 16 and 64 tokens, steps
# of 64 take 270, 274, 283 and 304. Tiles are few, so that all are compiled before the first request: which one a step
# takes follows from the count of its tokens alone, and the decode steps that are run first have all counts.
TILES = (Tile(64, 16, 128, 4, 4), Tile(64, 32, 128, 4, 4), Tile(64, MOST_ROWS, 64, 4, 5))


def serves(x_TH: torch.Tensor) -> bool:
    """Whether the logits of these rows are computed here: of bf16, in Triton's interpreter of float32."""
    return native(x_TH)


def part_logits(x_TH: torch.Tensor, weight_VH: torch.Tensor, part: tuple[int, int], chunk: int) -> torch.Tensor:
    """As `layers.vocabulary.part_logits`; for up to MOST_ROWS rows any part, whatever the chunk."""
    tokens, (vocab, hidden), few = len(x_TH), weight_VH.shape, len(x_TH) <= MOST_ROWS or x_TH.device.type == "cpu"
    assert x_TH.shape[1] == hidden and 0 <= part[0] < part[1] <= vocab, (x_TH.shape, part)
    # The library's numbers of rows from 64 to AT_A_TIME are 32 apart (vendor.candidates).
    x_SH = x_TH if few else vendor.filled_up(x_TH, -(-tokens // 32) * 32)
    logits_SV = torch.empty(len(x_SH), vocab, dtype=torch.float32, device=x_TH.device)
    if few:
        ids = slice(*part)
        tiled(x_SH, weight_VH[ids], None, _tile(tokens), logits_SV[:, ids])
    else:
        for x_MH, logits_MV in zip(x_SH.split(AT_A_TIME), logits_SV.split(AT_A_TIME), strict=True):
            for begin in range(*part, chunk):
                ids = slice(begin, min(begin + chunk, part[1]))
                _chunk(x_MH, weight_VH[ids], logits_MV[:, ids])
    return logits_SV[:tokens, slice(*part)]


def _tile(tokens: int) -> Tile:
    return next((tile for tile in TILES if tokens <= tile.tokens), TILES[-1])


def _chunk(x_SH: torch.Tensor, weight_CH: torch.Tensor, logits_SC: torch.Tensor) -> None:
    """One chunk's logits of some rows, written into `logits`."""
    ids, hidden = weight_CH.shape
    kind = Product(x_SH.device, ids, hidden, False, torch.float32, logits_SC.stride(0), AT_A_TIME)
    if len(x_SH) in vendor.agreeing(kind):
        vendor.multiply(x_SH, weight_CH, None, logits_SC)
    else:
        tiled(x_SH, weight_CH, None, vendor.MANY, logits_SC)
