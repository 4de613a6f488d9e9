"""The last launches: the token of a row; the log-probabilities of a row.

Letters: N ids of a run · S runs · C candidates · Q log-probabilities asked for · M ids at a time.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.sampling.numbers import (
    GOLDEN,
    LOW,
    NOT_FINITE,
    NOTHING,
    UNIT,
    best_key,
    candidate_keys,
    key_id,
    key_of,
    key_value,
    mix,
    parameters,
    scaled,
    scores,
    slope,
    value_of,
    weight_of,
)  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def draw_kernel(
    logits_ptr,  # float32 [B, V], rows `stride` apart
    stride,
    ids,
    adjusted_ptr,  # float32, rows `adjusted_stride` apart
    adjusted_stride,
    sequence_ptr,  # int64 [B]
    position_ptr,  # int64 [B]
    value_ptr,  # float64 [S, 5]
    seed_ptr,  # int64 [S]
    kind_ptr,  # int32 [S]
    key_ptr,  # int64 [B, runs]
    kept_ptr,  # int64 [B, runs]
    border_ptr,  # int64 [B]
    id_ptr,  # out int64 [B]
    parts,
    N: tl.constexpr,
    SP: tl.constexpr,
):
    """Program b."""
    b = tl.program_id(0).to(tl.int64)
    handle = tl.load(sequence_ptr + b)
    temperature, inverse, _, _, least, by_k, by_p = parameters(value_ptr, handle, ids)
    key = best_key(key_ptr, b, parts, SP)
    bits = (key >> 32).to(tl.int32)
    found = (key & LOW) ^ LOW
    if bits == NOT_FINITE:
        found = tl.zeros([], tl.int64) + ids
    elif temperature > 0:
        s_S = tl.arange(0, SP)
        kept_S = tl.load(kept_ptr + b * parts + s_S, s_S < parts, other=0)
        start = mix(mix(tl.load(seed_ptr + handle) + GOLDEN) + tl.load(position_ptr + b) * GOLDEN)
        target = scaled(mix(start + GOLDEN), tl.sum(kept_S, 0))
        running_S = tl.cumsum(kept_S, 0)
        run = tl.sum((running_S <= target).to(tl.int32), 0)  # those beyond the last run hold all
        target -= tl.max(tl.where(running_S <= target, running_S, 0), 0)
        id_N = run * N + tl.arange(0, N)
        row_ptr = scores(logits_ptr, stride, adjusted_ptr, adjusted_stride, kind_ptr, handle, b)
        score_N = tl.load(row_ptr + id_N, id_N < ids, other=-float("inf"))
        steep, floor = slope(value_of(bits), temperature, inverse)
        weight_N = weight_of(score_N, value_of(bits), steep, floor)
        inside_N = (id_N < ids) & (weight_N >= least)
        if by_k | by_p:
            inside_N &= key_of(score_N, id_N) >= tl.load(border_ptr + b)
        above_N = tl.cumsum(tl.where(inside_N, weight_N, 0), 0) > target
        found = tl.min(tl.where(above_N, id_N, ids), 0).to(tl.int64)
    tl.store(id_ptr + b, found)


@triton.jit(do_not_specialize=["top", "parts", "groups"])
def top_kernel(
    logits_ptr,  # float32 [B, V], rows `stride` apart
    stride,
    ids,
    key_ptr,  # int64 [B, runs]
    sum_ptr,  # int64 [B, groups, 4]
    candidates_ptr,  # int32 [B]
    candidate_ptr,  # int32 [B, ROOM]: ids
    border_ptr,  # int64 [B]
    chosen_ptr,  # int64 [B]: ids
    found_ptr,  # scratch int64 [B, QP]
    chosen_out_ptr,  # out float64 [B]
    id_out_ptr,  # out int64 [B, Q]
    logprob_out_ptr,  # out float64 [B, Q]
    top,  # Q
    parts,
    groups,
    M: tl.constexpr,
    SP: tl.constexpr,
    ROOM: tl.constexpr,
    QP: tl.constexpr,
):
    """Program b. NaN, where the row is not finite."""
    b = tl.program_id(0).to(tl.int64)
    bits, g_G = (best_key(key_ptr, b, parts, SP) >> 32).to(tl.int32), tl.arange(0, SP)
    row_ptr = logits_ptr + b * stride
    bad = bits == NOT_FINITE
    best = value_of(bits).to(tl.float64)  # NaN, where it is not finite
    total = tl.sum(tl.load(sum_ptr + (b * groups + g_G) * 4, (g_G < groups) & (bad == 0), other=0), 0)
    log_total = tl.log(tl.where(bad, 1, total).to(tl.float64) / UNIT)
    chosen = tl.load(row_ptr + tl.load(chosen_ptr + b)).to(tl.float64)
    tl.store(chosen_out_ptr + b, chosen - best - log_total)
    q_Q = tl.arange(0, QP)
    if bad:
        tl.store(id_out_ptr + b * top + q_Q, q_Q.to(tl.int64), q_Q < top)
        tl.store(logprob_out_ptr + b * top + q_Q, best - q_Q.to(tl.float64), q_Q < top)
    elif top > 0:
        border, candidates = NOTHING, ROOM + 1
        if top < ids:  # else there is no border, and all are wanted
            border, candidates = tl.load(border_ptr + b), tl.load(candidates_ptr + b)
        if candidates <= ROOM:  # all that is above the border is among them
            c_C = tl.arange(0, ROOM)
            key_C = candidate_keys(row_ptr, candidate_ptr + b * ROOM, c_C < candidates, ROOM)
            place_C = tl.cumsum((key_C >= border).to(tl.int32), 0) - 1
            tl.store(found_ptr + b * QP + place_C, key_C, key_C >= border)
        else:
            taken = 0
            for begin in range(0, ids, M):
                id_M = begin + tl.arange(0, M)
                key_M = key_of(tl.load(row_ptr + id_M, id_M < ids, other=-float("inf")), id_M)
                inside_M = (id_M < ids) & (key_M >= border)
                place_M = taken + tl.cumsum(inside_M.to(tl.int32), 0) - 1
                tl.store(found_ptr + b * QP + place_M, key_M, inside_M)
                taken += tl.sum(inside_M.to(tl.int32), 0)
        tl.debug_barrier()
        key_Q = tl.load(found_ptr + b * QP + q_Q, q_Q < top, other=NOTHING)
        r_Q = tl.arange(0, QP)
        other_Q = tl.load(found_ptr + b * QP + r_Q, r_Q < top, other=NOTHING)
        rank_Q = tl.sum((other_Q[None, :] > key_Q[:, None]).to(tl.int32), 1)
        logprob_Q = key_value(key_Q).to(tl.float64) - best - log_total
        tl.store(id_out_ptr + b * top + rank_Q, key_id(key_Q).to(tl.int64), q_Q < top)
        tl.store(logprob_out_ptr + b * top + rank_Q, logprob_Q, q_Q < top)
