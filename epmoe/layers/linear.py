"""A linear layer of a step's tokens, y = x · weightᵀ + bias: attention's projections; the library's float32 products.

Letters: T tokens · H inputs · N outputs · of a product of any two matrices: [M, K] times [K, N], in B pairs.
"""

import torch
from torch import nn


def linear(x_TH: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """[T, H] → [T, N] in x's dtype, summed in float32 and rounded once."""
    out_TN: torch.Tensor = layer(x_TH)
    return out_TN


def product_f32(a_MK: torch.Tensor, b_KN: torch.Tensor, out_MN: torch.Tensor | None = None) -> torch.Tensor:
    """The product of two matrices, or of two batches [B, M, K] and [B, K, N], summed in float32 and given in float32.

    Written into `out_MN` where that is given, which may be part of a matrix.
    """
    product = torch.bmm if a_MK.dim() == 3 else torch.mm
    if a_MK.dtype == torch.float32 or a_MK.device.type == "cpu":  # torch has out_dtype on accelerators only
        return product(a_MK.float(), b_KN.float(), out=out_MN)
    # out_dtype and out are one overload, which does not take None
    return product(a_MK, b_KN, out_dtype=torch.float32, **({} if out_MN is None else {"out": out_MN}))
