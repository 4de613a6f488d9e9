"""The projection to the vocabulary: norms of the rows whose logits are wanted → float32 logits of a part of it.

Ranks may share the vocabulary, so a logit's bits must not follow from the part that it is computed in.

Letters: T rows · H hidden · V vocabulary.
"""

import torch

from epmoe.layers.linear import product_f32

# Up to so many rows one Triton kernel is faster than the library's products of chunks: on one H200, 201,088 x 2,880,
# 263 µs against 307 for 1 row, 304 against 342 for 64. More were not measured.
FEW = 64


def part_logits(x_TH: torch.Tensor, weight_VH: torch.Tensor, part: tuple[int, int], chunk: int) -> torch.Tensor:
    """x · weightᵀ for the ids `part[0]` … `part[1] - 1`: float32, a view of shape [T, part] of rows that stand V apart.

    Args:
        x_TH: contiguous, of weight's dtype.
        chunk: of a multiple of it `part` begins, and it ends at one or at V.
    """
    first, last = part
    assert first % chunk == 0 and (last % chunk == 0 or last == len(weight_VH)), (part, chunk)
    if suits_kernel(x_TH.device, x_TH.dtype, len(x_TH)):
        from epmoe.kernels import vocabulary as vocabulary_triton  # only here: a CPU machine need not have triton

        return vocabulary_triton.part_logits(x_TH, weight_VH, part)
    return part_logits_torch(x_TH, weight_VH, part, chunk)


def suits_kernel(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether vocabulary_triton.py computes the logits of so many rows.

    The library's products round otherwise, so a row's last bits may differ between steps of up to FEW rows and larger
    ones; they are the same on all ranks, and on any number of them.
    """
    return device.type == "cuda" and dtype == torch.bfloat16 and rows <= FEW


def part_logits_torch(x_TH: torch.Tensor, weight_VH: torch.Tensor, part: tuple[int, int], chunk: int) -> torch.Tensor:
    """`part_logits` with the library's products, for any device and dtype: a product for every chunk.

    Ranks share whole chunks, so a library that chooses its order of summation by the shape of a product gives a logit
    the same bits on any number of them. It may choose by the distance of the rows, too: that is V for every part.
    """
    logits_TV = torch.empty(len(x_TH), len(weight_VH), dtype=torch.float32, device=x_TH.device)
    for begin in range(*part, chunk):
        ids = slice(begin, min(begin + chunk, part[1]))
        product_f32(x_TH, weight_VH[ids].T, out_MN=logits_TV[:, ids])
    return logits_TV[:, slice(*part)]
