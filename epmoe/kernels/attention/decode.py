"""Decode: one token of each sequence, in splits of their positions, and the splits' combination.

Where sequences have drafts, a row is a token of one of them, and all keys and values are put into place before.

Letters: softmax.py. B rows, the first tokens of a step.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.attention.softmax import LOWEST, begin_with, finish, join, nothing, rotated, row, take
from epmoe.kernels.gpu import next_may_begin


@triton.jit(do_not_specialize=["most", "table_stride"])
def decode_kernel(
    q_ptr,  # [T, E, D], not rotated; rows q_stride apart
    k_ptr,  # [T, J, D], not rotated
    v_ptr,  # [T, J, D]
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    position_ptr,  # int64 [B]
    sequence_ptr,  # int64 [B]
    rows_ptr,  # int32 [1], B; None: `most`
    table_ptr,  # int32 [sequences, pages], rows table_stride apart
    key_ptr,  # in and out [J, R, D]
    value_ptr,  # in and out [J, R, D]
    sink_ptr,  # [E]
    out_ptr,  # out [T, E, D]: rows of sequences with one split
    part_ptr,  # out float32 [tiles, E, D]: outputs of the other sequences' splits
    top_ptr,  # out float32 [tiles, E]: their maxima
    sum_ptr,  # out float32 [tiles, E]: their sums
    most,  # rows
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    cache_rows,  # R
    scale,  # log2(e)/√D
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,  # rows of a page
    WINDOW: tl.constexpr,  # 0: none
    ROWS: tl.constexpr,  # a power of two from `most` upwards
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    N: tl.constexpr,
    PLACED: tl.constexpr,  # whether place_rows_kernel has written the rows' keys and values
    PDL: tl.constexpr,
):
    """Write each sequence's new key and value, rotated, and attend: one (split, key/value head) after the other.

    The programs are as many as the machine runs at a time, and share the work whatever it is: a graph's grid is fixed,
    and ragged lengths leave no program idle. The program that has a sequence's last split writes its new row, which
    nobody else reads in this launch, and reads it back as one of the cached ones.
    """
    next_may_begin(PDL)
    # A window within a split: each sequence has one, and nothing need be looked up.
    SINGLE: tl.constexpr = WINDOW > 0 and WINDOW <= SPLIT
    rows = _rows(rows_ptr, most)
    tiles = rows
    if not SINGLE:
        tiles_B = _decode_tiles(position_ptr, rows, WINDOW, ROWS, SPLIT)
        tiles = tl.sum(tiles_B, 0)
    m_M = tl.arange(0, M)
    d_D = tl.arange(0, DP)
    n_N = tl.arange(0, N)
    real_D = d_D < D
    for item in range(tl.program_id(0), tiles * J, tl.num_programs(0)):
        tile, j = item // J, item % J
        b, split = tile, 0
        if SINGLE:
            pass
        elif tiles > rows:  # else each sequence has one split all the same
            b, split = _locate(tiles_B, tile)
        position = tl.load(position_ptr + b).to(tl.int32)
        sequence = tl.load(sequence_ptr + b)
        low = _first_seen(position, WINDOW)
        if SINGLE:
            begin, end = low // N * N, position + 1
        else:
            begin = (low // SPLIT + split) * SPLIT
            end = tl.minimum(begin + SPLIT, position + 1)
            begin = tl.maximum(begin, low // N * N)
        head_M = j * G + m_M
        real_MD = (m_M < G)[:, None] & real_D[None, :]
        head_key_ptr = key_ptr + j * cache_rows.to(tl.int64) * D
        head_value_ptr = value_ptr + j * cache_rows.to(tl.int64) * D

        turn_D = b * (D // 2) + d_D % (D // 2)
        cos_D = tl.load(cos_ptr + turn_D, real_D, other=0)[None, :]
        sin_D = tl.load(sin_ptr + turn_D, real_D, other=0)[None, :]
        q_MD = rotated(q_ptr + b * q_stride + head_M[:, None] * D, cos_D, sin_D, real_MD, D, DP)
        if PLACED:
            pass
        elif end > position:  # the sequence's last split
            k_1D = rotated(
                k_ptr + b * k_stride + j * D + tl.zeros((1, 1), tl.int32), cos_D, sin_D, real_D[None, :], D, DP
            )
            v_1D = tl.load(v_ptr + b * v_stride + j * D + d_D, real_D, other=0)[None, :]
            to_1D = row(table_ptr, sequence, position, table_stride, PAGE) * D + d_D[None, :]
            tl.store(head_key_ptr + to_1D, k_1D, real_D[None, :])
            tl.store(head_value_ptr + to_1D, v_1D, real_D[None, :])
        tl.debug_barrier()

        top_M, sum_MX, acc_MD = nothing(M, DP)
        # The table is read a block ahead: else every block would wait for its rows before it can ask for them.
        row_N = row(table_ptr, sequence, tl.minimum(tl.maximum(begin + n_N, low), position), table_stride, PAGE)
        for start in range(begin, end, N):
            at_ND = row_N[:, None] * D + d_D[None, :]
            position_N = start + n_N
            row_N = row(table_ptr, sequence, tl.minimum(position_N + N, position), table_stride, PAGE)
            seen_N = position_N <= position
            if WINDOW:
                seen_N = seen_N & (position_N > position - WINDOW)
            seen_ND = seen_N[:, None] & real_D[None, :]
            k_ND = tl.load(head_key_ptr + at_ND, seen_ND, other=0)
            v_ND = tl.load(head_value_ptr + at_ND, seen_ND, other=0)
            score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
            score_MN = tl.where(seen_N[None, :], score_MN, float("-inf"))
            top_M, sum_MX, acc_MD = take(score_MN, v_ND, scale, top_M, sum_MX, acc_MD)

        sum_M = tl.max(sum_MX, 1)
        if _splits(position, WINDOW, SPLIT) == 1:
            to_MD = out_ptr + (b * (J * G) + head_M)[:, None] * D + d_D[None, :]
            sink_M, one_M, zero_MD = begin_with(sink_ptr, head_M, m_M < G, DP)
            _, total_M, out_MD = join(sink_M, one_M, zero_MD, top_M, sum_M, acc_MD)
            finish(to_MD, real_MD, total_M, out_MD)
        else:
            to_M = tile * (J * G) + head_M
            tl.store(top_ptr + to_M, top_M, m_M < G)
            tl.store(sum_ptr + to_M, sum_M, m_M < G)
            tl.store(part_ptr + to_M[:, None] * D + d_D[None, :], acc_MD, real_MD)


@triton.jit(do_not_specialize=["most", "table_stride"])
def place_rows_kernel(
    k_ptr,  # [T, J, D], not rotated; rows k_stride apart
    v_ptr,  # [T, J, D]
    cos_ptr,  # float32 [T, F]
    sin_ptr,  # float32 [T, F]
    position_ptr,  # int64 [B]
    sequence_ptr,  # int64 [B]
    rows_ptr,  # int32 [1], B; None: `most`
    table_ptr,  # int32 [sequences, pages], rows table_stride apart
    key_ptr,  # out [J, R, D]
    value_ptr,  # out [J, R, D]
    most,  # rows
    k_stride,
    v_stride,
    table_stride,
    cache_rows,  # R
    D: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    DP: tl.constexpr,
):
    """Program (tile, j): M rows' keys, rotated, and values, before any row attends: in a draft it sees those before."""
    j = tl.program_id(1)
    b_M, d_D = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, DP)
    real_M = b_M < _rows(rows_ptr, most)
    real_MD = real_M[:, None] & (d_D < D)[None, :]
    turn_MD = b_M[:, None] * (D // 2) + (d_D % (D // 2))[None, :]
    cos_MD = tl.load(cos_ptr + turn_MD, real_MD, other=0)
    sin_MD = tl.load(sin_ptr + turn_MD, real_MD, other=0)
    k_MD = rotated(k_ptr + b_M[:, None] * k_stride + j * D, cos_MD, sin_MD, real_MD, D, DP)
    v_MD = tl.load(v_ptr + b_M[:, None] * v_stride + j * D + d_D[None, :], real_MD, other=0)
    position_M = tl.load(position_ptr + b_M, real_M, other=0).to(tl.int32)
    sequence_M = tl.load(sequence_ptr + b_M, real_M, other=0)
    row_M = row(table_ptr, sequence_M, position_M, table_stride, PAGE)
    to_MD = (j * cache_rows.to(tl.int64) + row_M)[:, None] * D + d_D[None, :]
    tl.store(key_ptr + to_MD, k_MD, real_MD)
    tl.store(value_ptr + to_MD, v_MD, real_MD)


@triton.jit(do_not_specialize=["most"])
def combine_kernel(
    position_ptr,  # int64 [B]
    rows_ptr,  # int32 [1], B; None: `most`
    sink_ptr,  # [E]
    part_ptr,  # float32 [tiles, E, D]
    top_ptr,  # float32 [tiles, E]
    sum_ptr,  # float32 [tiles, E]
    out_ptr,  # out [T, E, D]: rows of sequences with several splits
    most,  # rows
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    GP: tl.constexpr,  # G rounded up to a power of two
    DP: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (b, j): the splits of a group's query heads, one after the other; AHEAD of them are under way at a time.

    A group's heads together: as a program each, the 16,384 heads of 256 sequences took 18 µs on an H100 to find that
    there was nothing to combine.
    """
    next_may_begin(PDL)
    b, j = tl.program_id(0), tl.program_id(1)
    rows = _rows(rows_ptr, most)
    if b >= rows:
        return
    splits = _splits(tl.load(position_ptr + b).to(tl.int32), WINDOW, SPLIT)
    if splits == 1:
        return
    tiles_B = _decode_tiles(position_ptr, rows, WINDOW, ROWS, SPLIT)
    first = tl.sum(tl.where(tl.arange(0, ROWS) < b, tiles_B, 0), 0)
    d_D, g_G = tl.arange(0, DP), tl.arange(0, GP)
    head_G, real_G, real_D = j * G + g_G, g_G < G, d_D < D
    real_GD = real_G[:, None] & real_D[None, :]
    top_G, total_G, acc_GD = begin_with(sink_ptr, head_G, real_G, DP)
    for split in tl.range(first, first + splits, num_stages=AHEAD):
        at_G = split * (J * G) + head_G
        split_top_G = tl.load(top_ptr + at_G, real_G, other=LOWEST)
        split_sum_G = tl.load(sum_ptr + at_G, real_G, other=0)
        split_GD = tl.load(part_ptr + at_G[:, None] * D + d_D[None, :], real_GD, other=0)
        top_G, total_G, acc_GD = join(top_G, total_G, acc_GD, split_top_G, split_sum_G, split_GD)
    to_GD = out_ptr + b * (J * G * D) + head_G[:, None] * D + d_D[None, :]
    finish(to_GD, real_GD, total_G, acc_GD)


@triton.jit
def _rows(rows_ptr, most):
    """How many rows there are."""
    if rows_ptr is None:
        return most
    else:
        return tl.load(rows_ptr)


@triton.jit
def _first_seen(position, WINDOW: tl.constexpr):
    """The first position that the one at `position` sees."""
    return tl.maximum(position + 1 - WINDOW, 0) if WINDOW else 0


@triton.jit
def _decode_tiles(position_ptr, rows, WINDOW: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """Each sequence's splits, int32 [ROWS]; none beyond the B sequences."""
    b_B = tl.arange(0, ROWS)
    position_B = tl.load(position_ptr + b_B, b_B < rows, other=0).to(tl.int32)
    return tl.where(b_B < rows, _splits(position_B, WINDOW, SPLIT), 0)


@triton.jit
def _splits(position, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """How many splits a sequence at this position sees a part of."""
    if WINDOW == 0:
        return position // SPLIT + 1
    elif WINDOW <= SPLIT:
        return position * 0 + 1
    else:
        return position // SPLIT - tl.maximum(position + 1 - WINDOW, 0) // SPLIT + 1


@triton.jit
def _locate(tiles_I, tile):
    """The owner of the tile-th of all tiles, and which of the owner's tiles it is."""
    passed_I = tl.cumsum(tiles_I, 0) <= tile
    return tl.sum(passed_I.to(tl.int32), 0), tile - tl.sum(tl.where(passed_I, tiles_I, 0), 0)
