"""The projection to the vocabulary: norms of the rows whose logits are wanted → float32 logits of a part of it.

Ranks may share the vocabulary, so a logit's bits must not follow from the part that it is computed in.

Letters: T rows · H hidden · V vocabulary.
"""

import torch

from epmoe.layers.linear import product_f32


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
    logits_TV = torch.empty(len(x_TH), len(weight_VH), dtype=torch.float32, device=x_TH.device)
    for begin in range(*part, chunk):
        ids = slice(begin, min(begin + chunk, part[1]))
        product_f32(x_TH, weight_VH[ids].T, out_MN=logits_TV[:, ids])
    return logits_TV[:, slice(*part)]
