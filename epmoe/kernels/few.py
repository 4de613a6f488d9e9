"""The product of very few rows, product.py's bit for bit, in Gluon: its weights are on their way before x is there.

A program is a warp with 16 rows of the weight. It asks for the first steps of them before the kernel in front has ended
(gpu.py), and for x after that. A ring in shared memory holds the steps to come:

    before         weight 0  weight 1 …                         the kernel in front makes x
    after_previous                      x 0  x 1 …
    step s                                          multiply s · ask for weight and x of s + S - 1 …

Letters: as product.py · S steps in the ring.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from epmoe.kernels.gpu import after_previous, early, next_may_begin
from epmoe.kernels.product import Tile

_sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
# Rows of a step, so that a tensor core's 8 rows of 16 bytes lie in different banks.
_SHARED = gl.constexpr(gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0]))


def few(x_TH: torch.Tensor, weight_NH: torch.Tensor, bias_N: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    """x · weightᵀ + bias for up to `tile.tokens` rows of bf16: [T, N]; one launch. The tile's stages are the ring."""
    (tokens, hidden), outputs = x_TH.shape, len(weight_NH)
    assert 0 < tokens <= tile.tokens and weight_NH.shape[1] == hidden and hidden % 8 == 0, (x_TH.shape, tile)
    assert x_TH.is_contiguous() and weight_NH.is_contiguous() and x_TH.dtype == weight_NH.dtype == torch.bfloat16
    assert bias_N is None or (bias_N.shape == (outputs,) and bias_N.is_contiguous())
    out_TN = x_TH.new_empty(tokens, outputs)
    few_kernel[(triton.cdiv(outputs, tile.rows),)](
        x_TH,
        weight_NH,
        bias_N,
        out_TN,
        tokens,
        outputs,
        H=hidden,
        R=tile.rows,
        M=tile.tokens,
        K=tile.depth,
        S=tile.stages,
        num_warps=tile.warps,
        **early(x_TH.device),
    )
    return out_TN


@gluon.jit(do_not_specialize=["tokens"])
def few_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [N, H]
    bias_ptr,  # [N], or None
    out_ptr,  # out [T, N]
    tokens,  # T, at most M
    outputs,  # N
    H: gl.constexpr,
    R: gl.constexpr,
    M: gl.constexpr,
    K: gl.constexpr,
    S: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program n: outputs n·R … of all rows."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    along: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    w_sSRK = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [S, R, K], _SHARED)
    x_sSMK = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [S, M, K], _SHARED)
    n_R = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, along))
    t_M = gl.arange(0, M, layout=gl.SliceLayout(1, along))
    k_K = gl.arange(0, K, layout=gl.SliceLayout(0, along))
    weight_RK = weight_ptr + n_R.to(gl.int64)[:, None] * H + k_K[None, :]
    x_MK = x_ptr + t_M[:, None] * H + k_K[None, :]
    real_R1, real_M1 = (n_R < outputs)[:, None], (t_M < tokens)[:, None]
    to_R = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, mma))
    to_M = gl.arange(0, M, layout=gl.SliceLayout(0, mma))
    # Asked for here, not when it is needed: that would be another half microsecond.
    bias_R = gl.zeros([R], gl.float32, layout=gl.SliceLayout(1, mma))
    if bias_ptr is not None:
        bias_R = gl.load(bias_ptr + to_R, to_R < outputs, other=0).to(gl.float32)
    for s in gl.static_range(S - 1):
        real_1K = (s * K + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(w_sSRK.index(s), weight_RK + s * K, mask=real_R1 & real_1K)
        async_copy.commit_group()
    after_previous(PDL)
    next_may_begin(PDL)
    for s in gl.static_range(S - 1):
        real_1K = (s * K + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(x_sSMK.index(s), x_MK + s * K, mask=real_M1 & real_1K)
        async_copy.commit_group()
    sum_RM = gl.zeros([R, M], gl.float32, layout=mma)
    for step in range((H + K - 1) // K):
        async_copy.wait_group(S - 2)
        _sync()
        w_RK = w_sSRK.index(step % S).load(left)
        x_KM = x_sSMK.index(step % S).permute([1, 0]).load(right)
        # The step before this one is multiplied in all threads: its place is free.
        to, k = (step + S - 1) % S, (step + S - 1) * K
        real_1K = (k + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(w_sSRK.index(to), weight_RK + k, mask=real_R1 & real_1K)
        async_copy.async_copy_global_to_shared(x_sSMK.index(to), x_MK + k, mask=real_M1 & real_1K)
        async_copy.commit_group()
        sum_RM = mma_v2(w_RK, x_KM, sum_RM)
    async_copy.wait_group(0)
    out_RM = (sum_RM + bias_R[:, None]).to(out_ptr.dtype.element_ty)
    real_RM = (to_R < outputs)[:, None] & (to_M < tokens)[None, :]
    gl.store(out_ptr + to_M[None, :] * outputs + to_R[:, None], out_RM, real_RM)
