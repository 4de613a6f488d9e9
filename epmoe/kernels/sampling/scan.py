"""The first pass: adjusted scores, and of each run of ids the best key and the lowest score.

Letters: N ids of a run · K entries of a list.
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
    K: tl.constexpr,  # `entries` rounded up to a power of two
):
    """Program (s, b): ids s·N … of row b. Each operation is rounded: launched without fusion."""
    s, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    id_N = s * N + tl.arange(0, N)
    real_N = id_N < ids
    score_N = tl.load(logits_ptr + b * stride + id_N, real_N, other=0)
    finite_N = tl.abs(score_N) < float("inf")  # of what the model made; NaN compares as false
    if penalty_ptr is not None:
        handle = tl.load(sequence_ptr + b)
        kind = tl.load(kind_ptr + handle)
        if kind != 0:
            out_ptr_N = adjusted_ptr + b * adjusted_stride + id_N
            if seen_ptr is not None:  # noqa: SIM102 -- known to the compiler
                if kind & SEEN != 0:
                    repetition = tl.load(penalty_ptr + handle * 3)
                    seen_N = tl.load(seen_ptr + handle * ids + id_N, real_N, other=0) != 0
                    less_N = tl.where(score_N < 0, score_N * repetition, tl.div_rn(score_N, repetition))
                    score_N = tl.where(seen_N, less_N, score_N)
            if number_ptr is not None:  # noqa: SIM102
                if kind & COUNT != 0:
                    frequency, presence = tl.load(penalty_ptr + handle * 3 + 1), tl.load(penalty_ptr + handle * 3 + 2)
                    number_N = tl.load(number_ptr + handle * ids + id_N, real_N, other=0)
                    score_N -= number_N.to(tl.float32) * frequency + tl.where(number_N > 0, presence, 0.0)
            if listed_id_ptr is not None:  # noqa: SIM102
                if kind & LISTED != 0:
                    # Through memory, since only there an entry finds its id; several may have the same one.
                    tl.store(out_ptr_N, score_N, real_N)
                    tl.debug_barrier()
                    k_K = tl.arange(0, K)
                    at_K = handle * entries + k_K
                    entry_K = tl.load(listed_id_ptr + at_K, k_K < entries, other=-1)
                    until_K = tl.load(listed_until_ptr + at_K, k_K < entries, other=0)
                    mine_K = (entry_K >= s * N) & (entry_K < s * N + N) & (tl.load(position_ptr + b) < until_K)
                    value_K = tl.load(listed_value_ptr + at_K, mine_K, other=0)
                    tl.atomic_add(adjusted_ptr + b * adjusted_stride + entry_K, value_K, mine_K)
                    tl.debug_barrier()
                    score_N = tl.load(out_ptr_N, real_N, other=0, volatile=True)
            if allowed_ptr is not None:  # noqa: SIM102
                if kind & ALLOWED != 0:
                    word_N = tl.load(allowed_ptr + handle * words + id_N // 32, real_N, other=0)
                    score_N = tl.where((word_N >> (id_N % 32)) & 1 != 0, score_N, -MOST)
            score_N = tl.minimum(tl.maximum(score_N, -MOST), MOST)
            tl.store(out_ptr_N, score_N, real_N)
    bits_N = tl.where(finite_N, ordered(score_N), NOT_FINITE)
    bits = tl.max(tl.where(real_N, bits_N, -NOT_FINITE - 1), 0)
    id = tl.min(tl.where(real_N & (bits_N == bits), id_N, ids), 0)
    tl.store(key_ptr + b * parts + s, (bits.to(tl.int64) << 32) + (id.to(tl.int64) ^ LOW))
    tl.store(low_ptr + b * parts + s, tl.min(tl.where(real_N & (score_N > -MOST), score_N, float("inf")), 0))
    if s == 0:
        tl.store(candidates_ptr + b, 0)
