"""The border of top-k and top-p: the key of the last token that they keep.

It is found by halving the range of keys. Mostly few candidates are left, and all steps stay in registers; where too
many tokens lie within the bracket (ties without end, a top-p next to 1), each step is a pass through the row.

Letters: C candidates · M ids at a time · S runs.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.sampling.numbers import (
    MOST_IDS,
    NOT_FINITE,
    NOTHING,
    best_key,
    candidate_keys,
    key_id,
    key_of,
    key_value,
    ordered,
    parameters,
    scores,
    slope,
    value_of,
    weight_of,
)  # fmt: skip


@triton.jit
def border_of(key_C, measure_C, need):
    """The largest key at which, with all larger ones, the measures reach `need`; all together do.

    Its score is found first: mostly one candidate alone has it, and there is no id to be looked for.
    """
    score_C = key_C >> 20  # NOTHING's is below all others
    low = tl.min(tl.where(key_C == NOTHING, 1 << 62, score_C), 0)
    high = tl.max(score_C, 0) + 1
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        reached = tl.sum(tl.where(score_C >= middle, measure_C, 0), 0) >= need
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    equal_C = (score_C == low) & (key_C != NOTHING)
    border, last = tl.min(tl.where(equal_C, key_C, 1 << 62), 0), tl.max(tl.where(equal_C, key_C, NOTHING), 0) + 1
    while last - border > 1:
        middle = border + ((last - border) >> 1)
        reached = tl.sum(tl.where(key_C >= middle, measure_C, 0), 0) >= need
        border, last = tl.where(reached, middle, border), tl.where(reached, last, middle)
    return border


@triton.jit
def measure_row(row_ptr, ids, best, steep, floor, from_, COUNT: tl.constexpr, M: tl.constexpr):
    """Of the tokens with keys of `from_` or more: how many they are, or what they weigh. int64."""
    found_M = tl.zeros([M], tl.int64)
    for begin in range(0, ids, M):
        id_M = begin + tl.arange(0, M)
        score_M = tl.load(row_ptr + id_M, id_M < ids, other=-float("inf"))
        inside_M = (id_M < ids) & (key_of(score_M, id_M) >= from_)
        if COUNT:
            found_M += inside_M.to(tl.int64)
        else:
            found_M += tl.where(inside_M, weight_of(score_M, best, steep, floor), 0)
    return tl.sum(found_M, 0)


@triton.jit
def border_of_row(row_ptr, ids, best, steep, floor, need, low, high, COUNT: tl.constexpr, M: tl.constexpr):
    """As `border_of`, of the whole row, where `low` reaches it and `high` does not."""
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        reached = measure_row(row_ptr, ids, best, steep, floor, middle, COUNT, M) >= need
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    return low


@triton.jit
def to_reach(top_p, total):
    """min(total, ceil(p · total)), the product in float64."""
    return tl.minimum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), total)


@triton.jit
def excludes_nothing(known, inside):
    """Whether top-k does so: all that weighs something is within the k."""
    every, total, above, above_k, candidates, top_k, _, by_k, _ = known
    return by_k & (every == 0) & ((total == above) | ((above_k + candidates < top_k) & (total == above + inside)))


@triton.jit
def among(row_ptr, candidate_ptr, kept_ptr, known, best, steep, floor, least, N: tl.constexpr, C: tl.constexpr):
    """Of up to C candidates: what they weigh, the border, and whether it is among them. Then those are kept that are
    not below it."""
    _, total, above, above_k, candidates, top_k, top_p, by_k, by_p = known
    real_C = tl.arange(0, C) < candidates
    key_C = candidate_keys(row_ptr, candidate_ptr, real_C, C)
    # Where there is no candidate, there is no score either: any that is read from NOTHING may be above the best.
    weight_C = tl.where(real_C, weight_of(key_value(key_C), best, steep, floor), 0)
    inside = tl.sum(weight_C, 0)
    by_k &= excludes_nothing(known, inside) == 0
    done = (by_k == 0) | ((above_k < top_k) & (top_k <= above_k + candidates))
    border = tl.full([], NOTHING, tl.int64)
    if by_k & done:
        border = border_of(key_C, real_C.to(tl.int64), top_k - above_k)
    if by_p & done:
        left_C = tl.where(key_C >= border, weight_C, 0)
        left = tl.sum(left_C, 0)
        need = to_reach(top_p, tl.where(by_k, above + left, total))
        done &= (above < need) & (need <= above + left)
        if done:
            border = border_of(tl.where(key_C >= border, key_C, NOTHING), left_C, need - above)
    if done:
        kept_C = (key_C >= border) & real_C & (weight_C >= least)
        tl.atomic_add(kept_ptr + key_id(key_C) // N, weight_C, kept_C)
    return inside, border, done


@triton.jit(do_not_specialize=["every", "parts", "groups"])
def border_kernel(
    logits_ptr,  # float32 [B, V], rows `stride` apart
    stride,
    ids,
    adjusted_ptr,  # float32, rows `adjusted_stride` apart
    adjusted_stride,
    sequence_ptr,  # int64 [B]
    value_ptr,  # float64 [S, 5]
    kind_ptr,  # int32 [S]
    key_ptr,  # int64 [B, runs]
    bracket_ptr,  # float32 [B, 2]
    sum_ptr,  # int64 [B, groups, 4], as narrow.sum_kernel leaves it
    kept_ptr,  # in, out int64 [B, runs]: all weights that are kept
    candidates_ptr,  # int32 [B]
    candidate_ptr,  # int32 [B, ROOM]: ids
    border_ptr,  # out int64 [B], of rows with top-k or top-p
    every,  # 1: what weighs nothing has its place, too
    parts,
    groups,
    N: tl.constexpr,
    M: tl.constexpr,
    SP: tl.constexpr,
    ROOM: tl.constexpr,
    FEW: tl.constexpr,
):
    """Program b."""
    b = tl.program_id(0).to(tl.int64)
    handle = tl.load(sequence_ptr + b)
    temperature, inverse, top_k, top_p, least, by_k, by_p = parameters(value_ptr, handle, ids)
    bits = (best_key(key_ptr, b, parts, SP) >> 32).to(tl.int32)
    if (temperature > 0) & (by_k | by_p) & (bits != NOT_FINITE):
        best, g_G = value_of(bits), tl.arange(0, SP)
        steep, floor = slope(best, temperature, inverse)
        sum_ptr_G = sum_ptr + (b * groups + g_G) * 4
        total = tl.sum(tl.load(sum_ptr_G, g_G < groups, other=0), 0)
        above = tl.sum(tl.load(sum_ptr_G + 1, g_G < groups, other=0), 0)
        above_k = tl.sum(tl.load(sum_ptr_G + 2, g_G < groups, other=0), 0)
        candidates = tl.load(candidates_ptr + b)
        row_ptr = scores(logits_ptr, stride, adjusted_ptr, adjusted_stride, kind_ptr, handle, b)
        lowest, highest = tl.full([], -1 << 31, tl.int64) * MOST_IDS, (ordered(best).to(tl.int64) + 1) * MOST_IDS
        low = ordered(tl.load(bracket_ptr + b * 2)).to(tl.int64) * MOST_IDS
        high = tl.minimum(ordered(tl.load(bracket_ptr + b * 2 + 1)).to(tl.int64) * MOST_IDS, highest)
        known = (every, total, above, above_k, candidates, top_k, top_p, by_k, by_p)
        candidate_ptr += b * ROOM
        kept_ptr += b * parts
        if candidates <= FEW:
            inside, border, done = among(row_ptr, candidate_ptr, kept_ptr, known, best, steep, floor, least, N, FEW)
        elif candidates <= ROOM:
            inside, border, done = among(row_ptr, candidate_ptr, kept_ptr, known, best, steep, floor, least, N, ROOM)
        else:
            inside = measure_row(row_ptr, ids, best, steep, floor, low, False, M) - above
            border = tl.full([], NOTHING, tl.int64)
            done = (total == above) & (by_p == 0) & excludes_nothing(known, inside)
        if done == 0:
            by_k &= excludes_nothing(known, inside) == 0
            holds_k = (above_k < top_k) & (top_k <= above_k + candidates)
            border = lowest
            if by_k:
                from_, to = tl.where(holds_k, low, lowest), tl.where(holds_k, high, highest)
                border = border_of_row(row_ptr, ids, best, steep, floor, top_k, from_, to, True, M)
                total = measure_row(row_ptr, ids, best, steep, floor, border, False, M)
            if by_p:
                need = to_reach(top_p, total)
                holds_p = (by_k == 0) & (above < need) & (need <= above + inside)
                from_, to = tl.where(holds_p, low, border), tl.where(holds_p, high, highest)
                border = border_of_row(row_ptr, ids, best, steep, floor, need, from_, to, False, M)
            for s in range(parts):
                kept_M = tl.zeros([M], tl.int64)
                for begin in range(0, N, M):
                    id_M = s * N + begin + tl.arange(0, M)
                    score_M = tl.load(row_ptr + id_M, id_M < ids, other=-float("inf"))
                    weight_M = weight_of(score_M, best, steep, floor)
                    inside_M = (id_M < ids) & (key_of(score_M, id_M) >= border) & (weight_M >= least)
                    kept_M += tl.where(inside_M, weight_M, 0)
                tl.store(kept_ptr + s, tl.sum(kept_M, 0))
        tl.store(border_ptr + b, border)
