"""Between which two scores the border of top-k or top-p lies, and the exact sums around them.

A row's measure of a score is how many tokens have it or more (top-k), or how much they weigh (top-p). A round measures
a few pivots, in float32. Those of the first are evenly spaced and leave an eighth of the row's range. Through what
they have found goes a curve, cubic in the logarithm of a measure's odds (of normal scores a nearly straight line), and
the second round's pivots stand close to where it has the border: what they leave is mostly a sixtieth of that. A third
round leaves a ninth. Float32 is exact for a count; for weights a border counts only where it is clear by SLACK, and
border.py compares with exact sums whatever comes of it. As soon as what is left has room, which a small top-k has
after a round and nearly every top-p after two, further rounds measure nothing.

Letters: N ids of a run · M of them at a time · S runs · G groups of runs, one a program · J numbers of a round,
P of them pivots.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.sampling.numbers import (
    LOG2_E,
    MOST,
    NOT_FINITE,
    REACH,
    best_key,
    parameters,
    scores,
    slope,
    value_of,
    weight_of,
)  # fmt: skip

# Numbers of a round: P pivots, the two ends that they lie between, the low one's measure; or P measures, and the row's.
RECORD = tl.constexpr(16)
SLACK = tl.constexpr(2.0**-16)  # of float32's exp2 and sums, several times what they err
# Where the second round's pivots are between the border as it is guessed and the lower end (negative) or the upper.
SPREAD = tl.constexpr((-0.5, -0.12, -0.03, -0.008, 0.008, 0.03, 0.12, 0.5))
POINTS = tl.constexpr(512)  # of the curve
ODDS = tl.constexpr(2.0**-20)  # the least share of a measure


@triton.jit
def bracket(
    pivot_ptr, measure_ptr, last, rows, b, groups, best, inverse, top_k, top_p, by_k,
    SP: tl.constexpr, P: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """low and high after round `last`: the border is at least the one and below the other; their measures; whether what
    lies between them has room: by top-k all from the low end on, and there is no high end then; and, after the first
    round, which share of the way from low to high the border may be."""
    j_J, g_G = tl.arange(0, RECORD), tl.arange(0, SP)
    pivot_ptr += (last * rows + b) * RECORD
    at_GJ = ((last * rows + b) * groups + g_G[:, None]) * RECORD + j_J[None, :]
    measure_J = tl.sum(tl.load(measure_ptr + at_GJ, (g_G[:, None] < groups) & (j_J[None, :] <= P), other=0.0), 0)
    pivot_J = tl.load(pivot_ptr + j_J, j_J < P, other=0.0)
    all = tl.sum(tl.where(j_J == P, measure_J, 0.0), 0)
    need = tl.where(by_k, top_k.to(tl.float32), top_p.to(tl.float32) * all)
    slack = tl.where(by_k, 0.0, SLACK)
    reached_J = (j_J < P) & (measure_J >= need * (1 + slack))
    short_J = (j_J < P) & (measure_J < need * (1 - slack))
    low = tl.maximum(tl.load(pivot_ptr + P), tl.max(tl.where(reached_J, pivot_J, -MOST), 0))
    high = tl.minimum(tl.load(pivot_ptr + P + 1), tl.min(tl.where(short_J, pivot_J, float("inf")), 0))
    reached = tl.minimum(tl.load(pivot_ptr + P + 2), tl.min(tl.where(reached_J, measure_J, float("inf")), 0))
    short = tl.maximum(tl.load(pivot_ptr + P + 3), tl.max(tl.where(short_J, measure_J, 0.0), 0))
    # By top-p: each token between the two ends weighs at least what the low one does.
    least = tl.exp2((low - best) * (inverse * LOG2_E).to(tl.float32))
    few = tl.where(by_k, reached, (reached * (1 + SLACK) - short * (1 - SLACK)) / least) <= ROOM * (1 - slack)
    # The best token's weight, and of counts its own, is 1; that is where the next pivot would be.
    point_J = tl.where(j_J < P, measure_J, tl.where(j_J == P, 1.0, 0.0))
    count = tl.sum(reached_J.to(tl.int32), 0)
    share = guessed(
        point_of(point_J, count - 2, all), point_of(point_J, count - 1, all), point_of(point_J, count, all),
        point_of(point_J, count + 1, all), need, all,
    )  # fmt: skip
    return low, tl.where(few & by_k, float("inf"), high), reached, short, few, share


@triton.jit
def point_of(point_J, j, all):
    return tl.where(j < 0, all, tl.sum(tl.where(tl.arange(0, RECORD) == j, point_J, 0.0), 0))


@triton.jit
def odds(measure, all):
    """ln(measure / (all - measure)); where one of them is nothing, some number."""
    little = all * ODDS
    return tl.log((measure + little) / (tl.maximum(all - measure, 0.0) + little))


@triton.jit
def guessed(m0, m1, m2, m3, need, all):
    """At which share of the way from m1 to m2 the curve through four falling measures is `need`: a monotone cubic."""
    y0, y1, y2, y3 = odds(m0, all), odds(m1, all), odds(m2, all), odds(m3, all)
    need = odds(need, all)
    step = y2 - y1
    slope1 = tl.maximum(tl.minimum((y2 - y0) * 0.5, 0.0), 3 * step)
    slope2 = tl.maximum(tl.minimum((y3 - y1) * 0.5, 0.0), 3 * step)
    t_I = (tl.arange(0, POINTS) + 0.5) / POINTS
    y_I = y1 + t_I * (slope1 + t_I * (3 * step - 2 * slope1 - slope2 + t_I * (slope1 + slope2 - 2 * step)))
    return tl.sum((y_I >= need).to(tl.float32), 0) / POINTS


@triton.jit
def loaded(row_ptr, begin, ids, end, M: tl.constexpr):
    """M scores from `begin` on; -infinity behind the row, and from `end` on, where nothing is read."""
    id_M = begin + tl.arange(0, M)
    return tl.load(row_ptr + id_M, id_M < tl.minimum(ids, end), other=-float("inf"))


@triton.jit
def bits_set(word):
    """How many bits of an int32, which is not negative, are set."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def pivot_of(j: tl.constexpr, number, base, top, share):
    """The j-th of round `number`; the difference of the two ends might be beyond float32."""
    part = tl.where(number == 0, j / 8, (j + 1) / 9)
    if SPREAD[j] < 0:
        part = tl.where(number == 1, share * (1 + SPREAD[j]), part)
    else:
        part = tl.where(number == 1, share + (1 - share) * SPREAD[j], part)
    return base * (1 - part) + top * part


@triton.jit(do_not_specialize=["number", "rows", "parts", "groups", "each"])
def round_kernel(
    logits_ptr,  # float32 [B, V], rows `stride` apart
    stride,
    ids,
    adjusted_ptr,  # float32, rows `adjusted_stride` apart
    adjusted_stride,
    sequence_ptr,  # int64 [B]
    value_ptr,  # float64 [S, 5]
    kind_ptr,  # int32 [S]
    key_ptr,  # int64 [B, runs]
    low_ptr,  # float32 [B, runs]
    pivot_ptr,  # in, of the round before, and out float32 [rounds, B, RECORD]
    measure_ptr,  # likewise [rounds, B, groups, RECORD]
    number,
    rows,
    parts,
    groups,
    each,  # runs of a group
    N: tl.constexpr,
    M: tl.constexpr,
    SP: tl.constexpr,
    P: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Program (g, b): measures of runs g·each … of row b, in round `number`."""
    tl.static_assert(P == 8)
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    handle = tl.load(sequence_ptr + b)
    temperature, inverse, top_k, top_p, _, by_k, by_p = parameters(value_ptr, handle, ids)
    if (temperature > 0) & (by_k | by_p):
        bits = (best_key(key_ptr, b, parts, SP) >> 32).to(tl.int32)
        if bits != NOT_FINITE:
            best, s_S = value_of(bits), tl.arange(0, SP)
            lowest = tl.min(tl.load(low_ptr + b * parts + s_S, s_S < parts, other=float("inf")), 0)
            low, high, reached, short, few = -MOST, float("inf"), float("inf"), 0.0, by_k & (number < 0)
            # By top-p, what is ln(V / (1 - p)) temperatures below the best, or more, is too little altogether; a pivot
            # there is to be clear of the border, too.
            reach, share = REACH * temperature, 0.0
            if by_k == 0:
                others = ids / tl.maximum((1 - top_p).to(tl.float32) - 2 * SLACK, 2.0**-60)
                reach = tl.minimum(REACH, (tl.log(others) + 0.01).to(tl.float64)) * temperature
            base = tl.maximum((best - reach).to(tl.float32), lowest)
            if number > 0:
                low, high, reached, short, few, share = bracket(
                    pivot_ptr, measure_ptr, number - 1, rows, b, groups, best, inverse, top_k, top_p, by_k, SP, P, ROOM
                )
                base = tl.maximum(low, lowest)
            top = tl.minimum(high, best)
            out_ptr = measure_ptr + ((number * rows + b) * groups + g) * RECORD
            pivot_ptr += (number * rows + b) * RECORD
            if g == 0:
                tl.store(pivot_ptr + P, low)
                tl.store(pivot_ptr + P + 1, high)
                tl.store(pivot_ptr + P + 2, reached)
                tl.store(pivot_ptr + P + 3, short)
            if few:  # pivots without an end, which no measure reaches, change nothing
                j_J = tl.arange(0, RECORD)
                tl.store(out_ptr + j_J, tl.where(j_J == P, 1.0, 0.0))
                if g == 0:
                    tl.store(pivot_ptr + j_J, tl.full([RECORD], float("inf"), tl.float32), j_J < P)
            else:
                row_ptr = scores(logits_ptr, stride, adjusted_ptr, adjusted_stride, kind_ptr, handle, b)
                scale = (inverse * LOG2_E).to(tl.float32)
                pivot_0, pivot_1 = pivot_of(0, number, base, top, share), pivot_of(1, number, base, top, share)
                pivot_2, pivot_3 = pivot_of(2, number, base, top, share), pivot_of(3, number, base, top, share)
                pivot_4, pivot_5 = pivot_of(4, number, base, top, share), pivot_of(5, number, base, top, share)
                pivot_6, pivot_7 = pivot_of(6, number, base, top, share), pivot_of(7, number, base, top, share)
                # No sum over a program's lanes until the end: its warps wait for none of each other.
                all_M = tl.zeros([M], tl.float32)
                sum_0_M, sum_1_M, sum_2_M, sum_3_M = all_M, all_M, all_M, all_M
                sum_4_M, sum_5_M, sum_6_M, sum_7_M = all_M, all_M, all_M, all_M
                # That these are multiples of N has to show, or no load is wide.
                end = tl.minimum(g * each + each, parts) * N
                next_M = loaded(row_ptr, g * each * N, ids, end, M)
                for begin in range(g * each * N, end, M):
                    score_M = next_M
                    next_M = loaded(row_ptr, begin + M, ids, end, M)
                    weight_M = tl.exp2((score_M - best) * scale)
                    weight_M = tl.where(by_k, 1.0, weight_M)
                    all_M += weight_M
                    sum_0_M += (score_M >= pivot_0).to(tl.float32) * weight_M
                    sum_1_M += (score_M >= pivot_1).to(tl.float32) * weight_M
                    sum_2_M += (score_M >= pivot_2).to(tl.float32) * weight_M
                    sum_3_M += (score_M >= pivot_3).to(tl.float32) * weight_M
                    sum_4_M += (score_M >= pivot_4).to(tl.float32) * weight_M
                    sum_5_M += (score_M >= pivot_5).to(tl.float32) * weight_M
                    sum_6_M += (score_M >= pivot_6).to(tl.float32) * weight_M
                    sum_7_M += (score_M >= pivot_7).to(tl.float32) * weight_M
                tl.store(out_ptr, tl.sum(sum_0_M, 0))
                tl.store(out_ptr + 1, tl.sum(sum_1_M, 0))
                tl.store(out_ptr + 2, tl.sum(sum_2_M, 0))
                tl.store(out_ptr + 3, tl.sum(sum_3_M, 0))
                tl.store(out_ptr + 4, tl.sum(sum_4_M, 0))
                tl.store(out_ptr + 5, tl.sum(sum_5_M, 0))
                tl.store(out_ptr + 6, tl.sum(sum_6_M, 0))
                tl.store(out_ptr + 7, tl.sum(sum_7_M, 0))
                tl.store(out_ptr + P, tl.sum(all_M, 0))
                if g == 0:
                    for j in tl.static_range(P):
                        tl.store(pivot_ptr + j, pivot_of(j, number, base, top, share))


@triton.jit(do_not_specialize=["every", "rows", "parts", "groups", "each", "last"])
def sum_kernel(
    logits_ptr,  # float32 [B, V], rows `stride` apart
    stride,
    ids,
    adjusted_ptr,  # float32, rows `adjusted_stride` apart
    adjusted_stride,
    sequence_ptr,  # int64 [B]
    value_ptr,  # float64 [S, 5]
    kind_ptr,  # int32 [S]
    key_ptr,  # int64 [B, runs]
    pivot_ptr,  # float32 [rounds, B, RECORD]
    measure_ptr,  # float32 [rounds, B, groups, RECORD]
    bracket_ptr,  # out float32 [B, 2]
    sum_ptr,  # out int64 [B, groups, 4]: all weights; those from the high end on, and how many these are
    kept_ptr,  # out int64 [B, runs]: weights from the high end on that min-p keeps
    candidates_ptr,  # out int32 [B]: how many are in the bracket
    candidate_ptr,  # out int32 [B, ROOM]: their ids, as far as there is room
    every,  # 1: the bracket has no high end, all that is above the low one is a candidate
    rows,
    parts,
    groups,
    each,  # runs of a group
    last,
    N: tl.constexpr,
    M: tl.constexpr,
    SP: tl.constexpr,
    P: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Program (g, b): runs g·each … of row b. Without top-k and top-p all weights, and those that min-p keeps."""
    tl.static_assert(N // M < 32)
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    handle = tl.load(sequence_ptr + b)
    temperature, inverse, top_k, top_p, least, by_k, by_p = parameters(value_ptr, handle, ids)
    bits = (best_key(key_ptr, b, parts, SP) >> 32).to(tl.int32)
    if (temperature > 0) & (bits != NOT_FINITE):
        best, low, high, filters = value_of(bits), -MOST, -MOST, by_k | by_p
        steep, floor = slope(best, temperature, inverse)
        if filters:
            low, high, _, _, _, _ = bracket(
                pivot_ptr, measure_ptr, last, rows, b, groups, best, inverse, top_k, top_p, by_k, SP, P, ROOM
            )
            # top-p after top-k looks at all that top-k leaves.
            high = tl.where((every != 0) | (by_k & by_p), float("inf"), high)
        # What weighs nothing, as all that is masked, is no candidate; should this be rounded up, the sums tell.
        low = tl.where(every == 0, tl.maximum(low, (best - REACH * temperature).to(tl.float32)), low)
        if g == 0:
            tl.store(bracket_ptr + b * 2, low)
            tl.store(bracket_ptr + b * 2 + 1, high)
        row_ptr = scores(logits_ptr, stride, adjusted_ptr, adjusted_stride, kind_ptr, handle, b)
        all_M, above_M, number_M = tl.zeros([M], tl.int64), tl.zeros([M], tl.int64), tl.zeros([M], tl.int32)
        for s in range(g * each, tl.minimum(g * each + each, parts)):
            mine = value_of((tl.load(key_ptr + b * parts + s) >> 32).to(tl.int32))
            weighs = (mine.to(tl.float64) - best) * inverse > -REACH  # else no token of the run does
            kept_M, hit_M = tl.zeros([M], tl.int64), tl.zeros([M], tl.int32)  # a bit for each part
            if filters:
                if weighs | (mine >= low):
                    next_M = loaded(row_ptr, s * N, ids, s * N + N, M)
                    for part in range(N // M):
                        score_M = next_M
                        next_M = loaded(row_ptr, s * N + (part + 1) * M, ids, s * N + N, M)
                        weight_M = weight_of(score_M, best, steep, floor)
                        all_M += weight_M
                        is_above_M = score_M >= high
                        kept_M += tl.where(is_above_M, weight_M, 0)
                        number_M += is_above_M.to(tl.int32)
                        hit_M |= ((score_M >= low) & (score_M < high)).to(tl.int32) << part
                    above_M += kept_M
                    if least > 0:
                        kept_M = tl.zeros([M], tl.int64)
                        for begin in range(s * N, s * N + N, M):
                            id_M = begin + tl.arange(0, M)
                            score_M = tl.load(row_ptr + id_M, id_M < ids, other=-float("inf"))
                            weight_M = weight_of(score_M, best, steep, floor)
                            kept_M += tl.where((score_M >= high) & (weight_M >= least), weight_M, 0)
            elif weighs:
                next_M = loaded(row_ptr, s * N, ids, s * N + N, M)
                for part in range(N // M):
                    weight_M = weight_of(next_M, best, steep, floor)
                    next_M = loaded(row_ptr, s * N + (part + 1) * M, ids, s * N + N, M)
                    kept_M += tl.where(weight_M >= least, weight_M, 0)
                all_M += kept_M  # asked for without min-p only
            tl.store(kept_ptr + b * parts + s, tl.sum(kept_M, 0))
            if filters:
                found_M = bits_set(hit_M)
                found = tl.sum(found_M, 0)
                if found > 0:  # in any order: what comes of them does not depend on it
                    # Each lane has places of its own, one behind the other: none waits for another in the loop.
                    place_M = tl.atomic_add(candidates_ptr + b, found) + tl.cumsum(found_M, 0) - found_M
                    for _ in range(tl.max(found_M, 0)):
                        # The lowest bit's place is a float32's exponent.
                        part_M = ((hit_M & -hit_M).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
                        id_M = s * N + part_M * M + tl.arange(0, M)
                        tl.store(candidate_ptr + b * ROOM + place_M, id_M, (hit_M != 0) & (place_M < ROOM))
                        hit_M &= hit_M - 1
                        place_M += 1
        sum_ptr += (b * groups + g) * 4
        tl.store(sum_ptr, tl.sum(all_M, 0))
        if filters:
            tl.store(sum_ptr + 1, tl.sum(above_M, 0))
            tl.store(sum_ptr + 2, tl.sum(number_M, 0).to(tl.int64))
