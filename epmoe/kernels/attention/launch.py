"""Attention over the paged cache in Triton: what `attention.cached_attention` computes, with the same signature.

Letters: T tokens of a step · B rows, sequences that decode · P spans, prompts or pieces of them · X kinds of their
runs (prefill.py), Y runs of a kind · E query heads · J key/value heads · G = E/J · D head dimension · F = D/2 · R rows
of a layer's cache.

A decode reads the cache once, in splits of SPLIT positions; memory beyond the result: a split's float32 [E, D] for
every SPLIT positions that the sequences can have together. Nothing waits for the device. Where a step is known on the
device alone, the grids follow its sizes and the cache's capacity only, so that it fits a CUDA graph. A query's result
depends neither on the batch nor on whether it is a row's or a span's (softmax.py, Order).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import triton

from epmoe.cache.pages import DRAFTED, SHARED
from epmoe.cache.plan import Plan, Rows, Spans
from epmoe.cache.rows import PagedRows
from epmoe.kernels.attention.decode import combine_kernel, decode_kernel, place_rows_kernel
from epmoe.kernels.attention.prefill import find_runs_kernel, place_kernel, prefill_kernel
from epmoe.kernels.capture import beside
from epmoe.kernels.gpu import dependent, early, generation

# Positions of a split: 64 KiB of keys and values a head in bf16, beside which the 4 KiB of its result, written and read
# again, are few. It sets the order of summation, so it is one number for all batches and lengths.
SPLIT = 256
# Splits that are under way while the combining kernel adds one: 2 KB of shared memory each.
AHEAD = 8


@dataclass(frozen=True)
class AttentionTile:
    """`queries` (tokens × heads of a group, padded) × `positions` a block."""

    queries: int
    positions: int
    warps: int
    stages: int
    programs: int = 0  # a multiprocessor; only a decode's grid follows it
    registers: int | None = None  # a thread's, at most, on Hopper; None: as many as the assembler takes


DECODE: dict[torch.dtype, AttentionTile] = {
    torch.bfloat16: AttentionTile(queries=16, positions=64, warps=4, stages=3, programs=5),
    torch.float32: AttentionTile(queries=16, positions=32, warps=4, stages=2, programs=4),
}
PREFILL: dict[torch.dtype, AttentionTile] = {
    # Small, so that one finds room beside a decode's (BESIDE). Left to itself, the assembler takes more registers for
    # layers without a window.
    torch.bfloat16: AttentionTile(queries=64, positions=64, warps=4, stages=3, registers=128),
    # For comparison, not for speed: float32 has no exact tensor core product.
    torch.float32: AttentionTile(queries=32, positions=32, warps=4, stages=2, registers=168),
}
# Programs of a decode on a multiprocessor, at most, where a step has prompts: one of a prefill has room beside them.
BESIDE = 4
# Tokens that one program of the placing kernel moves.
PLACED = 64
PLACED_ROWS = 16  # likewise of rows with drafts
# No multiplication is fused with an addition but where a kernel says so: each kernel would choose for itself.
AS_WRITTEN = {"enable_fp_fusion": False}


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q_TED, k_TJD, v_TJD
Parts = Sequence[torch.Tensor]  # of splits: outputs, maxima, sums
Pair = tuple[torch.Tensor, torch.Tensor]  # cos_TF and sin_TF; or keys and values of a layer's cache, [J, R, D] each


def serves(x: torch.Tensor) -> bool:
    """Any rows."""
    return True


def cached_attention(
    heads: Heads,
    cos_sin: Pair,
    cached: Pair,
    plan: Plan,
    sink_E: torch.Tensor,
    among: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """As `layers.attention.cached_attention`: rotate, attend to [cached | new], write keys and values; [T, E, D].

    A row of a tile has the same bits in any place of it, beside any others: it does not matter `among` which it stands.

    bfloat16 or float32, the cache in the same dtype; the tokens of q, k and v may stand apart by any stride.
    """
    _check(heads, cos_sin, cached, sink_E)
    q_TED = heads[0]
    if plan.padded:  # tokens that belong to nothing have zeros, and all layers write the same others
        if "out" not in plan.shared:
            plan.shared["out"] = torch.zeros(q_TED.shape, dtype=q_TED.dtype, device=q_TED.device)
        out_TED = plan.shared["out"]
    else:
        out_TED = torch.empty(q_TED.shape, dtype=q_TED.dtype, device=q_TED.device)
    spans, rows = plan.spans, plan.rows
    parts = _parts(q_TED, rows) if rows is not None else ()  # here: a graph's memory is apart by stream
    of_spans = of_rows = None
    if spans is not None:
        runs = _runs(heads, spans, plan.shared)
        of_spans = partial(_attend_spans, heads, cos_sin, cached, spans, runs, sink_E, out_TED)
    if rows is not None:
        programs = DECODE[q_TED.dtype].programs if spans is None else min(DECODE[q_TED.dtype].programs, BESIDE)
        of_rows = partial(_decode, heads, cos_sin, cached, rows, sink_E, out_TED, parts, programs)
    if of_spans is not None and of_rows is not None:
        # A decode waits for memory, and leaves room on each multiprocessor (BESIDE) for a prefill, whose programs go
        # block after block. Neither reads what the other writes: rows and pages of its own.
        beside(q_TED.device, of_spans, of_rows)
    elif of_spans is not None:
        of_spans()
    elif of_rows is not None:
        of_rows()
    return out_TED


def _parts(q_TED: torch.Tensor, rows: Rows) -> Parts:
    """Memory for what splits give: outputs, maxima and sums; empty where no sequence can have more than one."""
    _, query_heads, head_dim = q_TED.shape
    tiles = most_tiles(rows.pool, len(rows.sequence_B), drafted=rows.drafted)
    of_heads = tiles * query_heads if tiles > len(rows.sequence_B) else 0
    part = torch.empty(of_heads * (head_dim + 2), dtype=torch.float32, device=q_TED.device)
    return part.split([of_heads * head_dim, of_heads, of_heads])


def _decode(
    heads: Heads,
    cos_sin: Pair,
    cached: Pair,
    rows: Rows,
    sink_E: torch.Tensor,
    out_TED: torch.Tensor,
    parts: Parts,
    programs: int,
) -> None:
    """One launch for a window within SPLIT, else two; one more before them where sequences have drafts."""
    q_TED, k_TJD, v_TJD = heads
    (_, query_heads, head_dim), kv_heads, most = q_TED.shape, k_TJD.shape[1], len(rows.sequence_B)
    tile, pool = DECODE[q_TED.dtype], rows.pool
    tiles = len(parts[-1]) // query_heads or most
    if rows.drafted:
        _place_rows(heads, cos_sin, cached, rows)
    shared = {"WINDOW": pool.window or 0, "ROWS": _bucket(most), "SPLIT": SPLIT, "D": head_dim, "DP": _padded(head_dim)}
    shared["PDL"] = dependent(q_TED.device)
    decode_kernel[(min(tiles * kv_heads, programs * _multiprocessors(q_TED.device)),)](
        q_TED,
        k_TJD,
        v_TJD,
        *cos_sin,
        rows.position_B,
        rows.sequence_B,
        rows.count_1,
        pool.table,
        *cached,
        sink_E,
        out_TED,
        *parts,
        most,
        q_TED.stride(0),
        k_TJD.stride(0),
        v_TJD.stride(0),
        pool.table.stride(0),
        cached[0].shape[1],
        _scale(head_dim),
        J=kv_heads,
        G=query_heads // kv_heads,
        PAGE=pool.page,
        M=max(tile.queries, triton.next_power_of_2(query_heads // kv_heads)),
        N=tile.positions,
        PLACED=rows.drafted,
        **shared,
        **AS_WRITTEN,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tiles > most:
        combine_kernel[(most, kv_heads)](
            rows.position_B,
            rows.count_1,
            sink_E,
            *parts,
            out_TED,
            most,
            J=kv_heads,
            G=query_heads // kv_heads,
            AHEAD=AHEAD,
            **shared,
            **AS_WRITTEN,
            **combine_options(query_heads // kv_heads, head_dim),
        )


def _place_rows(heads: Heads, cos_sin: Pair, cached: Pair, rows: Rows) -> None:
    _, k_TJD, v_TJD = heads
    (_, kv_heads, head_dim), most, pool = k_TJD.shape, len(rows.sequence_B), rows.pool
    place_rows_kernel[(triton.cdiv(most, PLACED_ROWS), kv_heads)](
        k_TJD,
        v_TJD,
        *cos_sin,
        rows.position_B,
        rows.sequence_B,
        rows.count_1,
        pool.table,
        *cached,
        most,
        k_TJD.stride(0),
        v_TJD.stride(0),
        pool.table.stride(0),
        cached[0].shape[1],
        D=head_dim,
        PAGE=pool.page,
        M=PLACED_ROWS,
        DP=_padded(head_dim),
        **AS_WRITTEN,
    )


def combine_options(group: int, head_dim: int) -> dict[str, int]:
    """4 values of a split are a thread's."""
    padded = triton.next_power_of_2(group)
    return {"GP": padded, "num_warps": min(16, max(1, padded * _padded(head_dim) // (32 * 4)))}


def _attend_spans(
    heads: Heads,
    cos_sin: Pair,
    cached: Pair,
    spans: Spans,
    run_XY4: torch.Tensor,
    sink_E: torch.Tensor,
    out_TED: torch.Tensor,
) -> None:
    """Put all spans' keys and values into place, then let them attend."""
    _place_spans(heads, cos_sin, cached, spans, run_XY4[0])
    _prefill(heads, cos_sin, cached, spans, run_XY4[1], sink_E, out_TED)


def _runs(heads: Heads, spans: Spans, shared: dict[str, torch.Tensor]) -> torch.Tensor:
    """int32 [X=2, Y, 4]: the runs of the spans that programs of the placing kernel take, and those of a prefill.

    The first layer of a step finds them; they are in `shared` then.
    """
    placing, attending = PLACED, _attending(heads)
    if (key := f"runs of {attending}") not in shared:
        most = spans.runs(min(placing, attending))
        run_XY4 = torch.empty(2, most, 4, dtype=torch.int32, device=heads[0].device)
        constants = {"PLACING": placing, "ATTENDING": attending, "num_warps": 1}
        find_runs_kernel[(most, 2)](spans.span_P4, len(spans.span_P4), run_XY4, most, **constants)
        shared[key] = run_XY4
    return shared[key]


def _attending(heads: Heads) -> int:
    """Tokens of a prefill's tile."""
    group = _group(heads)
    return max(PREFILL[heads[0].dtype].queries, group) // group


def _group(heads: Heads) -> int:
    """Rows of a prefill's tile that a token has."""
    return triton.next_power_of_2(heads[0].shape[1] // heads[1].shape[1])


def _place_spans(heads: Heads, cos_sin: Pair, cached: Pair, spans: Spans, run_Y4: torch.Tensor) -> None:
    """Put all spans' keys and values into place.

    The prefill, which comes in before this ends, reads queries and writes results before it waits: so this lets it in
    only when it has waited itself.
    """
    _, k_TJD, v_TJD = heads
    place_kernel[(k_TJD.shape[1] * spans.runs(PLACED),)](
        k_TJD,
        v_TJD,
        *cos_sin,
        *cached,
        k_TJD.stride(0),
        v_TJD.stride(0),
        M=PLACED,
        **_of_spans(heads, cached, spans, run_Y4),
        **AS_WRITTEN,
        **early(k_TJD.device),
    )


def _prefill(
    heads: Heads,
    cos_sin: Pair,
    cached: Pair,
    spans: Spans,
    run_Y4: torch.Tensor,
    sink_E: torch.Tensor,
    out_TED: torch.Tensor,
) -> None:
    """All spans, whose keys and values are in place, attend in one launch."""
    q_TED, k_TJD, _ = heads
    (_, query_heads, head_dim), kv_heads = q_TED.shape, k_TJD.shape[1]
    tile, group, tokens = PREFILL[q_TED.dtype], _group(heads), _attending(heads)
    prefill_kernel[(kv_heads * spans.runs(tokens),)](
        q_TED,
        *cos_sin,
        *cached,
        sink_E,
        out_TED,
        q_TED.stride(0),
        _scale(head_dim),
        G=query_heads // kv_heads,
        WINDOW=spans.pool.window or 0,
        SPLIT=SPLIT,
        M=tokens * group,
        GP=group,
        N=tile.positions,
        **_of_spans(heads, cached, spans, run_Y4),
        **AS_WRITTEN,
        **early(q_TED.device),
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers if generation(q_TED.device) == 9 else None,
    )


def _of_spans(heads: Heads, cached: Pair, spans: Spans, run_Y4: torch.Tensor) -> dict[str, Any]:
    """Arguments that the kernels of spans share."""
    (_, kv_heads, head_dim), pool = heads[1].shape, spans.pool
    return {
        "run_ptr": run_Y4,
        "table_ptr": pool.table,
        "table_stride": pool.table.stride(0),
        "cache_rows": cached[0].shape[1],
        "J": kv_heads,
        "D": head_dim,
        "DP": _padded(head_dim),
        "PAGE": pool.page,
    }


def most_tiles(pool: PagedRows, rows: int, *, drafted: bool = False) -> int:
    """The most splits that `rows` sequences, or with `drafted` rows, can have together, whatever their lengths."""
    if pool.window is not None:  # one that is longer than a split may begin and end within one
        return rows if pool.window <= SPLIT else rows * (triton.cdiv(pool.window - 1, SPLIT) + 1)
    # Each sequence may have one split that is not full; the spare one has one position.
    free = rows * triton.cdiv(DRAFTED, SPLIT) if drafted else 0
    return min(rows * triton.cdiv(pool.positions, SPLIT), SHARED * pool.pages * pool.page // SPLIT + rows + free)


def _check(heads: Heads, cos_sin: Pair, cached: Pair, sink_E: torch.Tensor) -> None:
    """What the kernels take for granted."""
    q_TED, k_TJD, v_TJD = heads
    (tokens, query_heads, head_dim), kv_heads = q_TED.shape, k_TJD.shape[1]
    assert q_TED.dtype in DECODE, f"attention's kernels compute in bfloat16 or float32, not {q_TED.dtype}"
    assert (
        k_TJD.shape == v_TJD.shape == (tokens, kv_heads, head_dim) and query_heads % kv_heads == 0 and head_dim % 2 == 0
    )
    for x in (q_TED, k_TJD, v_TJD):
        assert x.dtype == q_TED.dtype and x.stride()[1:] == (head_dim, 1)
    for store_JRD in cached:
        assert store_JRD.dtype == q_TED.dtype and store_JRD.is_contiguous()
        assert store_JRD.shape[0] == kv_heads and store_JRD.shape[2] == head_dim
    for turn_TF in cos_sin:
        assert turn_TF.dtype == torch.float32 and turn_TF.is_contiguous() and turn_TF.shape == (tokens, head_dim // 2)
    assert sink_E.shape == (query_heads,) and sink_E.is_contiguous()


def _scale(head_dim: int) -> float:
    return math.log2(math.e) / math.sqrt(head_dim)


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _bucket(count: int) -> int:
    """A length of the kernels' vectors: 32, 128, 256, 1024 ...; few, since each compiles a kernel.

    32 are the lanes of a warp: each warp sums them by itself, without waiting for the others. 256 are what the most
    sequences of a graph need; with 512 the decode kernel took more registers than its programs have.
    """
    length = 32
    while length < count:
        length *= 2 if length == 128 else 4
    return length


@cache
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter, few enough that a program does several splits.
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
