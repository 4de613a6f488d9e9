import triton, triton.language as tl
from epmoe.kernels.gpu import after_previous, next_may_begin
from epmoe.kernels.norm import _add_norm

@triton.jit
def router_kernel(x_ptr, rows_ptr, weight_ptr, linear_ptr, bias_ptr, sum_ptr, norm_ptr, out_ptr, eps,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, B: tl.constexpr, HP: tl.constexpr, S: tl.constexpr, PRE: tl.constexpr, FIRST: tl.constexpr, SIDE: tl.constexpr, PDL: tl.constexpr):
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h_H = tl.arange(0, HP)
    real_H = h_H < H
    C: tl.constexpr = HP // S
    h_SC = tl.arange(0, S)[:, None] * C + tl.arange(0, C)[None, :]
    e_B = b * B + tl.arange(0, B)
    if SIDE == 0:  # weights are the left operand
        real = (e_B < E)[None, :, None] & (h_SC < H)[:, None, :]
        w = tl.load(linear_ptr + e_B[None, :, None] * H + h_SC[:, None, :], real, other=0)
        if PRE:
            part = tl.dot(w, tl.zeros([S, C, 8], w.dtype))
    else:
        real = (e_B < E)[None, None, :] & (h_SC < H)[:, :, None]
        w = tl.load(linear_ptr + e_B[None, None, :] * H + h_SC[:, :, None], real, other=0)
        if PRE:
            part = tl.dot(tl.zeros([S, 16, C], w.dtype), w)
    if FIRST:
        next_may_begin(PDL)
    sum_H, norm_H = _add_norm(x_ptr, rows_ptr, weight_ptr, t, h_H, real_H, eps, H, K, HP, PDL)
    if b == 0:
        tl.store(sum_ptr + t * H + h_H, sum_H, real_H)
        tl.store(norm_ptr + t * H + h_H, norm_H, real_H)
    if SIDE == 0:
        x = tl.broadcast_to(tl.reshape(norm_H, [S, C])[:, :, None], [S, C, 8])
        if PRE:
            part = tl.dot(w, x, part)
        else:
            part = tl.dot(w, x)
        part_SB = tl.sum(tl.where(tl.arange(0, 8)[None, None, :] == 0, part, 0.0), 2)
    else:
        x = tl.broadcast_to(tl.reshape(norm_H, [S, C])[:, None, :], [S, 16, C])
        if PRE:
            part = tl.dot(x, w, part)
        else:
            part = tl.dot(x, w)
        part_SB = tl.sum(tl.where(tl.arange(0, 16)[None, :, None] == 0, part, 0.0), 1)
    if S == 8:
        out_B = in_order(tl.trans(part_SB), B)
    else:
        low, high = tl.split(tl.trans(tl.reshape(part_SB, [2, 8, B]), 1, 2, 0))
        out_B = in_order2(tl.trans(low), tl.trans(high), B)
    if bias_ptr is not None:
        out_B += tl.load(bias_ptr + e_B, e_B < E, other=0).to(tl.float32)
    tl.store(out_ptr + t * E + e_B, out_B.to(out_ptr.dtype.element_ty), e_B < E)

@triton.jit
def parts8(part_B8, B: tl.constexpr):
    even, odd = tl.split(tl.reshape(part_B8, [B, 4, 2]))
    p04, p26 = tl.split(tl.reshape(even, [B, 2, 2]))
    p15, p37 = tl.split(tl.reshape(odd, [B, 2, 2]))
    p0, p4 = tl.split(p04)
    p1, p5 = tl.split(p15)
    p2, p6 = tl.split(p26)
    p3, p7 = tl.split(p37)
    return p0, p1, p2, p3, p4, p5, p6, p7

@triton.jit
def in_order(part_B8, B: tl.constexpr):
    p0, p1, p2, p3, p4, p5, p6, p7 = parts8(part_B8, B)
    return ((((((p0 + p1) + p2) + p3) + p4) + p5) + p6) + p7

@triton.jit
def in_order2(low_B8, high_B8, B: tl.constexpr):
    p0, p1, p2, p3, p4, p5, p6, p7 = parts8(high_B8, B)
    return (((((((in_order(low_B8, B) + p0) + p1) + p2) + p3) + p4) + p5) + p6) + p7


@triton.jit(do_not_specialize=["tokens"])
def runs_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, tokens, outputs,
    H: tl.constexpr, HP: tl.constexpr, S: tl.constexpr, R: tl.constexpr, M: tl.constexpr, CK: tl.constexpr, PDL: tl.constexpr):
    """S runs side by side."""
    C: tl.constexpr = HP // S
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    t_M = tl.program_id(1) * M + tl.arange(0, M)
    h_SC = tl.arange(0, S)[:, None] * C + tl.arange(0, CK)[None, :]
    w_ptrs = weight_ptr + n_R[None, :, None] * H + h_SC[:, None, :]
    x_ptrs = x_ptr + t_M[None, None, :].to(tl.int64) * H + h_SC[:, :, None]
    after_previous(PDL)
    next_may_begin(PDL)
    part = tl.zeros([S, R, M], tl.float32)
    for c in range(0, C, CK):
        w = tl.load(w_ptrs + c, (n_R < outputs)[None, :, None] & (h_SC + c < H)[:, None, :], other=0)
        x = tl.load(x_ptrs + c, (t_M < tokens)[None, None, :] & (h_SC + c < H)[:, :, None], other=0)
        part = tl.dot(w, x, part)
    if S == 8:
        sum_N = in_order(tl.reshape(tl.trans(part, 1, 2, 0), [R * M, 8]), R * M)
    else:
        low, high = tl.split(tl.trans(tl.reshape(part, [2, 8, R * M]), 1, 2, 0))
        sum_N = in_order2(tl.trans(low), tl.trans(high), R * M)
    sum_RM = tl.reshape(sum_N, [R, M])
    if bias_ptr is not None:
        sum_RM += tl.load(bias_ptr + n_R, n_R < outputs, other=0).to(tl.float32)[:, None]
    tl.store(out_ptr + t_M[None, :].to(tl.int64) * outputs + n_R[:, None], sum_RM.to(out_ptr.dtype.element_ty), (n_R < outputs)[:, None] & (t_M < tokens)[None, :])
