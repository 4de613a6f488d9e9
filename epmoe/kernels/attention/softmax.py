"""What attention's kernels share: the running softmax, the rotation, the rows of the cache.

Letters: T tokens of a step · B sequences that decode · P spans (prompts, or pieces of them) · J key/value
heads · E = J·G query heads · D head dimension · F = D/2 · R rows of a layer's cache · in a program: M rows of a query
tile, N positions of a block · a span is (first token, last token + 1, cached positions, sequence).

All query heads of a key/value head stand in one tile, so that its keys and values are read once: row m of a tile is
query head m % GP of token m // GP, where GP is G rounded up to a power of two.

**Softmax.** Everything is float32 in base 2: a weight is 2^(q·k · log2(e)/√D − maximum), and the sum is that of the
weights as they are multiplied, rounded. A state is (maximum, sum, output). It starts at a finite maximum below every
score: a row that has not met a position yet stays (LOWEST, 0, 0) without making NaN, and a block, or a split, in which
a row sees nothing leaves its state as it is, bit for bit.

**Order.** A query's bits follow from its history alone: from its position and what it sees, in a decode as in a
prefill, whatever stands beside it and however its prompt was cut.

- Blocks are N positions that begin at multiples of N. In one, products are added 16 after 16 by the tensor cores of any
  tile; the sum of weights is such a product too, with a column of ones, since a sum along a tile's row follows the
  tile's layout.
- Splits are SPLIT positions that begin at multiples of SPLIT; a window of no more is one split. The blocks of a split
  are taken upwards into a state of its own, and the splits' states upwards into one that begins with the sink: a weight
  of 1 and no value. A prefill does so in registers, a decode's splits meet in memory.
- Where a multiplication and the addition after it are one operation, `tl.fma` says so, and the compiler may not choose
  (launch.py, AS_WRITTEN).
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)
LOG2E = tl.constexpr(1.4426950408889634)
ONES = tl.constexpr(8)  # columns of the product that sums weights, all alike: the fewest of a tensor core's


@triton.jit
def nothing(M: tl.constexpr, DP: tl.constexpr):
    """The state of rows that have met no position: maximum [M], sum [M, ONES], output [M, DP]."""
    sum_MX = tl.zeros([M, ONES], tl.float32)
    return tl.full([M], LOWEST, tl.float32), sum_MX, tl.zeros([M, DP], tl.float32)


@triton.jit
def take(score_MN, v_ND, scale, top_M, sum_MX, acc_MD):
    """Take a block of positions into a state; q·k of what a row does not see is -inf."""
    above_M = tl.maximum(top_M, tl.max(score_MN, 1) * scale)
    weight_MN = tl.exp2(tl.fma(score_MN, scale, -above_M[:, None])).to(v_ND.dtype)
    shrink_M1 = tl.exp2(top_M - above_M)[:, None]
    one_NX = tl.full([v_ND.shape[0], ONES], 1.0, v_ND.dtype)
    sum_MX = tl.dot(weight_MN, one_NX, sum_MX * shrink_M1, input_precision="ieee")
    acc_MD = tl.dot(weight_MN, v_ND, acc_MD * shrink_M1, input_precision="ieee")
    return above_M, sum_MX, acc_MD


@triton.jit
def begin_with(sink_ptr, head_M, real_M, DP: tl.constexpr):
    """What splits are joined to: (the sink's logit [M], 1 [M], 0 [M, DP])."""
    sink_M = tl.load(sink_ptr + head_M, real_M, other=0).to(tl.float32) * LOG2E
    return sink_M, tl.full(sink_M.shape, 1.0, tl.float32), tl.zeros([sink_M.shape[0], DP], tl.float32)


@triton.jit
def join(top_M, total_M, out_MD, split_top_M, split_sum_M, split_MD):
    """The next split's state joined to that of all before it."""
    above_M = tl.maximum(top_M, split_top_M)
    shrink_M, weight_M = tl.exp2(top_M - above_M), tl.exp2(split_top_M - above_M)
    total_M = tl.fma(total_M, shrink_M, split_sum_M * weight_M)
    out_MD = tl.fma(out_MD, tl.broadcast_to(shrink_M[:, None], out_MD.shape), split_MD * weight_M[:, None])
    return above_M, total_M, out_MD


@triton.jit
def finish(to_MD, real_MD, total_M, out_MD):
    """Divide, round and store."""
    tl.store(to_MD, (out_MD * (1.0 / total_M)[:, None]).to(to_MD.dtype.element_ty), real_MD)


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
    page = tl.load(table_ptr + sequence.to(tl.int64) * table_stride + position // PAGE).to(tl.int64)
    return page * PAGE + position % PAGE
