"""The product of very few rows, product.py's bit for bit, in Gluon: its weights are on their way before x is there.

A program is one warp. It asks for the first steps' weights before the kernel in front has ended (gpu.py), and for x
after that; a ring in shared memory holds the next steps of both.

Letters: as product.py · S steps in the ring.
"""

# mypy: disallow-untyped-defs=False

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from epmoe.kernels.gpu import after_previous, next_may_begin

_sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
_SHARED = gl.constexpr(gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0]))


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
    """Program n: outputs n·R … of all tokens."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    along: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    steps: gl.constexpr = (H + K - 1) // K
    w_sSRK = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [S, R, K], _SHARED)
    x_sSMK = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [S, M, K], _SHARED)
    n_R = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, along))
    t_M = gl.arange(0, M, layout=gl.SliceLayout(1, along))
    k_K = gl.arange(0, K, layout=gl.SliceLayout(0, along))
    weight_RK = weight_ptr + n_R[:, None] * H + k_K[None, :]
    x_MK = x_ptr + t_M[:, None] * H + k_K[None, :]
    real_R1, real_M1 = (n_R < outputs)[:, None], (t_M < tokens)[:, None]
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
    for step in range(steps):
        async_copy.wait_group(S - 2)
        _sync()
        at = step % S
        w_RK = w_sSRK.index(at).load(left)
        x_KM = x_sSMK.index(at).permute([1, 0]).load(right)
        # The step before this one is multiplied: its place is free.
        to, k = (step + S - 1) % S, (step + S - 1) * K
        real_1K = (k + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(w_sSRK.index(to), weight_RK + k, mask=real_R1 & real_1K)
        async_copy.async_copy_global_to_shared(x_sSMK.index(to), x_MK + k, mask=real_M1 & real_1K)
        async_copy.commit_group()
        sum_RM = mma_v2(w_RK, x_KM, sum_RM)
    async_copy.wait_group(0)
    n_R = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, mma))
    t_M = gl.arange(0, M, layout=gl.SliceLayout(0, mma))
    if bias_ptr is not None:
        sum_RM += gl.load(bias_ptr + n_R, n_R < outputs, other=0).to(gl.float32)[:, None]
    at_RM = out_ptr + t_M[None, :] * outputs + n_R[:, None]
    real_RM = (n_R < outputs)[:, None] & (t_M < tokens)[None, :]
    gl.store(at_RM, sum_RM.to(out_ptr.dtype.element_ty), real_RM)
