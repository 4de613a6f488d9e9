"""A linear layer of very few tokens in Triton: what linear.py computes, in one launch, at the speed of memory.

A program makes ROWS outputs of every token. It asks for its rows of the weight before the kernel in front has ended
(gpu.py) and holds them in registers, each whole; then a token is one pass over them, without tensor cores.

Letters: T tokens · H inputs · N outputs · R of them a program.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import nn

from epmoe.kernels import native
from epmoe.kernels.gpu import after_previous, early, next_may_begin

# Of one program. 4 x 8, 2 x 8, 1 x 4, 4 x 4 were within 8 % on an H200 (scripts/bench/NOTES.md).
ROWS = 2
WARPS = 4
# Up to so many tokens this is faster than the library's product (scripts/bench/NOTES.md, entry 16).
MOST_TOKENS = 2


def serves(x_TH: torch.Tensor) -> bool:
    """Whether the product of these tokens is made here.

    The library's products round otherwise, so a row's last bits may differ between steps of up to MOST_TOKENS tokens
    and larger ones; they are the same on any number of ranks, which all have the same tokens.
    """
    return native(x_TH) and 0 < len(x_TH) <= MOST_TOKENS


def linear(x_TH: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """As `linear.linear`: [T, H] → [T, N]."""
    (tokens, hidden), (outputs, inputs) = x_TH.shape, layer.weight.shape
    assert hidden == inputs and x_TH.is_contiguous() and layer.weight.is_contiguous()
    assert x_TH.dtype == layer.weight.dtype
    out_TN = x_TH.new_empty(tokens, outputs)
    linear_kernel[(triton.cdiv(outputs, ROWS),)](
        x_TH,
        layer.weight,
        layer.bias,
        out_TN,
        outputs,
        T=tokens,
        H=hidden,
        HP=triton.next_power_of_2(hidden),
        R=ROWS,
        num_warps=WARPS,
        **early(x_TH.device),
    )
    return out_TN


@triton.jit
def linear_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [N, H]
    bias_ptr,  # [N], or None
    out_ptr,  # out [T, N]
    outputs,  # N
    T: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,  # H rounded up to a power of two
    R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program n: outputs n·R … of all tokens. The order of a sum follows H, R and the warps alone."""
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    h_H = tl.arange(0, HP)
    real_R, real_H = n_R < outputs, h_H < H
    weight_RH = tl.load(weight_ptr + n_R[:, None] * H + h_H[None, :], real_R[:, None] & real_H[None, :], other=0)
    bias_R = tl.zeros([R], tl.float32)
    if bias_ptr is not None:
        bias_R = tl.load(bias_ptr + n_R, real_R, other=0).to(tl.float32)
    after_previous(PDL)
    next_may_begin(PDL)
    for t in tl.static_range(T):
        x_H = tl.load(x_ptr + t * H + h_H, real_H, other=0).to(tl.float32)
        out_R = tl.sum(weight_RH.to(tl.float32) * x_H[None, :], 1) + bias_R
        tl.store(out_ptr + t * outputs + n_R, out_R.to(out_ptr.dtype.element_ty), real_R)
