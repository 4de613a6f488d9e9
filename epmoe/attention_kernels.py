"""Attention over the paged cache in Triton: decode in splits, their combination, prefill, and the writes around it.

Letters: T tokens of a step · B sequences that decode · P spans (sequences that bring several tokens) · J key/value
heads · E = J·G query heads · D head dimension · F = D/2 · R rows of a layer's cache · in a program: M rows of a query
tile, N positions of a block, S splits · a span is (first token, last token + 1, cached positions, sequence).

All query heads of a key/value head stand in one tile, so that its keys and values are read once: row m of a tile is
query head m % GP of token m // GP, where GP is G rounded up to a power of two.

**Softmax.** Everything is float32 in base 2: a score is q·k · log2(e)/√D. The running maximum starts at a finite number
below every score: a row that has not met a position yet stays (LOWEST, 0, 0) without making NaN, and a block in which a
row may see nothing leaves its maximum, sum and output as they are, bit for bit.

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


@triton.jit(do_not_specialize=["rows", "table_stride"])
def decode_kernel(
    q_ptr,  # [T, E, D], not rotated; rows q_stride apart
    k_ptr,  # [T, J, D], not rotated
    v_ptr,  # [T, J, D]
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    token_ptr,  # int64 [B]
    position_ptr,  # int64 [B]
    sequence_ptr,  # int64 [B]
    table_ptr,  # int32 [sequences, pages], rows table_stride apart; None for a ring
    key_ptr,  # in and out [J, R, D]
    value_ptr,  # in and out [J, R, D]
    sink_ptr,  # [E]
    out_ptr,  # out [T, E, D]: rows of sequences with one split
    part_ptr,  # out float32 [tiles, E, D]: the other sequences' splits, before division by their sums
    top_ptr,  # out float32 [tiles, E]: their maxima
    sum_ptr,  # out float32 [tiles, E]: their sums
    rows,  # B
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    cache_rows,  # R
    scale,  # log2(e)/√D
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,  # rows of a page; of the whole ring when there is no table
    WINDOW: tl.constexpr,  # 0: none
    ROWS: tl.constexpr,  # a power of two from B upwards
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    N: tl.constexpr,
):
    """Write each sequence's new key and value, rotated, and attend: one (split, key/value head) after the other.

    The programs are as many as the machine runs at a time, and share the work whatever it is: a graph's grid is fixed,
    and ragged lengths leave no program idle. The new position never passes through the cache: the split that owns it
    starts from its score.
    """
    seen_B, tiles_B = _decode_tiles(position_ptr, rows, WINDOW, ROWS, SPLIT)
    m_M = tl.arange(0, M)
    d_D = tl.arange(0, DP)
    n_N = tl.arange(0, N)
    real_D = d_D < D
    for item in range(tl.program_id(0), tl.sum(tiles_B, 0) * J, tl.num_programs(0)):
        tile, j = item // J, item % J
        b, split = _locate(tiles_B, tile)
        splits = _pick(tiles_B, b)
        token = tl.load(token_ptr + b)
        position = tl.load(position_ptr + b).to(tl.int32)
        sequence = tl.load(sequence_ptr + b)
        begin = position + 1 - _pick(seen_B, b) + split * SPLIT
        end = tl.minimum(begin + SPLIT, position)  # the new position is not among them
        owner = begin + SPLIT > position

        head_M = j * G + m_M
        real_MD = (m_M < G)[:, None] & real_D[None, :]
        turn_D = token * (D // 2) + d_D % (D // 2)
        cos_D = tl.load(cos_ptr + turn_D, real_D, other=0)[None, :]
        sin_D = tl.load(sin_ptr + turn_D, real_D, other=0)[None, :]
        q_MD = _rotated(q_ptr + token * q_stride + head_M[:, None] * D, cos_D, sin_D, real_MD, D, DP)

        own_1D = _rotated(
            k_ptr + token * k_stride + j * D + tl.zeros((1, 1), tl.int32), cos_D, sin_D, real_D[None, :], D, DP
        )
        value_1D = tl.load(v_ptr + token * v_stride + j * D + d_D, real_D, other=0)[None, :]
        if owner:
            to = (j * cache_rows.to(tl.int64) + _row(table_ptr, sequence, position, table_stride, PAGE)) * D
            tl.store(key_ptr + to + d_D[None, :], own_1D, real_D[None, :])
            tl.store(value_ptr + to + d_D[None, :], value_1D, real_D[None, :])
        score_M = tl.sum(q_MD.to(tl.float32) * own_1D.to(tl.float32), 1) * scale
        top_M = tl.where(owner, score_M, LOWEST)
        sum_M = tl.where(owner, 1.0, 0.0) + tl.zeros([M], tl.float32)
        acc_MD = tl.where(owner, value_1D.to(tl.float32), 0.0) + tl.zeros([M, DP], tl.float32)

        head_key_ptr = key_ptr + j * cache_rows.to(tl.int64) * D
        head_value_ptr = value_ptr + j * cache_rows.to(tl.int64) * D
        # The table is read a block ahead: else every block would wait for its rows before it can ask for them.
        row_N = _row(table_ptr, sequence, tl.minimum(begin + n_N, position), table_stride, PAGE)
        for start in range(begin, end, N):
            real_N = start + n_N < end
            at_ND = row_N[:, None] * D + d_D[None, :]
            row_N = _row(table_ptr, sequence, tl.minimum(start + N + n_N, position), table_stride, PAGE)
            real_ND = real_N[:, None] & real_D[None, :]
            k_ND = tl.load(head_key_ptr + at_ND, real_ND, other=0)
            v_ND = tl.load(head_value_ptr + at_ND, real_ND, other=0)
            top_M, sum_M, acc_MD = _block(q_MD, k_ND, v_ND, real_N[None, :], scale, top_M, sum_M, acc_MD)

        if splits == 1:
            _finish(sink_ptr, out_ptr + token * (J * G * D), head_M, m_M < G, real_MD, d_D, top_M, sum_M, acc_MD, D)
        else:
            to_M = tile * (J * G) + head_M
            tl.store(top_ptr + to_M, top_M, m_M < G)
            tl.store(sum_ptr + to_M, sum_M, m_M < G)
            tl.store(part_ptr + to_M[:, None] * D + d_D[None, :], acc_MD, real_MD)


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    token_ptr,  # int64 [B]
    position_ptr,  # int64 [B]
    sink_ptr,  # [E]
    part_ptr,  # float32 [tiles, E, D]
    top_ptr,  # float32 [tiles, E]
    sum_ptr,  # float32 [tiles, E]
    out_ptr,  # out [T, E, D]: rows of sequences with several splits
    rows,
    E: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
):
    """Program (b, e): the splits of a sequence's head, S at a time, upwards."""
    b, e = tl.program_id(0), tl.program_id(1)
    _, tiles_B = _decode_tiles(position_ptr, rows, WINDOW, ROWS, SPLIT)
    splits = _pick(tiles_B, b)
    if splits == 1:
        return
    first = tl.sum(tl.where(tl.arange(0, ROWS) < b, tiles_B, 0), 0)
    s_S = tl.arange(0, S)
    d_D = tl.arange(0, DP)
    top = tl.load(sink_ptr + e).to(tl.float32) * LOG2E
    total = 1.0
    acc_D = tl.zeros([DP], tl.float32)
    for start in range(0, splits, S):
        real_S = start + s_S < splits
        at_S = (first + start + s_S) * E + e
        top_S = tl.load(top_ptr + at_S, real_S, other=LOWEST)
        sum_S = tl.load(sum_ptr + at_S, real_S, other=0)
        part_SD = tl.load(part_ptr + at_S[:, None] * D + d_D[None, :], real_S[:, None] & (d_D < D)[None, :], other=0)
        above = tl.maximum(top, tl.max(top_S, 0))
        weight_S = tl.exp2(top_S - above)
        shrink = tl.exp2(top - above)
        total = total * shrink + tl.sum(sum_S * weight_S, 0)
        acc_D = acc_D * shrink + tl.sum(part_SD * weight_S[:, None], 0)
        top = above
    to = out_ptr + tl.load(token_ptr + b) * (E * D) + e * D
    tl.store(to + d_D, (acc_D / total).to(out_ptr.dtype.element_ty), d_D < D)


@triton.jit(do_not_specialize=["spans", "table_stride"])
def prefill_kernel(
    q_ptr,  # [T, E, D], not rotated
    k_ptr,  # [T, J, D], rotated, contiguous
    v_ptr,  # [T, J, D]
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    span_ptr,  # int32 [P, 4]
    table_ptr,  # int32 [sequences, pages]; None for a ring
    key_ptr,  # [J, R, D]
    value_ptr,  # [J, R, D]
    sink_ptr,  # [E]
    out_ptr,  # out [T, E, D]: rows of the spans
    spans,
    q_stride,
    v_stride,
    table_stride,
    cache_rows,
    scale,
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPANS: tl.constexpr,  # a power of two from P upwards
    M: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    N: tl.constexpr,
):
    """Program (tile, j): M // GP tokens of a span attend to [cached | the span's own tokens up to themselves].

    Positions that the span brings are read from k and v, since a ring may not hold them all.
    """
    # Later tiles of a span have more to do: they start first.
    tile, j = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    first, stop, cached, sequence, origin = _find_span(span_ptr, tile, spans, SPANS, M // GP)
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
    q_MD = _rotated(q_ptr + from_M[:, None], cos_MD, sin_MD, real_MD, D, DP)

    begin = 0
    if WINDOW:
        begin = tl.maximum(first + origin - WINDOW + 1, 0)
    end = tl.minimum(first + M // GP, stop) + origin
    head_row = j * cache_rows.to(tl.int64)
    top_M = tl.full([M], LOWEST, tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    acc_MD = tl.zeros([M, DP], tl.float32)
    # The table is read a block ahead, as in decode.
    row_N = _row(table_ptr, sequence, tl.minimum(begin // N * N + n_N, end - 1), table_stride, PAGE)
    for start in range(begin // N * N, end, N):
        position_N = start + n_N
        # Rows that no query of the tile sees are not read: they may hold another sequence's NaN.
        real_N = (position_N >= begin) & (position_N < end)
        past_N = real_N & (position_N < cached)
        at_N = head_row + row_N
        row_N = _row(table_ptr, sequence, tl.minimum(position_N + N, end - 1), table_stride, PAGE)
        token_N = (position_N - origin).to(tl.int64)
        real_ND = real_N[:, None] & (d_D < D)[None, :]
        k_ND = tl.where(past_N[:, None], key_ptr + at_N[:, None] * D, k_ptr + (token_N * J + j)[:, None] * D)
        k_ND = tl.load(k_ND + d_D[None, :], real_ND, other=0)
        v_ND = tl.where(past_N[:, None], value_ptr + at_N[:, None] * D, v_ptr + (token_N * v_stride + j * D)[:, None])
        v_ND = tl.load(v_ND + d_D[None, :], real_ND, other=0)
        seen_MN = (position_N[None, :] <= position_M[:, None]) & real_N[None, :]
        if WINDOW:
            seen_MN = seen_MN & (position_N[None, :] > position_M[:, None] - WINDOW)
        top_M, sum_M, acc_MD = _block(q_MD, k_ND, v_ND, seen_MN, scale, top_M, sum_M, acc_MD)
    to_M = out_ptr + token_M.to(tl.int64) * (J * G * D)
    _finish(sink_ptr, to_M[:, None], head_M, real_M, real_MD, d_D, top_M, sum_M, acc_MD, D)


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    k_ptr,  # [T, J, D]
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    out_ptr,  # out [T, J, D], contiguous
    tokens,
    k_stride,
    J: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    DP: tl.constexpr,
):
    """Rotate M (token, head) pairs."""
    pair_M = tl.program_id(0) * M + tl.arange(0, M)
    d_D = tl.arange(0, DP)
    token_M = (pair_M // J).to(tl.int64)
    real_MD = (token_M < tokens)[:, None] & (d_D < D)[None, :]
    at_MD = token_M[:, None] * (D // 2) + (d_D % (D // 2))[None, :]
    cos_MD = tl.load(cos_ptr + at_MD, real_MD, other=0)
    sin_MD = tl.load(sin_ptr + at_MD, real_MD, other=0)
    from_M = token_M * k_stride + pair_M % J * D
    k_MD = _rotated(k_ptr + from_M[:, None], cos_MD, sin_MD, real_MD, D, DP)
    tl.store(out_ptr + pair_M.to(tl.int64)[:, None] * D + d_D[None, :], k_MD, real_MD)


@triton.jit(do_not_specialize=["spans", "table_stride"])
def store_kernel(
    k_ptr,  # [T, J, D], rotated, contiguous
    v_ptr,  # [T, J, D]
    span_ptr,  # int32 [P, 4]
    table_ptr,  # int32 [sequences, pages]; None for a ring
    key_ptr,  # out [J, R, D]
    value_ptr,  # out [J, R, D]
    spans,
    v_stride,
    table_stride,
    cache_rows,
    J: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPANS: tl.constexpr,
    M: tl.constexpr,
    DP: tl.constexpr,
):
    """Program (tile, j): write M tokens of a span into the cache; a ring takes the last WINDOW only."""
    tile, j = tl.program_id(0), tl.program_id(1)
    first, stop, _, sequence, origin = _find_span(span_ptr, tile, spans, SPANS, M)
    token_M = first + tl.arange(0, M)
    d_D = tl.arange(0, DP)
    real_M = token_M < stop
    if WINDOW:
        real_M = real_M & (token_M >= stop - WINDOW)
    real_MD = real_M[:, None] & (d_D < D)[None, :]
    row_M = _row(table_ptr, sequence, tl.where(real_M, token_M, stop - 1) + origin, table_stride, PAGE)
    to_MD = (j * cache_rows.to(tl.int64) + row_M)[:, None] * D + d_D[None, :]
    token_M = token_M.to(tl.int64)
    k_MD = tl.load(k_ptr + (token_M * J + j)[:, None] * D + d_D[None, :], real_MD, other=0)
    tl.store(key_ptr + to_MD, k_MD, real_MD)
    v_MD = tl.load(v_ptr + (token_M * v_stride + j * D)[:, None] + d_D[None, :], real_MD, other=0)
    tl.store(value_ptr + to_MD, v_MD, real_MD)


@triton.jit
def _block(q_MD, k_ND, v_ND, seen_MN, scale, top_M, sum_M, acc_MD):
    """Take N more positions into the running (maximum, sum, output)."""
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
    score_MN = tl.where(seen_MN, score_MN, float("-inf"))
    above_M = tl.maximum(top_M, tl.max(score_MN, 1))
    shrink_M = tl.exp2(top_M - above_M)
    weight_MN = tl.exp2(score_MN - above_M[:, None])
    sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
    acc_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision="ieee")
    return above_M, sum_M, acc_MD


@triton.jit
def _finish(sink_ptr, to_MD, head_M, real_M, real_MD, d_D, top_M, sum_M, acc_MD, D: tl.constexpr):
    """The sink joins the denominator; divide, round and store."""
    sink_M = tl.load(sink_ptr + head_M, real_M, other=0).to(tl.float32) * LOG2E
    above_M = tl.maximum(top_M, sink_M)
    shrink_M = tl.exp2(top_M - above_M)
    total_M = sum_M * shrink_M + tl.exp2(sink_M - above_M)
    out_MD = acc_MD * (shrink_M / total_M)[:, None]
    to_MD = to_MD + head_M[:, None] * D + d_D[None, :]
    tl.store(to_MD, out_MD.to(to_MD.dtype.element_ty), real_MD)


@triton.jit
def _rotated(row_ptr, cos_MD, sin_MD, real_MD, D: tl.constexpr, DP: tl.constexpr):
    """Load [M, D] and turn the pairs (d, d + D/2); in float32, rounded once. `row_ptr` is a column of rows."""
    d_D = tl.arange(0, DP)
    low_D = d_D < D // 2
    other_D = tl.where(low_D, d_D + D // 2, d_D - D // 2)
    own_MD = tl.load(row_ptr + d_D[None, :], real_MD, other=0)
    other_MD = tl.load(row_ptr + other_D[None, :], real_MD, other=0).to(tl.float32)
    turned_MD = tl.where(low_D[None, :], -other_MD, other_MD) * sin_MD
    return (own_MD.to(tl.float32) * cos_MD + turned_MD).to(own_MD.dtype)


@triton.jit
def _row(table_ptr, sequence, position, table_stride, PAGE: tl.constexpr):
    """int64, the cache's row of each position (cache.py)."""
    page = sequence.to(tl.int64)
    if table_ptr is not None:
        page = tl.load(table_ptr + page * table_stride + position // PAGE).to(tl.int64)
    return page * PAGE + position % PAGE


@triton.jit
def _decode_tiles(position_ptr, rows, WINDOW: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """(positions that each sequence sees, its splits), both int32 [ROWS] and 0 beyond the B sequences."""
    b_B = tl.arange(0, ROWS)
    seen_B = tl.load(position_ptr + b_B, b_B < rows, other=-1).to(tl.int32) + 1
    if WINDOW:
        seen_B = tl.minimum(seen_B, WINDOW)
    return seen_B, (seen_B + SPLIT - 1) // SPLIT


@triton.jit
def _find_span(span_ptr, tile, spans, SPANS: tl.constexpr, TOKENS: tl.constexpr):
    """The tile-th run of TOKENS tokens → (its first token, the span's end, cached, sequence, position − token)."""
    p_P = tl.arange(0, SPANS)
    begin_P = tl.load(span_ptr + 4 * p_P, p_P < spans, other=0)
    end_P = tl.load(span_ptr + 4 * p_P + 1, p_P < spans, other=0)
    span, inside = _locate((end_P - begin_P + TOKENS - 1) // TOKENS, tile)
    begin = tl.load(span_ptr + 4 * span)
    cached = tl.load(span_ptr + 4 * span + 2)
    return (
        begin + inside * TOKENS,
        tl.load(span_ptr + 4 * span + 1),
        cached,
        tl.load(span_ptr + 4 * span + 3),
        cached - begin,
    )


@triton.jit
def _locate(tiles_I, tile):
    """The owner of the tile-th of all tiles, and which of the owner's tiles it is."""
    passed_I = tl.cumsum(tiles_I, 0) <= tile
    return tl.sum(passed_I.to(tl.int32), 0), tile - tl.sum(tl.where(passed_I, tiles_I, 0), 0)


@triton.jit
def _pick(value_I, index):
    """value[index]: a tile cannot be indexed."""
    return tl.sum(tl.where(tl.arange(0, value_I.shape[0]) == index, value_I, 0), 0)
