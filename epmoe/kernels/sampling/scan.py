"""The first pass: adjusted scores, and of each run of ids the best key and the lowest score.

Letters: N ids of a run · M of them at a time · K entries of a list.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.sampling.numbers import LOW, MOST, NOT_FINITE, ordered

SEEN, COUNT, LISTED, ALLOWED = (tl.constexpr(1 << bit) for bit in range(4))  # batch.KINDS


@triton.jit(do_not_specialize=["parts"])
def scan_kernel(
    logits_ptr,  # float32 [B, V], rows `stride` apart
    stride,
    ids,
    sequence_ptr,  # int64 [B]
    position_ptr,  # int64 [B]
    kind_ptr,  # int32 [S]
    penalty_ptr,  # float32 [S, 3]; None: no row is adjusted
    seen_ptr,  # uint8 [S, V], or None
    number_ptr,  # int32 [S, V], or None: how often an answer has an id
    listed_id_ptr,  # int64 [S, K], or None
    listed_value_ptr,  # float32 [S, K]
    listed_until_ptr,  # int64 [S, K]
    entries,
    allowed_ptr,  # int32 [S, W], or None
    words,
    adjusted_ptr,  # out float32 [B, …], of rows that are adjusted
    adjusted_stride,
    key_ptr,  # out int64 [B, runs]: bits · 2^32 + 2^32 - 1 - id
    low_ptr,  # out float32 [B, runs], of what is not masked
    candidates_ptr,  # out int32 [B]: 0
    parts,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,  # `entries` rounded up to a power of two
):
    """Program (s, b): ids s·N … of row b, M at a time. Each operation is rounded: launched without fusion."""
    s, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + b * stride
    kind = 0
    if penalty_ptr is not None:
        handle = tl.load(sequence_ptr + b)
        kind = tl.load(kind_ptr + handle)
    # Of each lane, and of all at the end: a program's warps wait for none of each other in between.
    best_M, best_id_M = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.int32)
    low_M = tl.full([M], float("inf"), tl.float32)
    id_M = s * N + tl.arange(0, M)
    next_M = tl.load(row_ptr + id_M, id_M < ids, other=-MOST)  # behind the row: as what is masked, with a larger id
    for part in range(N // M):
        id_M = s * N + part * M + tl.arange(0, M)
        real_M, score_M = id_M < ids, next_M
        if part + 1 < N // M:
            next_M = tl.load(row_ptr + id_M + M, id_M + M < ids, other=-MOST)
        finite_M = tl.abs(score_M) < float("inf")  # of what the model made; NaN compares as false
        if penalty_ptr is not None:  # noqa: SIM102 -- known to the compiler
            if kind != 0:
                out_ptr_M = adjusted_ptr + b * adjusted_stride + id_M
                if seen_ptr is not None:  # noqa: SIM102
                    if kind & SEEN != 0:
                        repetition = tl.load(penalty_ptr + handle * 3)
                        seen_M = tl.load(seen_ptr + handle * ids + id_M, real_M, other=0) != 0
                        less_M = tl.where(score_M < 0, score_M * repetition, tl.div_rn(score_M, repetition))
                        score_M = tl.where(seen_M, less_M, score_M)
                if number_ptr is not None:  # noqa: SIM102
                    if kind & COUNT != 0:
                        frequency, presence = (
                            tl.load(penalty_ptr + handle * 3 + 1),
                            tl.load(penalty_ptr + handle * 3 + 2),
                        )
                        number_M = tl.load(number_ptr + handle * ids + id_M, real_M, other=0)
                        score_M -= number_M.to(tl.float32) * frequency + tl.where(number_M > 0, presence, 0.0)
                if listed_id_ptr is not None:  # noqa: SIM102
                    if kind & LISTED != 0:
                        # Through memory, since only there an entry finds its id; several may have the same one.
                        tl.store(out_ptr_M, score_M, real_M)
                        tl.debug_barrier()
                        k_K, begin = tl.arange(0, K), s * N + part * M
                        at_K = handle * entries + k_K
                        entry_K = tl.load(listed_id_ptr + at_K, k_K < entries, other=-1)
                        until_K = tl.load(listed_until_ptr + at_K, k_K < entries, other=0)
                        mine_K = (entry_K >= begin) & (entry_K < begin + M) & (tl.load(position_ptr + b) < until_K)
                        value_K = tl.load(listed_value_ptr + at_K, mine_K, other=0)
                        tl.atomic_add(adjusted_ptr + b * adjusted_stride + entry_K, value_K, mine_K)
                        tl.debug_barrier()
                        score_M = tl.load(out_ptr_M, real_M, other=-MOST, volatile=True)
                if allowed_ptr is not None:  # noqa: SIM102
                    if kind & ALLOWED != 0:
                        word_M = tl.load(allowed_ptr + handle * words + id_M // 32, real_M, other=0)
                        score_M = tl.where((word_M >> (id_M % 32)) & 1 != 0, score_M, -MOST)
                score_M = tl.minimum(tl.maximum(score_M, -MOST), MOST)
                tl.store(out_ptr_M, score_M, real_M)
        here_M = tl.where(finite_M, score_M, float("inf"))
        better_M = here_M > best_M  # of equal ones the first, whose id is the least
        best_M, best_id_M = tl.where(better_M, here_M, best_M), tl.where(better_M, id_M, best_id_M)
        low_M = tl.minimum(low_M, tl.where(score_M > -MOST, score_M, float("inf")))
    bits_M = tl.where(best_M < float("inf"), ordered(best_M), NOT_FINITE)
    tl.store(key_ptr + b * parts + s, tl.max((bits_M.to(tl.int64) << 32) + (best_id_M.to(tl.int64) ^ LOW), 0))
    tl.store(low_ptr + b * parts + s, tl.min(low_M, 0))
    if s == 0:
        tl.store(candidates_ptr + b, 0)
