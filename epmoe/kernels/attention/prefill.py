"""Prefill: spans, prompts or pieces of them. Their keys and values are put into place, then they attend.

Letters: softmax.py. Q tokens of a tile; a run is up to so many tokens of one span that a program takes.

The place is the pages of their sequences, which have a row for every position that a span's tokens see.

A graph's grids have programs for the most runs that a step may have, which is more than it has: those of real runs come
first, since a program takes its place on the machine even if it finds nothing to do. Which run is whose is found out
once a step, not in every layer.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.attention.softmax import begin_with, finish, join, nothing, rotated, take
from epmoe.kernels.gpu import after_previous, next_may_begin

_LANES = tl.constexpr(32)


@triton.jit(do_not_specialize=["spans", "most"])
def find_runs_kernel(
    span_ptr,  # int32 [P, 4]
    spans,  # P
    run_ptr,  # out int32 [2, most, 4]: first token, the span's end, sequence, position − token; 0 where none is
    most,
    PLACING: tl.constexpr,  # tokens of a run of place_kernel, kind 0
    ATTENDING: tl.constexpr,  # of prefill_kernel, kind 1
):
    """Program (r, kind): run r of all spans' into the place that is as far from the last run's.

    So they stand in reverse: the last runs of a span have most to do in a prefill.
    """
    r, kind = tl.program_id(0), tl.program_id(1)
    size = tl.where(kind == 0, PLACING, ATTENDING)
    # As many spans at a time as a warp has lanes: no length is compiled in.
    span, passed, total = 0, 0, 0
    for some in range(0, spans, _LANES):
        span_P = some + tl.arange(0, _LANES)
        begin_P = tl.load(span_ptr + 4 * span_P, span_P < spans, other=0)
        end_P = tl.load(span_ptr + 4 * span_P + 1, span_P < spans, other=0)
        runs_P = tl.where(end_P > begin_P, (end_P - begin_P + size - 1) // size, 0)
        passed_P = total + tl.cumsum(runs_P, 0) <= r
        total += tl.sum(runs_P, 0)
        span += tl.sum((passed_P & (span_P < spans)).to(tl.int32), 0)
        passed += tl.sum(tl.where(passed_P, runs_P, 0), 0)
    real_ptr = span_ptr + 4 * tl.minimum(span, spans - 1)
    begin, stop = tl.load(real_ptr), tl.load(real_ptr + 1)
    cached, sequence = tl.load(real_ptr + 2), tl.load(real_ptr + 3)
    real = span < spans
    to_ptr = run_ptr + 4 * (kind * most + tl.where(real, total - 1 - r, r))
    tl.store(to_ptr, tl.where(real, begin + (r - passed) * size, 0))
    tl.store(to_ptr + 1, tl.where(real, stop, 0))
    tl.store(to_ptr + 2, tl.where(real, sequence, 0))
    tl.store(to_ptr + 3, tl.where(real, cached - begin, 0))


@triton.jit(do_not_specialize=["table_stride"])
def place_kernel(
    k_ptr,  # [T, J, D], not rotated; rows k_stride apart
    v_ptr,  # [T, J, D]
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    key_ptr,  # out [J, R, D]
    value_ptr,  # out [J, R, D]
    k_stride,
    v_stride,
    run_ptr,  # int32 [runs, 4], as find_runs_kernel left it
    table_ptr,  # int32 [sequences, pages], rows table_stride apart
    table_stride,
    cache_rows,  # R
    J: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,  # rows of a page
    M: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    PDL: tl.constexpr,
):
    """Program run · J + j: M tokens of a span, the keys rotated."""
    after_previous(PDL)
    next_may_begin(PDL)  # queries have come with the keys: theirs are read before these have their places
    j = tl.program_id(0) % J  # not a dimension of its own: only the first one may have more than 65,535
    first, stop, sequence, origin = _run(run_ptr, tl.program_id(0) // J)
    if first == stop:
        return
    token_M = first + tl.arange(0, M)
    d_D = tl.arange(0, DP)
    real_MD = (token_M < stop)[:, None] & (d_D < D)[None, :]
    at_MD = token_M[:, None] * (D // 2) + (d_D % (D // 2))[None, :]
    cos_MD = tl.load(cos_ptr + at_MD, real_MD, other=0)
    sin_MD = tl.load(sin_ptr + at_MD, real_MD, other=0)
    known_M = tl.minimum(token_M, stop - 1) + origin
    to_M = j * cache_rows.to(tl.int64) + _place(table_ptr, sequence, known_M, table_stride, PAGE)
    from_M1 = token_M.to(tl.int64)[:, None]
    k_MD = rotated(k_ptr + from_M1 * k_stride + j * D, cos_MD, sin_MD, real_MD, D, DP)
    v_MD = tl.load(v_ptr + from_M1 * v_stride + j * D + d_D[None, :], real_MD, other=0)
    tl.store(key_ptr + to_M[:, None] * D + d_D[None, :], k_MD, real_MD)
    tl.store(value_ptr + to_M[:, None] * D + d_D[None, :], v_MD, real_MD)


@triton.jit(do_not_specialize=["table_stride"])
def prefill_kernel(
    q_ptr,  # [T, E, D], not rotated; rows q_stride apart
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    key_ptr,  # [J, R, D], as place_kernel left it
    value_ptr,  # [J, R, D]
    sink_ptr,  # [E]
    out_ptr,  # out [T, E, D]: rows of the spans
    q_stride,
    scale,  # log2(e)/√D
    run_ptr,  # int32 [runs, 4], as find_runs_kernel left it
    table_ptr,  # int32 [sequences, pages], rows table_stride apart
    table_stride,
    cache_rows,  # R
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program run · J + j: Q = M // GP tokens of a span attend to [cached | the span's own tokens up to themselves]."""
    j = tl.program_id(0) % J
    first, stop, sequence, origin = _run(run_ptr, tl.program_id(0) // J)
    if first == stop:
        after_previous(PDL)
        return
    m_M = tl.arange(0, M)
    d_D = tl.arange(0, DP)
    n_N = tl.arange(0, N)
    token_M = first + m_M // GP
    head_M = j * G + m_M % GP
    real_M = (token_M < stop) & (m_M % GP < G)
    real_MD = real_M[:, None] & (d_D < D)[None, :]
    position_M = token_M + origin
    at_MD = token_M[:, None] * (D // 2) + (d_D % (D // 2))[None, :]
    cos_MD = tl.load(cos_ptr + at_MD, real_MD, other=0)
    sin_MD = tl.load(sin_ptr + at_MD, real_MD, other=0)
    from_M = token_M.to(tl.int64) * q_stride + head_M * D
    to_MD = out_ptr + (token_M.to(tl.int64) * (J * G) + head_M)[:, None] * D + d_D[None, :]
    # The rotated queries go by way of their result's place: the compiler feeds the tensor cores from shared memory only
    # with what was loaded. From registers, it makes the products wait for each other (ptxas: "serialized").
    tl.store(to_MD, rotated(q_ptr + from_M[:, None], cos_MD, sin_MD, real_MD, D, DP), real_MD)
    tl.debug_barrier()
    q_MD = tl.load(to_MD, real_MD, other=0)
    after_previous(PDL)

    # Blocks: from the first position that a row sees; from `cut` on, some rows do not see all of a block.
    begin, cut = 0, (first + origin + 1) // N * N
    if WINDOW:
        begin = tl.maximum(first + origin - WINDOW + 1, 0)
    end = tl.minimum(first + M // GP, stop) + origin
    head_key_ptr = key_ptr + j * cache_rows.to(tl.int64) * D
    head_value_ptr = value_ptr + j * cache_rows.to(tl.int64) * D
    SINGLE: tl.constexpr = WINDOW > 0 and WINDOW <= SPLIT
    top_M, sum_MX, acc_MD = nothing(M, DP)
    whole_top_M, total_M, out_MD = begin_with(sink_ptr, head_M, real_M, DP)
    # Positions outside begin : end stand for the nearest inside: other rows may hold another sequence's NaN. The table
    # is read a block ahead, as in decode.
    position_N = tl.minimum(tl.maximum(begin // N * N + n_N, begin), end - 1)
    row_N = _place(table_ptr, sequence, position_N, table_stride, PAGE)
    for start in range(begin // N * N, end, N):
        # At a block's beginning: at its end the tensor cores would wait for what is in flight (ptxas: "serialized").
        if SINGLE:
            pass
        elif (start % SPLIT == 0) & (start > 0):
            split_M = tl.max(sum_MX, 1)
            whole_top_M, total_M, out_MD = join(whole_top_M, total_M, out_MD, top_M, split_M, acc_MD)
            top_M, sum_MX, acc_MD = nothing(M, DP)
        at_ND = row_N.to(tl.int64)[:, None] * D + d_D[None, :]
        row_N = _place(table_ptr, sequence, tl.minimum(start + N + n_N, end - 1), table_stride, PAGE)
        k_ND = _rows(head_key_ptr + at_ND, d_D, D, DP)
        v_ND = _rows(head_value_ptr + at_ND, d_D, D, DP)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        position_N = start + n_N
        if WINDOW:
            seen_MN = position_N[None, :] <= position_M[:, None]
            seen_MN = seen_MN & (position_N[None, :] > position_M[:, None] - WINDOW)
            score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        elif start >= cut:
            score_MN = tl.where(position_N[None, :] <= position_M[:, None], score_MN, float("-inf"))
        top_M, sum_MX, acc_MD = take(score_MN, v_ND, scale, top_M, sum_MX, acc_MD)
    _, total_M, out_MD = join(whole_top_M, total_M, out_MD, top_M, tl.max(sum_MX, 1), acc_MD)
    finish(to_MD, real_MD, total_M, out_MD)


@triton.jit
def _rows(pointer_ND, d_D, D: tl.constexpr, DP: tl.constexpr):
    """Load [N, D], 0 beyond D."""
    if D == DP:
        return tl.load(pointer_ND)
    else:
        return tl.load(pointer_ND, (d_D < D)[None, :], other=0)


@triton.jit
def _place(table_ptr, sequence, position, table_stride, PAGE: tl.constexpr):
    """int32, the row of each position."""
    page = tl.load(table_ptr + sequence.to(tl.int64) * table_stride + position // PAGE)
    return page * PAGE + position % PAGE


@triton.jit
def _run(run_ptr, index):
    """(first token, the span's end, sequence, position − token)."""
    run_ptr += 4 * index
    return tl.load(run_ptr), tl.load(run_ptr + 1), tl.load(run_ptr + 2), tl.load(run_ptr + 3)
