#!/usr/bin/env python3
"""One MoE layer's two expert products on one GPU: µs a call, against the machine's limits and the community kernels.

    scripts/bench/moe.py                                     (the table)
    scripts/bench/moe.py --peer KERNEL                       (gpt-oss-triton-kernels in the same run; as hub.kernel)
    scripts/bench/moe.py --experts 32/32 --tokens 1,64 --variants

A CUDA graph holds CALLS calls, each with other tokens, another routing and, in turn, other copies of the layer's
weights: as many copies as it takes to pass four times the L2 cache before one comes back. Time: the median of REPLAYS
replays, divided by CALLS. Of "L/E" experts, L live here; tokens choose K of all E, so a call has about T·K·L/E rows.
The router, and the sum over a token's K rows, are not in it. Of the peer there are three times: peer_us as others use
it, its index made before and a token's rows added inside its second product; hub_us as experts=hub, rows of slots, the
index included; bitwise_us the same with hub.bitwise=true.

floor: the larger of (bytes of the chosen experts, x, h and y, each once) / bandwidth and products / FLOP/s, meaned over
the calls. Both limits are measured at the start (an elementwise kernel over 2 GiB, read and written
bytes; an 8192³ bf16 product) unless given. The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.config.schema import Hub
from epmoe.formats import ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.kernels.gpu import generation
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.hub import HubExperts
from epmoe.moe.experts.triton import TritonExperts
from epmoe.moe.experts.triton.tiles import TILES, ExpertTile, table
from epmoe.moe.router import Dispatch
from epmoe.moe.router.reference import route
from scripts.bench.hub_peer import routing, summed

CALLS, REPLAYS = 16, 20
Forward = Callable[[int], Any]  # the number of the call → its launches

# weight rows × tokens × words × warps × stages; `words` sets the order of summation, so it is one number in a table
VARIANTS = (
    "64x8x64x4x3 64x16x64x4x3 64x16x64x4x4 64x16x32x4x6 128x16x64x4x3 128x16x64x4x4 128x16x64x8x3 128x32x64x4x3 "
    "128x32x64x8x3 128x64x32x8x4 128x64x64x4x2 128x64x64x8x2 128x64x64x8x3 256x64x64x8x2 128x128x32x8x3 128x128x32x8x4 "
    "128x128x64x8x2 256x128x32x8x3"
)


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer: L of E experts are here."""

    local: int
    experts: int
    hidden: int
    intermediate: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * 17 // 32  # 16 bytes and a scale byte for 32 values

    def floor_us(self, dispatches: list[Dispatch], bandwidth: float, flops: float) -> float:
        times = []
        for dispatch in dispatches:
            count_L = dispatch.offset_L1.diff()
            rows, chosen = int(count_L.sum()), int((count_L > 0).sum())
            tokens = dispatch.expert_TK.shape[0]
            moved = chosen * self.expert_bytes + 2 * (
                min(rows, tokens) * self.hidden + 2 * rows * self.intermediate + rows * self.hidden
            )
            times.append(max(moved / bandwidth, 6 * rows * self.hidden * self.intermediate / flops))
        return 1e6 * statistics.mean(times)


def random_weights(layer: Layer, seed: int) -> ExpertWeights:
    """Uniform block bytes under scale bytes 119 and 120; biases in bf16."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def matrix(rows: int, columns: int) -> Mxfp4Matrix:
        groups = (layer.local, rows, columns // 32)
        blocks = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, device="cuda", generator=generator)
        scales = torch.randint(119, 121, groups, dtype=torch.uint8, device="cuda", generator=generator)
        return Mxfp4Matrix(blocks, scales)

    def bias(rows: int) -> torch.Tensor:
        return torch.randn(layer.local, rows, device="cuda", dtype=torch.bfloat16, generator=generator)

    hidden, inter = layer.hidden, layer.intermediate
    return ExpertWeights(matrix(2 * inter, hidden), bias(2 * inter), matrix(hidden, inter), bias(hidden))


def inputs(layer: Layer, tokens: int, spread: float = 0.0) -> tuple[list[torch.Tensor], list[Dispatch]]:
    """Tokens and a routing for each call; every expert is as likely as any other, or its logit differs by `spread`."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    local_E = torch.full((layer.experts,), -1, dtype=torch.int32, device="cuda")
    local_E[: layer.local] = torch.arange(layer.local, dtype=torch.int32, device="cuda")
    xs, dispatches = [], []
    for _ in range(CALLS):
        logits_TE = torch.randn(tokens, layer.experts, device="cuda", generator=generator)
        logits_TE += spread * torch.randn(layer.experts, device="cuda", generator=generator)
        dispatches.append(route(logits_TE, layer.top_k, local_E, layer.local))
        xs.append(torch.randn(tokens, layer.hidden, device="cuda", generator=generator).bfloat16())
    return xs, dispatches


def measure_us(forward: Forward, calls: int = CALLS) -> float:
    """µs a call in a CUDA graph of `calls` calls, after a round without one."""
    for call in range(calls):
        forward(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            forward(call)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def copies_needed(layer: Layer, tokens: int, most: int) -> int:
    """Copies of the weights that four L2 caches' worth of chosen experts lie between two uses of one."""
    chance = 1 - (1 - layer.top_k / layer.experts) ** tokens
    touched = max(1.0, layer.local * chance) * layer.expert_bytes
    return max(2, min(most, math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / touched)))


def limits(options: argparse.Namespace) -> tuple[float, float]:
    """Bytes/s and FLOP/s, given or measured."""
    source = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    # a kernel, not copy_: a graph gives that to the copy engine, which is slower
    bandwidth = 2 * source.nbytes / measure_us(lambda _: torch.neg(source, out=target)) * 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / measure_us(lambda _: torch.mm(a, b)) * 1e6
    print(f"measured: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {flops / 1e12:.0f} TFLOP/s", flush=True)
    return options.bandwidth * 1e12 or bandwidth, options.flops * 1e12 or flops


@contextmanager
def only_tile(tile: ExpertTile | None):
    """Every bf16 product runs with this tile; None: with those of the table."""
    shipped = TILES[torch.bfloat16]
    if tile is not None:
        TILES[torch.bfloat16] = {0: ((math.inf, tile),)}
    try:
        yield
    finally:
        TILES[torch.bfloat16] = shipped


def bench(layer: Layer, tokens_list: list[int], options: argparse.Namespace, limit: tuple[float, float]) -> list[dict]:
    """Rows of the table for one number of experts."""
    copies = max(copies_needed(layer, tokens, options.copies) for tokens in tokens_list)
    ours: list[TritonExperts] = []
    peers: list[list[HubExperts]] = []
    if options.peer:
        by_size, bitwise = (HubExperts.configured(Hub(options.peer, same)) for same in (False, True))
    for seed in range(copies):
        weights = random_weights(layer, seed)
        ours.append(TritonExperts.pack(weights, GatedActivation()))
        if options.peer:
            peers.append([hub.pack(weights, GatedActivation()) for hub in (by_size, bitwise)])
        del weights
    return [bench_tokens(layer, tokens, ours, peers, options, limit) for tokens in tokens_list]


def bench_tokens(
    layer: Layer,
    tokens: int,
    ours: list[TritonExperts],
    peers: list[list[HubExperts]],
    options: argparse.Namespace,
    limit: tuple[float, float],
) -> dict:
    """One row of the table."""
    xs, dispatches = inputs(layer, tokens, options.spread)
    used = copies_needed(layer, tokens, len(ours))

    def forward(call: int) -> None:
        ours[call % used].forward(xs[call], dispatches[call])

    row: dict = {"experts": f"{layer.local}/{layer.experts}", "tokens": tokens, "copies": used}
    row["floor_us"] = layer.floor_us(dispatches, *limit)
    row["us"] = measure_us(forward)
    row["of_floor"] = row["us"] / row["floor_us"]
    if peers:
        index = [routing(peers[0][0], dispatch) for dispatch in dispatches]
        both_TH = (ours[0].forward(xs[0], dispatches[0]).float().sum(1), summed(peers[0][0], xs[0], index[0]).float())
        row["peer_difference"] = float((both_TH[0] - both_TH[1]).norm() / both_TH[0].norm().clamp(min=1e-9))
        row["peer_us"] = measure_us(lambda call: summed(peers[call % used][0], xs[call], index[call]))
        row["speedup"] = row["peer_us"] / row["us"]
        for key, which in (("hub_us", 0), ("bitwise_us", 1)):
            row[key] = measure_us(
                lambda call, which=which: peers[call % used][which].forward(xs[call], dispatches[call])  # type: ignore[misc]
            )
    print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if options.variants:
        row["variants"] = sweep(options.variants, forward)
    return row


def sweep(variants: str, forward: Forward) -> dict[str, float]:
    """µs of each tile, fastest first; tiles that do not fit the device are left out and named."""
    times = {}
    for name in variants.split():
        with only_tile(ExpertTile.parse(name)):
            try:
                times[name] = measure_us(forward)
            except triton.runtime.errors.OutOfResources as error:
                print(f"    {name}: {error}")
    times = dict(sorted(times.items(), key=lambda item: item[1]))
    print("    " + "  ".join(f"{name} {us:.1f}" for name, us in times.items()), flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="32/32,8/32,128/128,32/128", help="local/all, with commas")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024,4096,8192")
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--intermediate", type=int, default=2880)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--spread", type=float, default=0.0, help="of the experts' mean logits; a model has about 0.2")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="TB/s for the floor; 0: measured")
    parser.add_argument("--flops", type=float, default=0.0, help="TFLOP/s for the floor; 0: measured")
    parser.add_argument("--copies", type=int, default=16, help="most copies of a layer's weights")
    parser.add_argument("--peer", default="", help="gpt-oss-triton-kernels, as hub.kernel names them")
    parser.add_argument(
        "--variants", nargs="?", const=VARIANTS, help="time these tiles too (a list, or the built-in one)"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("scripts/bench/moe.py needs a CUDA device")
    torch.manual_seed(0)

    limit = limits(options)
    rows = []
    for share in options.experts.split(","):
        local, experts = map(int, share.split("/"))
        layer = Layer(local, experts, options.hidden, options.intermediate, options.top_k)
        rows += bench(layer, [int(t) for t in options.tokens.split(",")], options, limit)
    record = {
        "bench": "moe",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bandwidth": limit[0],
        "flops": limit[1],
        "calls": CALLS,
        "replays": REPLAYS,
        "hidden": options.hidden,
        "intermediate": options.intermediate,
        "top_k": options.top_k,
        "spread": options.spread,
        "tiles": [asdict(tile) for _, tile in table(torch.bfloat16, generation(torch.device("cuda")))],
        "rows": rows,
    }
    if any("speedup" in row for row in rows):
        record["speedup"] = statistics.geometric_mean(row["speedup"] for row in rows)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
