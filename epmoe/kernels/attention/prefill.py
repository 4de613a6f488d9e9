"""Prefill: spans, prompts or pieces of them. Their keys and values are put into place, then they attend.

Letters: softmax.py. Q tokens of a tile.

The place is where every position that a span's tokens see has one row, cached or new. A full layer's pages are it: they
never forget. A ring does, so the spans of a layer with a window W get rows of a scratch, W cached ones before each
span's own: position p of the s-th span, whose tokens start at `begin`, has the row p − cached + begin + (s + 1)·W.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.attention.softmax import begin_with, finish, join, nothing, rotated, row, take

_LANES = tl.constexpr(32)


@triton.jit(do_not_specialize=["spans", "table_stride", "place_rows"])
def place_kernel(
    k_ptr,  # [T, J, D], not rotated; rows k_stride apart
    v_ptr,  # [T, J, D]
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    old_key_ptr,  # [J, R, D]: a ring
    old_value_ptr,  # [J, R, D]
    key_ptr,  # out [J, place_rows, D]: the cache, or a ring's scratch
    value_ptr,  # out [J, place_rows, D]
    k_stride,
    v_stride,
    span_ptr,  # int32 [P, 4]
    spans,  # P
    table_ptr,  # int32 [sequences, pages], rows table_stride apart; None for a ring
    table_stride,
    cache_rows,  # R
    place_rows,
    J: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,  # rows of a page; of the whole ring when there is no table
    WINDOW: tl.constexpr,  # 0: none
    M: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
):
    """Program (tile, j): M tokens of a span, the keys rotated; with a window, the W cached ones before them too."""
    tile, j = tl.program_id(0), tl.program_id(1)
    first, stop, cached, sequence, origin, span = _find_span(span_ptr, tile, spans, M, WINDOW)
    if span == spans:
        return
    base = (span + 1) * WINDOW - origin
    token_M = first + tl.arange(0, M)
    d_D = tl.arange(0, DP)
    position_M = token_M + origin
    new_MD = ((token_M < stop) & (position_M >= cached))[:, None] & (d_D < D)[None, :]
    at_MD = token_M[:, None] * (D // 2) + (d_D % (D // 2))[None, :]
    cos_MD = tl.load(cos_ptr + at_MD, new_MD, other=0)
    sin_MD = tl.load(sin_ptr + at_MD, new_MD, other=0)
    from_M1 = token_M.to(tl.int64)[:, None]
    k_MD = rotated(k_ptr + from_M1 * k_stride + j * D, cos_MD, sin_MD, new_MD, D, DP)
    v_MD = tl.load(v_ptr + from_M1 * v_stride + j * D + d_D[None, :], new_MD, other=0)
    real_MD = new_MD
    if WINDOW:
        old_MD = ((position_M >= 0) & (position_M < cached))[:, None] & (d_D < D)[None, :]
        ring_M = j * cache_rows.to(tl.int64) + row(None, sequence, position_M, 0, PAGE)
        from_MD = ring_M[:, None] * D + d_D[None, :]
        k_MD = tl.where(new_MD, k_MD, tl.load(old_key_ptr + from_MD, old_MD, other=0))
        v_MD = tl.where(new_MD, v_MD, tl.load(old_value_ptr + from_MD, old_MD, other=0))
        real_MD = new_MD | old_MD
    known_M = tl.minimum(tl.maximum(token_M, 0), stop - 1) + origin if not WINDOW else position_M
    to_M = j * place_rows.to(tl.int64) + _place(table_ptr, sequence, known_M, base, table_stride, PAGE)
    tl.store(key_ptr + to_M[:, None] * D + d_D[None, :], k_MD, real_MD)
    tl.store(value_ptr + to_M[:, None] * D + d_D[None, :], v_MD, real_MD)


@triton.jit(do_not_specialize=["spans", "table_stride", "place_rows"])
def prefill_kernel(
    q_ptr,  # [T, E, D], not rotated; rows q_stride apart
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    key_ptr,  # [J, place_rows, D], as place_kernel left it
    value_ptr,  # [J, place_rows, D]
    ring_key_ptr,  # out [J, R, D]; with a window only
    ring_value_ptr,  # out [J, R, D]
    sink_ptr,  # [E]
    out_ptr,  # out [T, E, D]: rows of the spans
    q_stride,
    scale,  # log2(e)/√D
    span_ptr,  # int32 [P, 4]
    spans,  # P
    table_ptr,  # int32 [sequences, pages], rows table_stride apart; None for a ring
    table_stride,
    cache_rows,  # R
    place_rows,
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
):
    """Program (tile, j): Q = M // GP tokens of a span attend to [cached | the span's own tokens up to themselves].

    With a window it also takes those of its tokens that the ring keeps from the scratch to the ring, which nobody reads
    in this launch.
    """
    # Later tiles of a span have more to do: they start first.
    tile, j = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first, stop, _, sequence, origin, span = _find_span(span_ptr, tile, spans, M // GP, 0)
    if span == spans:
        return
    base = (span + 1) * WINDOW - origin
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

    # Blocks: from the first position that a row sees; from `cut` on, some rows do not see all of a block.
    begin, cut = 0, (first + origin + 1) // N * N
    if WINDOW:
        begin = tl.maximum(first + origin - WINDOW + 1, 0)
    end = tl.minimum(first + M // GP, stop) + origin
    head_key_ptr = key_ptr + j * place_rows.to(tl.int64) * D
    head_value_ptr = value_ptr + j * place_rows.to(tl.int64) * D
    SINGLE: tl.constexpr = WINDOW > 0 and WINDOW <= SPLIT
    top_M, sum_MX, acc_MD = nothing(M, DP)
    whole_top_M, total_M, out_MD = begin_with(sink_ptr, head_M, real_M, DP)
    # Positions outside begin : end stand for the nearest inside: other rows may hold another sequence's NaN. The table
    # is read a block ahead, as in decode.
    position_N = tl.minimum(tl.maximum(begin // N * N + n_N, begin), end - 1)
    row_N = _place(table_ptr, sequence, position_N, base, table_stride, PAGE)
    for start in range(begin // N * N, end, N):
        # At a block's beginning: at its end the tensor cores would wait for what is in flight (ptxas: "serialized").
        if SINGLE:
            pass
        elif (start % SPLIT == 0) & (start > 0):
            split_M = tl.max(sum_MX, 1)
            whole_top_M, total_M, out_MD = join(whole_top_M, total_M, out_MD, top_M, split_M, acc_MD)
            top_M, sum_MX, acc_MD = nothing(M, DP)
        at_ND = row_N.to(tl.int64)[:, None] * D + d_D[None, :]
        row_N = _place(table_ptr, sequence, tl.minimum(start + N + n_N, end - 1), base, table_stride, PAGE)
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

    if WINDOW:
        token_Q = first + tl.arange(0, M // GP)
        kept_QD = ((token_Q < stop) & (token_Q >= stop - WINDOW))[:, None] & (d_D < D)[None, :]
        from_QD = (token_Q + origin + base).to(tl.int64)[:, None] * D + d_D[None, :]
        to_Q = j * cache_rows.to(tl.int64) + row(None, sequence, token_Q + origin, 0, PAGE)
        to_QD = to_Q[:, None] * D + d_D[None, :]
        tl.store(ring_key_ptr + to_QD, tl.load(head_key_ptr + from_QD, kept_QD, other=0), kept_QD)
        tl.store(ring_value_ptr + to_QD, tl.load(head_value_ptr + from_QD, kept_QD, other=0), kept_QD)


@triton.jit
def _rows(pointer_ND, d_D, D: tl.constexpr, DP: tl.constexpr):
    """Load [N, D], 0 beyond D."""
    if D == DP:
        return tl.load(pointer_ND)
    else:
        return tl.load(pointer_ND, (d_D < D)[None, :], other=0)


@triton.jit
def _place(table_ptr, sequence, position, base, table_stride, PAGE: tl.constexpr):
    """int32, the row of each position that place_kernel has filled."""
    if table_ptr is None:
        return position + base
    else:
        page = tl.load(table_ptr + sequence.to(tl.int64) * table_stride + position // PAGE)
        return page * PAGE + position % PAGE


@triton.jit
def _find_span(span_ptr, tile, spans, TOKENS: tl.constexpr, BEFORE: tl.constexpr):
    """The tile-th run of TOKENS tokens, where each span that is not empty has BEFORE tokens more in front of it.

    Returns:
        (the run's first token, the span's end, cached, sequence, position − token, which span); there is no such run
        where the last is `spans`, and the others mean nothing then
    """
    # As many spans at a time as a warp has lanes: each warp finds it by itself, and no length is compiled in.
    span, passed, total = 0, 0, 0
    for some in range(0, spans, _LANES):
        span_P = some + tl.arange(0, _LANES)
        begin_P = tl.load(span_ptr + 4 * span_P, span_P < spans, other=0)
        end_P = tl.load(span_ptr + 4 * span_P + 1, span_P < spans, other=0)
        tiles_P = tl.where(end_P > begin_P, (end_P - begin_P + BEFORE + TOKENS - 1) // TOKENS, 0)
        passed_P = total + tl.cumsum(tiles_P, 0) <= tile
        total += tl.sum(tiles_P, 0)
        span += tl.sum((passed_P & (span_P < spans)).to(tl.int32), 0)
        passed += tl.sum(tl.where(passed_P, tiles_P, 0), 0)
    real_ptr = span_ptr + 4 * tl.minimum(span, spans - 1)
    begin, stop = tl.load(real_ptr), tl.load(real_ptr + 1)
    cached, sequence = tl.load(real_ptr + 2), tl.load(real_ptr + 3)
    origin = cached - begin
    return begin - BEFORE + (tile - passed) * TOKENS, stop, cached, sequence, origin, span
