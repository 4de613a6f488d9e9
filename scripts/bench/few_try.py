import triton, triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from epmoe.kernels.gpu import after_previous, next_may_begin
_sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_SHARED = gl.constexpr(gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0]))

@gluon.jit(do_not_specialize=["tokens"])
def few2_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, outputs,
    H: gl.constexpr, R: gl.constexpr, M: gl.constexpr, K: gl.constexpr, S: gl.constexpr, SIDE: gl.constexpr, PDL: gl.constexpr):
    """SIDE 0: weights are the left operand [R=16.., K]; 1: the right one, [K, R=8..], tokens left (M = 16)."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1] if SIDE == 0 else [1, gl.num_warps()], [16, 8])
    along: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    steps: gl.constexpr = (H + K - 1) // K
    w_s = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [S, R, K], _SHARED)
    x_s = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [S, M, K], _SHARED)
    n_R = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, along))
    t_M = gl.arange(0, M, layout=gl.SliceLayout(1, along))
    k_K = gl.arange(0, K, layout=gl.SliceLayout(0, along))
    weight_RK = weight_ptr + n_R[:, None] * H + k_K[None, :]
    x_MK = x_ptr + t_M[:, None] * H + k_K[None, :]
    real_R1, real_M1 = (n_R < outputs)[:, None], (t_M < tokens)[:, None]
    for s in gl.static_range(S - 1):
        real_1K = (s * K + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(w_s.index(s), weight_RK + s * K, mask=real_R1 & real_1K)
        async_copy.commit_group()
    after_previous(PDL)
    next_may_begin(PDL)
    for s in gl.static_range(S - 1):
        real_1K = (s * K + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(x_s.index(s), x_MK + s * K, mask=real_M1 & real_1K)
        async_copy.commit_group()
    async_copy.wait_group(S - 2)
    _sync()
    if SIDE == 0:
        acc = gl.zeros([R, M], gl.float32, layout=mma)
        a = w_s.index(0).load(left)
        b = x_s.index(0).permute([1, 0]).load(right)
    else:
        acc = gl.zeros([M, R], gl.float32, layout=mma)
        a = x_s.index(0).load(left)
        b = w_s.index(0).permute([1, 0]).load(right)
    for step in range(steps):
        # the operands of the next step come while this one's are multiplied
        async_copy.wait_group(S - 3)
        _sync()
        at = (step + 1) % S
        if SIDE == 0:
            a2 = w_s.index(at).load(left)
            b2 = x_s.index(at).permute([1, 0]).load(right)
        else:
            a2 = x_s.index(at).load(left)
            b2 = w_s.index(at).permute([1, 0]).load(right)
        to, k = (step + S - 1) % S, (step + S - 1) * K
        real_1K = (k + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(w_s.index(to), weight_RK + k, mask=real_R1 & real_1K)
        async_copy.async_copy_global_to_shared(x_s.index(to), x_MK + k, mask=real_M1 & real_1K)
        async_copy.commit_group()
        acc = mma_v2(a, b, acc)
        a, b = a2, b2
    async_copy.wait_group(0)
    if SIDE == 0:
        n_N = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(1, mma))
        m_M = gl.arange(0, M, layout=gl.SliceLayout(0, mma))
        if bias_ptr is not None:
            acc += gl.load(bias_ptr + n_N, n_N < outputs, other=0).to(gl.float32)[:, None]
        gl.store(out_ptr + m_M[None, :] * outputs + n_N[:, None], acc.to(out_ptr.dtype.element_ty), (n_N < outputs)[:, None] & (m_M < tokens)[None, :])
    else:
        n_N = gl.program_id(0) * R + gl.arange(0, R, layout=gl.SliceLayout(0, mma))
        m_M = gl.arange(0, M, layout=gl.SliceLayout(1, mma))
        if bias_ptr is not None:
            acc += gl.load(bias_ptr + n_N, n_N < outputs, other=0).to(gl.float32)[None, :]
        gl.store(out_ptr + m_M[:, None] * outputs + n_N[None, :], acc.to(out_ptr.dtype.element_ty), (n_N < outputs)[None, :] & (m_M < tokens)[:, None])


@gluon.jit(do_not_specialize=["tokens"])
def few3_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, outputs,
    H: gl.constexpr, R: gl.constexpr, M: gl.constexpr, K: gl.constexpr, S: gl.constexpr, ROWS: gl.constexpr, EVICT: gl.constexpr, PDL: gl.constexpr):
    """A warp has ROWS outputs of the 16 of its tile, so that the programs share out evenly."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    along: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    steps: gl.constexpr = (H + K - 1) // K
    w_s = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [S, R, K], _SHARED)
    x_s = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [S, M, K], _SHARED)
    r_R = gl.arange(0, R, layout=gl.SliceLayout(1, along))
    n_R = (gl.program_id(0) * (R // 16) + r_R // 16) * ROWS + r_R % 16
    t_M = gl.arange(0, M, layout=gl.SliceLayout(1, along))
    k_K = gl.arange(0, K, layout=gl.SliceLayout(0, along))
    weight_RK = weight_ptr + n_R[:, None] * H + k_K[None, :]
    x_MK = x_ptr + t_M[:, None] * H + k_K[None, :]
    real_R1, real_M1 = ((n_R < outputs) & (r_R % 16 < ROWS))[:, None], (t_M < tokens)[:, None]
    for s in gl.static_range(S - 1):
        real_1K = (s * K + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(w_s.index(s), weight_RK + s * K, mask=real_R1 & real_1K, eviction_policy=EVICT)
        async_copy.commit_group()
    after_previous(PDL)
    next_may_begin(PDL)
    for s in gl.static_range(S - 1):
        real_1K = (s * K + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(x_s.index(s), x_MK + s * K, mask=real_M1 & real_1K)
        async_copy.commit_group()
    acc = gl.zeros([R, M], gl.float32, layout=mma)
    for step in range(steps):
        async_copy.wait_group(S - 2)
        _sync()
        at = step % S
        a = w_s.index(at).load(left)
        b = x_s.index(at).permute([1, 0]).load(right)
        to, k = (step + S - 1) % S, (step + S - 1) * K
        real_1K = (k + k_K < H)[None, :]
        async_copy.async_copy_global_to_shared(w_s.index(to), weight_RK + k, mask=real_R1 & real_1K, eviction_policy=EVICT)
        async_copy.async_copy_global_to_shared(x_s.index(to), x_MK + k, mask=real_M1 & real_1K)
        async_copy.commit_group()
        acc = mma_v2(a, b, acc)
    async_copy.wait_group(0)
    r_R = gl.arange(0, R, layout=gl.SliceLayout(1, mma))
    n_R = (gl.program_id(0) * (R // 16) + r_R // 16) * ROWS + r_R % 16
    m_M = gl.arange(0, M, layout=gl.SliceLayout(0, mma))
    real_R = (n_R < outputs) & (r_R % 16 < ROWS)
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + n_R, real_R, other=0).to(gl.float32)[:, None]
    gl.store(out_ptr + m_M[None, :] * outputs + n_R[:, None], acc.to(out_ptr.dtype.element_ty), real_R[:, None] & (m_M < tokens)[None, :])


@triton.jit
def norm_first_kernel(x_ptr, rows_ptr, weight_ptr, sum_ptr, norm_ptr, eps, H: tl.constexpr, HP: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    h_H = tl.arange(0, HP)
    real_H = h_H < H
    weight_H = tl.load(weight_ptr + h_H, real_H, other=0).to(tl.float32)
    if FIRST:
        next_may_begin(PDL)
    after_previous(PDL)
    if not FIRST:
        next_may_begin(PDL)
    x_H = tl.load(x_ptr + t * H + h_H, real_H, other=0)
    add_H = tl.zeros([HP], tl.float32) + tl.load(rows_ptr + t * H + h_H, real_H, other=0).to(tl.float32)
    x_H = (x_H.to(tl.float32) + add_H.to(x_H.dtype).to(tl.float32)).to(x_H.dtype)
    wide_H = x_H.to(tl.float32)
    norm_H = wide_H * tl.rsqrt(tl.sum(wide_H * wide_H, 0) / H + eps) * weight_H
    tl.store(sum_ptr + t * H + h_H, x_H, real_H)
    tl.store(norm_ptr + t * H + h_H, norm_H.to(x_H.dtype), real_H)
