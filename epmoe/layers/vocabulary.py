"""The projection to the vocabulary: norms of the rows whose logits are wanted → float32 logits of a part of it.

Ranks may share the vocabulary, so a logit's bits must not follow from the part that it is computed in; nor from the
rows that come with it (linear.py).

Letters: T rows · M of them a tile · H hidden · V vocabulary.
"""

import torch

from epmoe.layers.linear import product_f32, tiles


def part_logits(x_TH: torch.Tensor, weight_VH: torch.Tensor, part: tuple[int, int], chunk: int) -> torch.Tensor:
    """x · weightᵀ for the ids `part[0]` … `part[1] - 1`: float32, a view of shape [T, part] of rows that stand V apart.

    The library's products, for any device and dtype, one for every chunk; epmoe/kernels/vocabulary.py has the fast one.
    Ranks share whole chunks, so a library that chooses its order of summation by the shape of a product gives a logit
    the same bits on any number of them. It may choose by the distance of the rows, too: that is V for every part.

    Args:
        x_TH: contiguous, of weight's dtype.
        chunk: of a multiple of it `part` begins, and it ends at one or at V.
    """
    assert part[0] % chunk == 0 and (part[1] % chunk == 0 or part[1] == len(weight_VH)), (part, chunk)
    tile_MH, rows = tiles(x_TH), len(x_TH)
    padded = sum(map(len, tile_MH))
    logits_TV = torch.empty(padded, len(weight_VH), dtype=torch.float32, device=x_TH.device)
    for begin in range(*part, chunk):
        ids = slice(begin, min(begin + chunk, part[1]))
        weight_HC = weight_VH[ids].T.float() if x_TH.device.type == "cpu" else weight_VH[ids].T
        for x_MH, logits_MV in zip(tile_MH, logits_TV.split(len(tile_MH[0]) or 1), strict=True):
            product_f32(x_MH, weight_HC, out_MN=logits_MV[:, ids])
    return logits_TV[:rows, slice(*part)]
