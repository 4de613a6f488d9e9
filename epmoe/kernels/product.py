"""The product of a step's rows with a weight, in one order of summation for any number of rows; in Triton.

    out[t] = (((+0 + p₀) + p₁) + …) + bias        p: the products of 16 columns, which a tensor core adds at once

A tile goes along the columns upwards, with one accumulator, whatever its size. So a row's bits depend neither on how
many rows come with it nor on which part of the weight a program, or a rank, has. few.py does the same for very few
rows, and a library's product has exactly these bits where it does not split the columns (vendor.py).

A product of few outputs is summed in runs (runs.py); with many rows a tile makes one run after the other.

Letters: T rows · H columns · N outputs · in a program: R outputs (rows of the weight), M rows of x, K columns of a
step.
"""

# mypy: disallow-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from epmoe.kernels.gpu import after_previous, early, next_may_begin


class Tile(NamedTuple):
    """What a program works on, and how."""

    rows: int  # of the weight: outputs
    tokens: int
    depth: int  # columns of a step
    warps: int
    stages: int

    @classmethod
    def parse(cls, name: str) -> "Tile":
        """The inverse of str(): "64x16x128x4x6"."""
        return cls(*map(int, name.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, self))


def tiled(
    x_TH: torch.Tensor,
    weight_NH: torch.Tensor,
    bias_N: torch.Tensor | None,
    tile: Tile,
    out_TN: torch.Tensor | None = None,
    run: int = 0,
) -> torch.Tensor:
    """x · weightᵀ + bias: [T, N] in x's dtype, or rounded once to that of `out`; one launch.

    Args:
        out_TN: to write into; its rows may stand apart by any stride.
        run: columns of a run, a multiple of the tile's depth; 0: all are one.
    """
    (tokens, hidden), outputs = x_TH.shape, len(weight_NH)
    if out_TN is None:
        out_TN = x_TH.new_empty(tokens, outputs)
    assert weight_NH.shape[1] == hidden and out_TN.shape == (tokens, outputs) and out_TN.stride(1) == 1
    assert x_TH.is_contiguous() and weight_NH.is_contiguous() and x_TH.dtype == weight_NH.dtype
    assert bias_N is None or (bias_N.shape == (outputs,) and bias_N.is_contiguous())
    assert run % tile.depth == 0, (run, tile)
    if tokens:
        product_kernel[(triton.cdiv(outputs, tile.rows), triton.cdiv(tokens, tile.tokens))](
            x_TH,
            weight_NH,
            bias_N,
            out_TN,
            tokens,
            outputs,
            out_TN.stride(0),
            H=hidden,
            R=tile.rows,
            M=tile.tokens,
            K=tile.depth,
            RUN=run,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **early(x_TH.device),
        )
    return out_TN


@triton.jit(do_not_specialize=["tokens"])
def product_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [N, H]
    bias_ptr,  # [N], or None
    out_ptr,  # out [T, N], rows `stride` apart
    tokens,  # T
    outputs,  # N
    stride,
    H: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (n, m): outputs n·R … of the rows m·M …"""
    n_R, t_M = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * M + tl.arange(0, M)
    k_K = tl.arange(0, K)
    real_R, real_M = n_R < outputs, t_M < tokens
    weight_RK = weight_ptr + n_R.to(tl.int64)[:, None] * H + k_K[None, :]
    x_MK = x_ptr + t_M.to(tl.int64)[:, None] * H + k_K[None, :]
    bias_R = tl.zeros([R], tl.float32)
    if bias_ptr is not None:
        bias_R = tl.load(bias_ptr + n_R, real_R, other=0).to(tl.float32)
    after_previous(PDL)
    next_may_begin(PDL)
    sum_RM, runs_RM = tl.zeros([R, M], tl.float32), tl.zeros([R, M], tl.float32)
    # Twice at least: of a loop that runs once the compiler makes a product that begins with the bias, and so rounds
    # otherwise.
    for k in range(0, H if H > K else K + 1, K):
        real_K = k + k_K < H
        w_RK = tl.load(weight_RK + k, real_R[:, None] & real_K[None, :], other=0)
        t_MK = tl.load(x_MK + k, real_M[:, None] & real_K[None, :], other=0)
        sum_RM = tl.dot(w_RK, tl.trans(t_MK), sum_RM, input_precision="ieee")  # of float32 operands; bf16's are exact
        if RUN:
            ends = (k + K) % RUN == 0
            runs_RM = tl.where(ends, runs_RM + sum_RM, runs_RM)
            sum_RM = tl.where(ends, 0.0, sum_RM)
    if RUN:
        sum_RM = runs_RM + sum_RM
    at_RM = out_ptr + t_M[None, :].to(tl.int64) * stride + n_R[:, None]
    tl.store(at_RM, (sum_RM + bias_R[:, None]).to(out_ptr.dtype.element_ty), real_R[:, None] & real_M[None, :])
