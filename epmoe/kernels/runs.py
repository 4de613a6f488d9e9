"""The router's product: few outputs, so its columns are summed in runs that go side by side.

    out[t] = (((r₀ + r₁) + …) + r₁₅) + bias        r: a run's products of 16 columns, one after the other from +0

One sum over all columns (product.py) would be 180 steps of a tensor core that wait for each other, 3 µs, more than all
else that the router does with few rows; a run of 256 is 16 steps. The library, which splits the columns by rules of its
own, is never asked, so the order is ours to choose, and it is the same for few tokens (norm.py), more and many.

Letters: T tokens · H columns · E outputs · in a program: B outputs, M tokens, R runs of C columns, D columns of a step.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import nn

from epmoe.kernels.gpu import after_previous, early, next_may_begin
from epmoe.kernels.product import Tile, tiled

RUNS = 16
# Up to so many tokens times outputs, all runs side by side …
SIDE_BY_SIDE = {32768: Tile(16, 8, 64, 8, 3), 131072: Tile(32, 16, 32, 8, 3)}
# … and beyond, one after the other. The tile is narrow enough to be multiplied as the others are, by `mma`.
ONE_BY_ONE = Tile(32, 32, 128, 4, 4)


def columns(hidden: int) -> int:
    """H rounded up to a power of two, of which a run has 16 at least."""
    return max(16 * RUNS, triton.next_power_of_2(hidden))


def product(x_TH: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """The linear layer alone, summed in runs: [T, E] in x's dtype; one launch."""
    (tokens, hidden), outputs = x_TH.shape, linear.out_features
    run, size = columns(hidden) // RUNS, tokens * outputs
    tile = next((tile for most, tile in SIDE_BY_SIDE.items() if size <= most), None)
    if tile is None or not tokens:
        return tiled(x_TH, linear.weight, linear.bias, ONE_BY_ONE._replace(depth=min(run, ONE_BY_ONE.depth)), run=run)
    assert x_TH.is_contiguous() and linear.weight.is_contiguous() and x_TH.dtype == linear.weight.dtype
    out_TE = x_TH.new_empty(tokens, outputs)
    runs_kernel[(triton.cdiv(outputs, tile.rows), triton.cdiv(tokens, tile.tokens))](
        x_TH,
        linear.weight,
        linear.bias,
        out_TE,
        tokens,
        H=hidden,
        E=outputs,
        B=tile.rows,
        M=tile.tokens,
        R=RUNS,
        C=run,
        D=min(run, tile.depth),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **early(x_TH.device),
    )
    return out_TE


@triton.jit(do_not_specialize=["tokens"])
def runs_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [E, H]
    bias_ptr,  # [E], or None
    out_ptr,  # out [T, E]
    tokens,  # T
    H: tl.constexpr,
    E: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (b, m): outputs b·B … of the tokens m·M …, all runs side by side."""
    e_B, t_M = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * M + tl.arange(0, M)
    real_B, real_M = e_B < E, t_M < tokens
    h_RD = tl.arange(0, R)[:, None] * C + tl.arange(0, D)[None, :]
    weight_RBD = weight_ptr + e_B[None, :, None] * H + h_RD[:, None, :]
    x_RDM = x_ptr + t_M.to(tl.int64)[None, None, :] * H + h_RD[:, :, None]
    bias_B = tl.zeros([B], tl.float32)
    if bias_ptr is not None:
        bias_B = tl.load(bias_ptr + e_B, real_B, other=0).to(tl.float32)
    after_previous(PDL)
    next_may_begin(PDL)
    sum_RBM = tl.zeros([R, B, M], tl.float32)
    for c in range(0, C, D):
        real_RD = h_RD + c < H
        w_RBD = tl.load(weight_RBD + c, real_B[None, :, None] & real_RD[:, None, :], other=0)
        t_RDM = tl.load(x_RDM + c, real_M[None, None, :] & real_RD[:, :, None], other=0)
        sum_RBM = tl.dot(w_RBD, t_RDM, sum_RBM, input_precision="ieee")
    out_BM = tl.reshape(upwards(tl.reshape(sum_RBM, [R, B * M]), B * M), [B, M]) + bias_B[:, None]
    to_BM = out_ptr + t_M.to(tl.int64)[None, :] * E + e_B[:, None]
    tl.store(to_BM, out_BM.to(out_ptr.dtype.element_ty), real_B[:, None] & real_M[None, :])


@triton.jit
def upwards(run_RN, N: tl.constexpr):
    """((r₀ + r₁) + …) + r₁₅ of 16 runs, [16, N] → [N]; `tl.sum` would leave the order to the compiler."""
    low_8N, high_8N = tl.split(tl.permute(tl.reshape(run_RN, [2, 8, N]), [1, 2, 0]))
    r0, r1, r2, r3, r4, r5, r6, r7 = _eight(low_8N, N)
    low_N = ((((((r0 + r1) + r2) + r3) + r4) + r5) + r6) + r7
    r0, r1, r2, r3, r4, r5, r6, r7 = _eight(high_8N, N)
    return (((((((low_N + r0) + r1) + r2) + r3) + r4) + r5) + r6) + r7


@triton.jit
def _eight(run_8N, N: tl.constexpr):
    """The rows of [8, N], one by one."""
    even_N4, odd_N4 = tl.split(tl.reshape(tl.trans(run_8N), [N, 4, 2]))
    r04, r26 = tl.split(tl.reshape(even_N4, [N, 2, 2]))
    r15, r37 = tl.split(tl.reshape(odd_N4, [N, 2, 2]))
    r0, r4 = tl.split(r04)
    r1, r5 = tl.split(r15)
    r2, r6 = tl.split(r26)
    r3, r7 = tl.split(r37)
    return r0, r1, r2, r3, r4, r5, r6, r7
