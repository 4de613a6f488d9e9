"""The product of a step's rows with a weight, in one order of summation for any number of rows; in Triton.

    out[t] = (((+0 + p₀) + p₁) + …) + bias        p: the products of 16 columns, which a tensor core adds at once

A tile goes along the columns upwards, with one accumulator, whatever its size. So a row's bits depend neither on how
many rows come with it nor on which part of the weight a program, or a rank, has. A library's product has exactly these
bits where it does not split the columns (library.py).

Letters: T rows · H columns · N outputs · in a program: R outputs (rows of the weight), M rows of x, K columns of a step.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.gpu import after_previous, next_may_begin


@triton.jit(do_not_specialize=["tokens"])
def product_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [N, H]
    bias_ptr,  # [N], or None
    out_ptr,  # out [T, N], rows `stride` apart
    tokens,  # T
    first,
    outputs,  # N
    stride,
    H: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,  # columns of a run, a multiple of K; 0: all are one
    PDL: tl.constexpr,
):
    """Program (n, m): outputs first + n·R … of the tokens m·M …"""
    n_R = first + tl.program_id(0) * R + tl.arange(0, R)
    t_M, k_K = tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, K)
    real_R, real_M = n_R < outputs, t_M < tokens
    weight_RK = weight_ptr + n_R.to(tl.int64)[:, None] * H + k_K[None, :]
    x_MK = x_ptr + t_M.to(tl.int64)[:, None] * H + k_K[None, :]
    after_previous(PDL)
    next_may_begin(PDL)
    sum_RM = tl.zeros([R, M], tl.float32)
    total_RM = tl.zeros([R, M], tl.float32)
    for k in range(0, H, K):
        real_K = k + k_K < H
        w_RK = tl.load(weight_RK + k, real_R[:, None] & real_K[None, :], other=0)
        t_MK = tl.load(x_MK + k, real_M[:, None] & real_K[None, :], other=0)
        sum_RM = tl.dot(w_RK, tl.trans(t_MK), sum_RM, input_precision="ieee")  # of float32 operands; bf16's are exact
        if RUN:
            ends = (k + K) % RUN == 0
            total_RM = tl.where(ends, total_RM + sum_RM, total_RM)
            sum_RM = tl.where(ends, 0.0, sum_RM)
    sum_RM += total_RM
    if bias_ptr is not None:
        sum_RM += tl.load(bias_ptr + n_R, real_R, other=0).to(tl.float32)[:, None]
    at_RM = out_ptr + t_M[None, :].to(tl.int64) * stride + n_R[:, None]
    tl.store(at_RM, sum_RM.to(out_ptr.dtype.element_ty), real_R[:, None] & real_M[None, :])
