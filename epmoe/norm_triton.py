"""The residual sum and its norm in one Triton kernel: what `norm.add_norm` computes, with the same signature.

Letters: T tokens · K rows a token · H hidden.

One program a token, which holds the whole row in registers and reads and writes it once. Its order of summation follows
H alone, so a row's bits depend neither on the batch nor on the ranks.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

# 4096 padded columns over 8 warps: 16 to a thread.
_THREAD = 16


def add_norm(
    x_TH: torch.Tensor, rows_TKH: torch.Tensor | None, weight_H: torch.Tensor, eps: float
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
            x_TH, rows_TKH, weight_H, sum_TH, norm_TH, eps, H=hidden, K=top_k, **tile_options(hidden)
        )
    return sum_TH, norm_TH


def tile_options(hidden: int) -> dict[str, int]:
    padded = max(128, triton.next_power_of_2(hidden))
    return {"HP": padded, "num_warps": min(16, max(1, padded // (32 * _THREAD)))}


@triton.jit
def add_norm_kernel(
    x_ptr,  # [T, H]
    rows_ptr,  # [T, K, H]; None when K is 0
    weight_ptr,  # [H]
    sum_ptr,  # out [T, H]; not written when K is 0
    norm_ptr,  # out [T, H]
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HP: tl.constexpr,  # H rounded up to a power of two
):
    """Program t: x[t] + its K rows, added upwards from +0; then the norm of what was stored."""
    t = tl.program_id(0).to(tl.int64)
    h_H = tl.arange(0, HP)
    real_H = h_H < H
    x_H = tl.load(x_ptr + t * H + h_H, real_H, other=0)
    weight_H = tl.load(weight_ptr + h_H, real_H, other=0).to(tl.float32)
    if K:
        add_H = tl.zeros([HP], tl.float32)
        for k in tl.static_range(K):
            add_H += tl.load(rows_ptr + (t * K + k) * H + h_H, real_H, other=0).to(tl.float32)
        x_H = (x_H.to(tl.float32) + add_H.to(x_H.dtype).to(tl.float32)).to(x_H.dtype)
        tl.store(sum_ptr + t * H + h_H, x_H, real_H)
    wide_H = x_H.to(tl.float32)
    norm_H = wide_H * tl.rsqrt(tl.sum(wide_H * wide_H, 0) / H + eps) * weight_H
    tl.store(norm_ptr + t * H + h_H, norm_H.to(x_H.dtype), real_H)
