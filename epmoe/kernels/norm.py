"""The residual sum and its norm in one Triton kernel, for few tokens a linear layer too: norm.py's functions.

Letters: T tokens · K rows a token · H hidden · E outputs of the linear layer · B of them a program · R runs of C
columns.

One program a token, which holds the whole row in registers and reads and writes it once. With a linear layer, a program
for every B outputs of a token: each makes the norm again, which costs less than a kernel for the product.

The orders of summation follow H alone, so a row's bits depend neither on the batch nor on the ranks. The linear layer
is the router, whose product is summed in runs (runs.py), a warp for each.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import nn

from epmoe.kernels import native
from epmoe.kernels.gpu import after_previous, early, next_may_begin
from epmoe.kernels.runs import RUNS, columns, product, upwards

# 4096 padded columns over 16 warps: 8 to a thread. One number for all kernels here: it sets the order of the squares.
_THREAD = 8
# Outputs of the linear layer that one program makes: with their weights, [16, C, 8], it has 64 KB in shared memory.
OUTPUTS = 8
# Up to so many tokens times outputs the norm is made again for each few outputs, in rows of up to so many columns.
MOST_AGAIN, MOST_COLUMNS = 1024, 4096


def serves(x_TH: torch.Tensor) -> bool:
    """Any rows."""
    return True


def add_norm(
    x_TH: torch.Tensor, rows_TKH: torch.Tensor | None, weight_H: torch.Tensor, eps: float, *, clear: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `norm.add_norm`: (x + the rows, its norm). One launch; x and rows are contiguous.

    The sum has the reference's bits; the norm differs by the order of its sum of squares.
    """
    tokens, hidden = x_TH.shape
    assert x_TH.is_contiguous() and weight_H.shape == (hidden,) and weight_H.is_contiguous()
    top_k, sum_TH, norm_TH = 0, x_TH, torch.empty_like(x_TH)
    if rows_TKH is not None:
        top_k, sum_TH = rows_TKH.shape[1], torch.empty_like(x_TH)
        assert rows_TKH.shape == (tokens, top_k, hidden)
        assert rows_TKH.is_contiguous() and rows_TKH.dtype == x_TH.dtype
    if tokens:
        add_norm_kernel[(tokens,)](
            x_TH,
            rows_TKH,
            weight_H,
            sum_TH,
            norm_TH,
            eps,
            H=hidden,
            K=top_k,
            CLEAR=clear,
            **tile_options(hidden),
            **early(x_TH.device),
        )
    return sum_TH, norm_TH


def add_norm_linear(
    x_TH: torch.Tensor, rows_TKH: torch.Tensor, weight_H: torch.Tensor, eps: float, linear: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `norm.add_norm_linear`, for the kernels' dtype; one launch for few tokens, else a product after the norm."""
    tokens, hidden = x_TH.shape
    assert native(x_TH), x_TH.dtype
    if 0 < tokens * linear.out_features <= MOST_AGAIN and columns(hidden) <= MOST_COLUMNS:
        return _few(x_TH, rows_TKH, weight_H, eps, linear)
    sum_TH, norm_TH = add_norm(x_TH, rows_TKH, weight_H, eps)
    return sum_TH, norm_TH, product(norm_TH, linear)


def _few(
    x_TH: torch.Tensor, rows_TKH: torch.Tensor, weight_H: torch.Tensor, eps: float, linear: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_norm_linear` in one launch."""
    (tokens, hidden), outputs, top_k = x_TH.shape, linear.out_features, rows_TKH.shape[1]
    assert rows_TKH.shape == (tokens, top_k, hidden) and weight_H.shape == (hidden,) and hidden == linear.in_features
    tensors = (x_TH, rows_TKH, weight_H, linear.weight, *(() if linear.bias is None else (linear.bias,)))
    assert all(tensor.is_contiguous() and tensor.dtype == x_TH.dtype for tensor in tensors)
    sum_TH, norm_TH, out_TE = torch.empty_like(x_TH), torch.empty_like(x_TH), x_TH.new_empty(tokens, outputs)
    add_norm_linear_kernel[(tokens, triton.cdiv(outputs, OUTPUTS))](
        x_TH,
        rows_TKH,
        weight_H,
        linear.weight,
        linear.bias,
        sum_TH,
        norm_TH,
        out_TE,
        eps,
        H=hidden,
        K=top_k,
        E=outputs,
        B=OUTPUTS,
        R=RUNS,
        **tile_options(hidden),
        **early(x_TH.device),
    )
    return sum_TH, norm_TH, out_TE


def tile_options(hidden: int) -> dict[str, int]:
    padded = columns(hidden)
    return {"HP": padded, "num_warps": min(16, max(1, padded // (32 * _THREAD)))}


@triton.jit
def add_norm_kernel(
    x_ptr,  # [T, H]
    rows_ptr,  # [T, K, H], with CLEAR zeros afterwards; None when K is 0
    weight_ptr,  # [H]
    sum_ptr,  # out [T, H]; not written when K is 0
    norm_ptr,  # out [T, H]
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    CLEAR: tl.constexpr,
    HP: tl.constexpr,  # H rounded up to a power of two
    PDL: tl.constexpr,
):
    """Program t: x[t] + its K rows, added upwards from +0; then the norm of what was stored."""
    t = tl.program_id(0).to(tl.int64)
    h_H = tl.arange(0, HP)
    real_H = h_H < H
    sum_H, norm_H = _add_norm(x_ptr, rows_ptr, weight_ptr, t, h_H, real_H, eps, H, K, HP, PDL)
    if K:
        tl.store(sum_ptr + t * H + h_H, sum_H, real_H)
        if CLEAR:
            zero_H = tl.zeros([HP], rows_ptr.dtype.element_ty)
            for k in tl.static_range(K):
                tl.store(rows_ptr + (t * K + k) * H + h_H, zero_H, real_H)
    tl.store(norm_ptr + t * H + h_H, norm_H, real_H)


@triton.jit
def add_norm_linear_kernel(
    x_ptr,  # [T, H]
    rows_ptr,  # [T, K, H]
    weight_ptr,  # [H]
    linear_ptr,  # [E, H]
    bias_ptr,  # [E], or None
    sum_ptr,  # out [T, H]
    norm_ptr,  # out [T, H]
    out_ptr,  # out [T, E]
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    HP: tl.constexpr,  # H rounded up to a power of two
    PDL: tl.constexpr,
):
    """Program (t, b): outputs b·B … of row t; the first one writes the row's sum and norm."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h_H = tl.arange(0, HP)
    real_H = h_H < H
    e_B = b * B + tl.arange(0, B)
    # Asked for first: they are under way while the kernel before ends and the norm is made.
    h_RC = tl.arange(0, R)[:, None] * (HP // R) + tl.arange(0, HP // R)[None, :]
    real_RCB = (h_RC < H)[:, :, None] & (e_B < E)[None, None, :]
    linear_RCB = tl.load(linear_ptr + e_B[None, None, :] * H + h_RC[:, :, None], real_RCB, other=0)
    bias_B = tl.zeros([B], tl.float32)
    if bias_ptr is not None:
        bias_B = tl.load(bias_ptr + e_B, e_B < E, other=0).to(tl.float32)
    sum_H, norm_H = _add_norm(x_ptr, rows_ptr, weight_ptr, t, h_H, real_H, eps, H, K, HP, PDL)
    if b == 0:
        tl.store(sum_ptr + t * H + h_H, sum_H, real_H)
        tl.store(norm_ptr + t * H + h_H, norm_H, real_H)
    # A tensor core takes 16 rows: all are this one, and one of them is taken. (Reshaped to [R, 1, C] first, all 16
    # would pass through shared memory, 128 KB.)
    x_RMC = tl.broadcast_to(tl.reshape(norm_H, [R, HP // R])[:, None, :], [R, 16, HP // R])
    sum_RMB = tl.dot(x_RMC, linear_RCB, input_precision="ieee")
    sum_RB = tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :, None], sum_RMB, 0.0), 1)
    out_B = upwards(sum_RB, B) + bias_B
    tl.store(out_ptr + t * E + e_B, out_B.to(out_ptr.dtype.element_ty), e_B < E)


@triton.jit
def _add_norm(
    x_ptr,
    rows_ptr,
    weight_ptr,
    t,
    h_H,
    real_H,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row t: (the sum, its norm), both rounded to x's dtype."""
    weight_H = tl.load(weight_ptr + h_H, real_H, other=0).to(tl.float32)
    # In this order: what comes next reads nothing but weights before this kernel's end, which is later than its wait.
    next_may_begin(PDL)
    after_previous(PDL)
    x_H = tl.load(x_ptr + t * H + h_H, real_H, other=0)
    if K:
        add_H = tl.zeros([HP], tl.float32)
        for k in tl.static_range(K):
            add_H += tl.load(rows_ptr + (t * K + k) * H + h_H, real_H, other=0).to(tl.float32)
        x_H = (x_H.to(tl.float32) + add_H.to(x_H.dtype).to(tl.float32)).to(x_H.dtype)
    wide_H = x_H.to(tl.float32)
    square = tl.sum(wide_H * wide_H, 0) / H
    scale = tl.where(square < float("inf"), tl.rsqrt(square + eps), float("nan"))  # NaN compares as false
    norm_H = wide_H * scale * weight_H
    return x_H, norm_H.to(x_H.dtype)
