"""Decode: a step of one token for each sequence, in splits of their positions, and the splits' combination.

Letters: attention_kernels.py. S splits that are combined at a time.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.attention.softmax import LOG2E, LOWEST, finish, rotated, row, take
from epmoe.kernels.gpu import next_may_begin


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
    PDL: tl.constexpr,
):
    """Write each sequence's new key and value, rotated, and attend: one (split, key/value head) after the other.

    The programs are as many as the machine runs at a time, and share the work whatever it is: a graph's grid is fixed,
    and ragged lengths leave no program idle. The new position never passes through the cache: the split that owns it
    starts from its score.
    """
    next_may_begin(PDL)
    # A window within a split: each sequence has one, and nothing need be looked up.
    SINGLE: tl.constexpr = WINDOW > 0 and WINDOW <= SPLIT
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
        token = tl.load(token_ptr + b)
        position = tl.load(position_ptr + b).to(tl.int32)
        sequence = tl.load(sequence_ptr + b)
        begin = split * SPLIT
        if WINDOW:
            begin += tl.maximum(position + 1 - WINDOW, 0)
        end = tl.minimum(begin + SPLIT, position)  # the new position is not among them
        owner = begin + SPLIT > position
        head_M = j * G + m_M
        real_MD = (m_M < G)[:, None] & real_D[None, :]
        turn_D = token * (D // 2) + d_D % (D // 2)
        cos_D = tl.load(cos_ptr + turn_D, real_D, other=0)[None, :]
        sin_D = tl.load(sin_ptr + turn_D, real_D, other=0)[None, :]
        q_MD = rotated(q_ptr + token * q_stride + head_M[:, None] * D, cos_D, sin_D, real_MD, D, DP)

        own_1D = rotated(
            k_ptr + token * k_stride + j * D + tl.zeros((1, 1), tl.int32), cos_D, sin_D, real_D[None, :], D, DP
        )
        value_1D = tl.load(v_ptr + token * v_stride + j * D + d_D, real_D, other=0)[None, :]
        if owner:
            to = (j * cache_rows.to(tl.int64) + row(table_ptr, sequence, position, table_stride, PAGE)) * D
            tl.store(key_ptr + to + d_D[None, :], own_1D, real_D[None, :])
            tl.store(value_ptr + to + d_D[None, :], value_1D, real_D[None, :])
        score_M = tl.sum(q_MD.to(tl.float32) * own_1D.to(tl.float32), 1) * scale
        top_M = tl.where(owner, score_M, LOWEST)
        sum_M = tl.where(owner, 1.0, 0.0) + tl.zeros([M], tl.float32)
        acc_MD = tl.where(owner, value_1D.to(tl.float32), 0.0) + tl.zeros([M, DP], tl.float32)

        head_key_ptr = key_ptr + j * cache_rows.to(tl.int64) * D
        head_value_ptr = value_ptr + j * cache_rows.to(tl.int64) * D
        # The table is read a block ahead: else every block would wait for its rows before it can ask for them.
        row_N = row(table_ptr, sequence, tl.minimum(begin + n_N, position), table_stride, PAGE)
        for start in range(begin, end, N):
            real_N = start + n_N < end
            at_ND = row_N[:, None] * D + d_D[None, :]
            row_N = row(table_ptr, sequence, tl.minimum(start + N + n_N, position), table_stride, PAGE)
            real_ND = real_N[:, None] & real_D[None, :]
            k_ND = tl.load(head_key_ptr + at_ND, real_ND, other=0)
            v_ND = tl.load(head_value_ptr + at_ND, real_ND, other=0)
            score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
            score_MN = tl.where(real_N[None, :], score_MN, float("-inf"))
            top_M, sum_M, acc_MD = take(score_MN, v_ND, scale, top_M, sum_M, acc_MD)

        if _splits(position, WINDOW, SPLIT) == 1:
            to_MD = out_ptr + (token * (J * G) + head_M)[:, None] * D + d_D[None, :]
            finish(sink_ptr, to_MD, head_M, m_M < G, real_MD, top_M, sum_M, acc_MD)
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
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    GP: tl.constexpr,  # G rounded up to a power of two
    DP: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (b, j): the splits of a group's query heads, S at a time, upwards.

    A group's heads together: as a program each, the 16,384 heads of 256 sequences took 18 µs on an H100 to find that
    there was nothing to combine.
    """
    next_may_begin(PDL)
    b, j = tl.program_id(0), tl.program_id(1)
    splits = _splits(tl.load(position_ptr + b).to(tl.int32), WINDOW, SPLIT)
    if splits == 1:
        return
    tiles_B = _decode_tiles(position_ptr, rows, WINDOW, ROWS, SPLIT)
    first = tl.sum(tl.where(tl.arange(0, ROWS) < b, tiles_B, 0), 0)
    s_S, d_D, g_G = tl.arange(0, S), tl.arange(0, DP), tl.arange(0, GP)
    head_G, real_G, real_D = j * G + g_G, g_G < G, d_D < D
    top_G = tl.load(sink_ptr + head_G, real_G, other=0).to(tl.float32) * LOG2E
    total_G = tl.full([GP], 1.0, tl.float32)
    acc_GD = tl.zeros([GP, DP], tl.float32)
    for start in range(0, splits, S):
        real_GS = real_G[:, None] & (start + s_S < splits)[None, :]
        at_GS = (first + start + s_S)[None, :] * (J * G) + head_G[:, None]
        top_GS = tl.load(top_ptr + at_GS, real_GS, other=LOWEST)
        sum_GS = tl.load(sum_ptr + at_GS, real_GS, other=0)
        at_GSD = at_GS[:, :, None] * D + d_D[None, None, :]
        part_GSD = tl.load(part_ptr + at_GSD, real_GS[:, :, None] & real_D[None, None, :], other=0)
        above_G = tl.maximum(top_G, tl.max(top_GS, 1))
        weight_GS = tl.exp2(top_GS - above_G[:, None])
        shrink_G = tl.exp2(top_G - above_G)
        total_G = total_G * shrink_G + tl.sum(sum_GS * weight_GS, 1)
        acc_GD = acc_GD * shrink_G[:, None] + tl.sum(part_GSD * weight_GS[:, :, None], 1)
        top_G = above_G
    to_GD = out_ptr + tl.load(token_ptr + b) * (J * G * D) + head_G[:, None] * D + d_D[None, :]
    out_GD = (acc_GD / total_G[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(to_GD, out_GD, real_G[:, None] & real_D[None, :])


@triton.jit
def _decode_tiles(position_ptr, rows, WINDOW: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """Each sequence's splits, int32 [ROWS]; none beyond the B sequences."""
    b_B = tl.arange(0, ROWS)
    return _splits(tl.load(position_ptr + b_B, b_B < rows, other=-1).to(tl.int32), WINDOW, SPLIT)


@triton.jit
def _splits(position, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """How many splits a sequence at this position has, the position itself included."""
    seen = position + 1
    if WINDOW:
        seen = tl.minimum(seen, WINDOW)
    return (seen + SPLIT - 1) // SPLIT


@triton.jit
def _locate(tiles_I, tile):
    """The owner of the tile-th of all tiles, and which of the owner's tiles it is."""
    passed_I = tl.cumsum(tiles_I, 0) <= tile
    return tl.sum(passed_I.to(tl.int32), 0), tile - tl.sum(tl.where(passed_I, tiles_I, 0), 0)
