"""Decode: sequences that bring one token each, in splits of their positions, which the last of them to end combines.

Letters: attention_kernels.py. S splits that are combined at a time · GP G rounded up to a power of two.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.attention_kernels import LOG2E, LOWEST, finish, rotated, row, take
from epmoe.gpu import next_may_begin


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
    arrived_ptr,  # in and out int32 [sequences, J], zeros: splits that have ended; zeros again afterwards
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
    GP: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write each sequence's new key and value, rotated, and attend: one (split, key/value head) after the other.

    The programs are as many as the machine runs at a time, and share the work whatever it is: a graph's grid is fixed,
    and ragged lengths leave no program idle. The new position never passes through the cache: the split that owns it
    starts from its score. Of a sequence with several splits, the one that ends last finds all others' results in memory
    and combines them, in the order of their positions: which one it is changes no bit.
    """
    next_may_begin(PDL)
    # A window within a split: each sequence has one, and nothing need be looked up.
    SINGLE: tl.constexpr = WINDOW > 0 and WINDOW <= SPLIT
    tiles = rows
    if not SINGLE:
        b_B = tl.arange(0, ROWS)
        splits_B = _splits(tl.load(position_ptr + b_B, b_B < rows, other=-1).to(tl.int32), WINDOW, SPLIT)
        end_B = tl.cumsum(splits_B, 0)
        tiles = tl.sum(splits_B, 0)
    m_M = tl.arange(0, M)
    d_D = tl.arange(0, DP)
    n_N = tl.arange(0, N)
    real_D = d_D < D
    for item in range(tl.program_id(0), tiles * J, tl.num_programs(0)):
        tile, j = item // J, item % J
        b, split = tile, 0
        if not SINGLE:
            before_B = end_B <= tile  # sequences whose splits all come before
            b = tl.sum(before_B.to(tl.int32), 0)
            split = tile - tl.max(tl.where(before_B, end_B, 0), 0)
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

        splits = 1
        if not SINGLE:
            splits = _splits(position, WINDOW, SPLIT)
        if splits == 1:
            to_MD = out_ptr + (token * (J * G) + head_M)[:, None] * D + d_D[None, :]
            finish(sink_ptr, to_MD, head_M, m_M < G, real_MD, top_M, sum_M, acc_MD)
        else:
            to_M = tile * (J * G) + head_M
            tl.store(top_ptr + to_M, top_M, m_M < G)
            tl.store(sum_ptr + to_M, sum_M, m_M < G)
            tl.store(part_ptr + to_M[:, None] * D + d_D[None, :], acc_MD, real_MD)
            # All threads have stored before one of them counts; who sees the full count sees all that was counted.
            tl.debug_barrier()
            count_ptr = arrived_ptr + sequence * J + j
            if tl.atomic_add(count_ptr, 1, sem="acq_rel") == splits - 1:
                tl.store(count_ptr, 0)
                first = (tile - split) * (J * G) + j * G
                to_ptr = out_ptr + (token * (J * G) + j * G) * D
                _combine(part_ptr, top_ptr, sum_ptr, first, splits, sink_ptr + j * G, to_ptr, J, G, D, GP, DP, S)


@triton.jit
def _combine(
    part_ptr,  # float32 [tiles, E, D]
    top_ptr,  # float32 [tiles, E]
    sum_ptr,  # float32 [tiles, E]
    first,  # where the first split of the group's first head stands in [tiles, E]
    splits,
    sink_ptr,  # [G]
    out_ptr,  # out [G, D]
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
):
    """Add a sequence's splits of a group's query heads and the sink, upwards; divide and store."""
    s_S, d_D, g_G = tl.arange(0, S), tl.arange(0, DP), tl.arange(0, GP)
    real_G, real_D = g_G < G, d_D < D
    sink_G = tl.load(sink_ptr + g_G, real_G, other=0).to(tl.float32) * LOG2E
    # Reads pass the first-level cache by (.cg), which other multiprocessors do not write to.
    top_G = sink_G
    for start in range(0, splits, S):
        real_GS = real_G[:, None] & (start + s_S < splits)[None, :]
        at_GS = first + (start + s_S)[None, :] * (J * G) + g_G[:, None]
        top_G = tl.maximum(top_G, tl.max(tl.load(top_ptr + at_GS, real_GS, other=LOWEST, cache_modifier=".cg"), 1))
    total_G = tl.exp2(sink_G - top_G)
    acc_GD = tl.zeros([GP, DP], tl.float32)
    for split in tl.range(0, splits, loop_unroll_factor=4):
        at_G = first + split * (J * G) + g_G
        weight_G = tl.exp2(tl.load(top_ptr + at_G, real_G, other=LOWEST, cache_modifier=".cg") - top_G)
        sum_G = tl.load(sum_ptr + at_G, real_G, other=0, cache_modifier=".cg")
        at_GD = part_ptr + at_G[:, None] * D + d_D[None, :]
        part_GD = tl.load(at_GD, real_G[:, None] & real_D[None, :], other=0, cache_modifier=".cg")
        total_G = tl.fma(sum_G, weight_G, total_G)
        acc_GD = tl.fma(part_GD, weight_G[:, None] + tl.zeros([GP, DP], tl.float32), acc_GD)
    out_GD = (acc_GD / total_G[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + g_G[:, None] * D + d_D[None, :], out_GD, real_G[:, None] & real_D[None, :])


@triton.jit
def _splits(position, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """How many splits a sequence at this position has, the position itself included."""
    seen = position + 1
    if WINDOW:
        seen = tl.minimum(seen, WINDOW)
    return (seen + SPLIT - 1) // SPLIT
