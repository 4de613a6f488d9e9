"""What attention's kernels share: the running softmax, the rotation, the rows of the cache.

Letters: T tokens of a step · B sequences that decode · P spans (prompts, or pieces of them) · J key/value
heads · E = J·G query heads · D head dimension · F = D/2 · R rows of a layer's cache · in a program: M rows of a query
tile, N positions of a block · a span is (first token, last token + 1, cached positions, sequence).

All query heads of a key/value head stand in one tile, so that its keys and values are read once: row m of a tile is
query head m % GP of token m // GP, where GP is G rounded up to a power of two.

**Softmax.** Everything is float32 in base 2: a weight is 2^(q·k · log2(e)/√D − maximum). The running maximum starts at
a finite number below every score: a row that has not met a position yet stays (LOWEST, 0, 0) without making NaN, and a
block in which a row may see nothing leaves its maximum, sum and output as they are, bit for bit.

**Order.** Nothing here depends on the batch. Decode: a sequence is cut every SPLIT positions from the first one that
it sees, each split runs through its blocks upwards, and the splits are combined upwards in groups of S. Prefill: a row
meets blocks of N positions that start at multiples of N, whatever its chunk, its tile and the other rows are; so the
chunks that a prompt comes in do not change a bit either.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def take(score_MN, v_ND, scale, top_M, sum_M, acc_MD):
    """Take N more positions into the running (maximum, sum, output); q·k of what a row does not see is -inf."""
    above_M = tl.maximum(top_M, tl.max(score_MN, 1) * scale)
    weight_MN = tl.exp2(tl.fma(score_MN, scale, -above_M[:, None]))
    shrink_M = tl.exp2(top_M - above_M)
    sum_M = tl.fma(sum_M, shrink_M, tl.sum(weight_MN, 1))
    acc_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision="ieee")
    return above_M, sum_M, acc_MD


@triton.jit
def finish(sink_ptr, to_MD, head_M, real_M, real_MD, top_M, sum_M, acc_MD):
    """The sink joins the denominator; divide, round and store."""
    sink_M = tl.load(sink_ptr + head_M, real_M, other=0).to(tl.float32) * LOG2E
    above_M = tl.maximum(top_M, sink_M)
    shrink_M = tl.exp2(top_M - above_M)
    total_M = sum_M * shrink_M + tl.exp2(sink_M - above_M)
    out_MD = acc_MD * (shrink_M / total_M)[:, None]
    tl.store(to_MD, out_MD.to(to_MD.dtype.element_ty), real_MD)


@triton.jit
def rotated(row_ptr, cos_MD, sin_MD, real_MD, D: tl.constexpr, DP: tl.constexpr):
    """Load [M, D] and turn the pairs (d, d + D/2); in float32, rounded once. `row_ptr` is a column of rows."""
    d_D = tl.arange(0, DP)
    low_D = d_D < D // 2
    other_D = tl.where(low_D, d_D + D // 2, d_D - D // 2)
    own_MD = tl.load(row_ptr + d_D[None, :], real_MD, other=0)
    other_MD = tl.load(row_ptr + other_D[None, :], real_MD, other=0).to(tl.float32)
    turned_MD = tl.where(low_D[None, :], -other_MD, other_MD) * sin_MD
    return (own_MD.to(tl.float32) * cos_MD + turned_MD).to(own_MD.dtype)


@triton.jit
def row(table_ptr, sequence, position, table_stride, PAGE: tl.constexpr):
    """int64, the cache's row of each position (cache.py)."""
    page = sequence.to(tl.int64)
    if table_ptr is not None:
        page = tl.load(table_ptr + page * table_stride + position // PAGE).to(tl.int64)
    return page * PAGE + position % PAGE
