"""A linear layer of a step's tokens, y = x · weightᵀ + bias: attention's projections.

Letters: T tokens · H inputs · N outputs.
"""

import torch
from torch import nn

# Up to so many tokens a Triton kernel is faster than the library's product (scripts/bench/NOTES.md, entry 16).
FEW = 2


def linear(x_TH: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """[T, H] → [T, N] in x's dtype, summed in float32 and rounded once."""
    if suits_kernel(x_TH.device, x_TH.dtype, len(x_TH)):
        from epmoe import linear_triton  # only here: a CPU machine need not have triton

        return linear_triton.linear(x_TH, layer)
    out_TN: torch.Tensor = layer(x_TH)
    return out_TN


def suits_kernel(device: torch.device, dtype: torch.dtype, tokens: int) -> bool:
    """Whether linear_triton.py makes the product of so many tokens.

    The library's products round otherwise, so a row's last bits may differ between steps of up to FEW tokens and larger
    ones; they are the same on any number of ranks, which all have the same tokens.
    """
    return device.type == "cuda" and dtype == torch.bfloat16 and 0 < tokens <= FEW
