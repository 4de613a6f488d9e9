import triton, triton.language as tl
from epmoe.kernels.gpu import after_previous, next_may_begin
from epmoe.kernels.norm import _add_norm

@triton.jit
def router_kernel(x_ptr, rows_ptr, weight_ptr, linear_ptr, bias_ptr, sum_ptr, norm_ptr, out_ptr, eps,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, B: tl.constexpr, HP: tl.constexpr, M: tl.constexpr, PDL: tl.constexpr):
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h_H = tl.arange(0, HP)
    real_H = h_H < H
    C: tl.constexpr = HP // 8
    h_8C = tl.arange(0, 8)[:, None] * C + tl.arange(0, C)[None, :]
    e_B = b * B + tl.arange(0, B)
    real_8BC = (e_B < E)[None, :, None] & (h_8C < H)[:, None, :]
    linear_8BC = tl.load(linear_ptr + e_B[None, :, None] * H + h_8C[:, None, :], real_8BC, other=0)
    sum_H, norm_H = _add_norm(x_ptr, rows_ptr, weight_ptr, t, h_H, real_H, eps, H, K, HP, PDL)
    if b == 0:
        tl.store(sum_ptr + t * H + h_H, sum_H, real_H)
        tl.store(norm_ptr + t * H + h_H, norm_H, real_H)
    x_8CM = tl.broadcast_to(tl.reshape(norm_H, [8, C])[:, :, None], [8, C, M])
    part_8BM = tl.dot(linear_8BC, x_8CM)
    part_8B = tl.sum(tl.where(tl.arange(0, M)[None, None, :] == 0, part_8BM, 0.0), 2)
    out_B = _in_order(part_8B, B)
    if bias_ptr is not None:
        out_B += tl.load(bias_ptr + e_B, e_B < E, other=0).to(tl.float32)
    tl.store(out_ptr + t * E + e_B, out_B.to(out_ptr.dtype.element_ty), e_B < E)

@triton.jit
def _in_order(part_8B, B: tl.constexpr):
    even, odd = tl.split(tl.reshape(tl.trans(part_8B), [B, 4, 2]))
    p04, p26 = tl.split(tl.reshape(even, [B, 2, 2]))
    p15, p37 = tl.split(tl.reshape(odd, [B, 2, 2]))
    p0, p4 = tl.split(p04)
    p1, p5 = tl.split(p15)
    p2, p6 = tl.split(p26)
    p3, p7 = tl.split(p37)
    return ((((((p0 + p1) + p2) + p3) + p4) + p5) + p6) + p7
