#!/usr/bin/env python3
"""One layer's attention over the paged cache on one GPU: µs a call, against the machine's limits.

    scripts/bench/attention.py                                 (the tables)
    scripts/bench/attention.py --short --variants --kinds prefill
    scripts/bench/attention.py --context 8192 --batch 1,64 --variants

Rotation, the new rows' write and both kernels of a decode and of a prefill are in it; projections are not. `--short`
takes a few rows, and the first tiles of each list of variants: less than 40 s for each of --kinds.

A CUDA graph holds the calls, each of them for other sequences with their own rows of the cache: as many as it takes to
pass four times the L2 cache before one comes back. Time: the median of REPLAYS replays, divided by the calls.

floor of a decode: (keys and values that it sees, q, the result and the new rows, each once) / bandwidth. floor of a
prefill: 4·D FLOP for every visible (query head, position) / FLOP/s. Both limits are measured at the start unless given
(scripts/bench/moe.py). `sdpa` is torch's attention for the same chunk, causal, without sinks, windows and a cache. The
last line is one JSON object.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.cache.plan import Plan
from epmoe.kernels.attention import launch as attention_triton
from epmoe.kernels.attention.launch import AttentionTile, cached_attention
from epmoe.kernels.attention.launch import Heads as Projected
from scripts.bench.moe import REPLAYS, limits, measure_us

LEAST_CALLS, MOST_CALLS = 16, 512
BF16 = torch.bfloat16

# Tiles for --variants, the most promising first.
# decode: positions of a block × warps × stages × programs a multiprocessor × positions of a split
DECODE_VARIANTS = (
    "64x4x3x5x256 64x4x3x4x256 64x4x4x4x256 64x4x3x3x256 64x8x3x2x256 64x4x3x4x512 64x4x3x8x256 32x4x4x4x256 "
    "128x4x2x3x256 128x4x3x2x256 64x2x3x6x256 64x4x3x4x128 64x4x4x4x512 128x4x3x3x512"
)
# prefill: rows of queries × positions of a block × warps × stages (× registers of a thread, at most)
PREFILL_VARIANTS = (
    "64x64x4x3x128 64x64x4x2x128 128x64x8x3x128 64x64x4x2 128x64x8x2x128 64x128x4x2 128x128x8x2 128x64x8x4x128 "
    "64x64x4x3 128x128x8x3"
)
SHORT = {"context": "8192", "batch": "1,64", "cached": "0,6144"}
SHORT_VARIANTS = 5


@dataclass(frozen=True)
class Heads:
    """Sizes of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    page: int

    @property
    def row_bytes(self) -> int:
        """A position's key and value."""
        return 2 * self.kv_heads * self.head_dim * 2

    def inputs(self, tokens: int) -> tuple[Projected, tuple[torch.Tensor, torch.Tensor]]:
        """q, k, v and (cos, sin) of some tokens."""
        q, k, v = (
            torch.randn(tokens, heads, self.head_dim, device="cuda", dtype=BF16)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        angle = torch.rand(tokens, self.head_dim // 2, device="cuda") * 6
        return (q, k, v), (angle.cos(), angle.sin())

    def cache(self, window: int | None, sequences: int, tokens: int, new: int = 1) -> tuple[Cache, list[int]]:
        """Random rows, and the handles of `sequences` sequences of `tokens` positions, the last of which are new; their
        pages lie anywhere."""
        total = sequences * -(-tokens // self.page) * self.page
        store = Cache(
            CacheConfig(
                [window],
                self.kv_heads,
                self.head_dim,
                tokens=total,
                sequences=sequences,
                page=self.page,
                dtype=BF16,
                step=sequences * new,
            ),
            "cuda",
        )
        for layer in store.layers:
            layer.normal_()
        for stock in store.pages.stocks:
            random.Random(0).shuffle(stock.free)
        return store, [store.admit(tokens, tokens - new) for _ in range(sequences)]


def rotation(bytes_a_call: int) -> int:
    """Calls until one set of rows comes back."""
    past = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_CALLS, math.ceil(past / bytes_a_call)))


def bench_decode(heads: Heads, batch: int, context: int, window: int | None, limit: Any, options: Any) -> dict:
    """One row: `batch` sequences of `context` positions, the new one included."""
    seen = context if window is None else min(context, window)
    moved = batch * ((seen + 1) * heads.row_bytes + 2 * heads.heads * heads.head_dim * 2)
    sets = rotation(moved)
    store, handles = heads.cache(window, sets * batch, context)
    position_B = torch.full((batch,), context - 1, device="cuda")
    plans: list[Plan] = []
    for index in range(sets):
        sequence_B = torch.tensor(handles[index * batch : (index + 1) * batch], device="cuda")
        plans.append(store.plan(Step(torch.zeros_like(position_B), position_B, sequence_B))[window])
    inputs, sink_E = heads.inputs(batch), torch.randn(heads.heads, device="cuda", dtype=BF16)

    def call(index: int) -> None:
        cached_attention(*inputs, store.layer(0), plans[index % sets], sink_E)

    row: dict = {"kind": "decode", "window": window, "context": context, "batch": batch, "sets": sets}
    return finish(row, call, max(LEAST_CALLS, sets), 1e6 * moved / limit[0], options, decode_tile, DECODE_VARIANTS)


def bench_prefill(heads: Heads, chunk: int, cached: int, window: int | None, limit: Any, options: Any) -> dict:
    """One row: one sequence's chunk after `cached` positions."""
    store, (handle,) = heads.cache(window, 1, chunk + cached, chunk)
    position_T = torch.arange(cached, cached + chunk, device="cuda")
    step = Step(position_T, position_T, position_T[:0], spans=((0, chunk, cached, handle),), output_O=position_T[:1])
    plan = store.plan(step)[window]
    inputs, sink_E = heads.inputs(chunk), torch.randn(heads.heads, device="cuda", dtype=BF16)
    visible = sum(p + 1 if window is None else min(p + 1, window) for p in range(cached, cached + chunk))
    flops = 4 * heads.head_dim * heads.heads * visible

    def call(index: int) -> None:
        cached_attention(*inputs, store.layer(0), plan, sink_E)

    row: dict = {"kind": "prefill", "window": window, "cached": cached, "chunk": chunk}
    row = finish(row, call, LEAST_CALLS, 1e6 * flops / limit[1], options, prefill_tile, PREFILL_VARIANTS)
    row["tflops"] = flops / row["us"] / 1e6
    if window is None and not cached:
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in inputs[0])
        attend = torch.nn.functional.scaled_dot_product_attention
        row["sdpa_us"] = measure_us(lambda _: attend(q, k, v, is_causal=True, enable_gqa=True), LEAST_CALLS)
        print(f"    sdpa_us {row['sdpa_us']:.1f}", flush=True)
    return row


def finish(
    row: dict, call: Callable[[int], None], calls: int, floor_us: float, options: Any, tile: Any, variants: str
) -> dict:
    """Measure and print a row, and the variants when asked for."""
    row |= {"floor_us": floor_us, "us": measure_us(call, calls)}
    row["of_floor"] = row["us"] / floor_us
    print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if options.variants:
        row["variants"] = {}
        for name in variants.split()[: SHORT_VARIANTS if options.short else None]:
            with tile(name):
                try:
                    row["variants"][name] = measure_us(call, calls)
                except triton.runtime.errors.OutOfResources as error:
                    print(f"    {name}: {error}")
        best = sorted(row["variants"].items(), key=lambda item: item[1])
        print("    " + "  ".join(f"{name} {us:.1f}" for name, us in best), flush=True)
    return row


@contextmanager
def decode_tile(name: str) -> Iterator[None]:
    """Decodes run with this variant."""
    shipped = attention_triton.DECODE[BF16], attention_triton.SPLIT
    positions, warps, stages, programs, split = map(int, name.split("x"))
    attention_triton.DECODE[BF16] = AttentionTile(shipped[0].queries, positions, warps, stages, programs)
    attention_triton.SPLIT = split
    try:
        yield
    finally:
        attention_triton.DECODE[BF16], attention_triton.SPLIT = shipped


@contextmanager
def prefill_tile(name: str) -> Iterator[None]:
    """Prefills run with this variant."""
    shipped = attention_triton.PREFILL[BF16]
    queries, positions, warps, stages, *registers = map(int, name.split("x"))
    attention_triton.PREFILL[BF16] = AttentionTile(queries, positions, warps, stages, registers=(*registers, None)[0])
    try:
        yield
    finally:
        attention_triton.PREFILL[BF16] = shipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", default="128,8192,32768", help="positions of a decoding sequence, with commas")
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--window", type=int, default=128, help="of the layers with a window")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prefill; 0: no prefill")
    parser.add_argument("--cached", default="0,6144,30720", help="positions before the chunk, with commas")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--bandwidth", type=float, default=0.0, help="TB/s for the floor; 0: measured")
    parser.add_argument("--flops", type=float, default=0.0, help="TFLOP/s for the floor; 0: measured")
    parser.add_argument("--variants", action="store_true", help="time other tiles too")
    parser.add_argument("--kinds", default="decode,prefill", help="one of them, or both with a comma")
    parser.add_argument("--short", action="store_true", help=f"few rows: {SHORT}, and {SHORT_VARIANTS} variants")
    parser.set_defaults(**(SHORT if "--short" in sys.argv else {}))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("scripts/bench/attention.py needs a CUDA device")
    torch.manual_seed(0)

    heads = Heads(options.heads, options.kv_heads, options.head_dim, options.page)
    limit = limits(options)
    rows = []
    contexts = [int(context) for context in options.context.split(",")]
    shapes = [(context, None) for context in contexts] + [(max(contexts), options.window)]
    for context, window in shapes if "decode" in options.kinds else ():
        rows += [bench_decode(heads, int(batch), context, window, limit, options) for batch in options.batch.split(",")]
    for window in (None, options.window) if options.chunk and "prefill" in options.kinds else ():
        for cached in options.cached.split(","):
            rows.append(bench_prefill(heads, options.chunk, int(cached), window, limit, options))
    record = {
        "bench": "attention",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bandwidth": limit[0],
        "flops": limit[1],
        "replays": REPLAYS,
        **asdict(heads),
        "decode_tile": asdict(attention_triton.DECODE[BF16]),
        "split": attention_triton.SPLIT,
        "prefill_tile": asdict(attention_triton.PREFILL[BF16]),
        "rows": rows,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
