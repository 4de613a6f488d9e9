#!/usr/bin/env python3
"""Choose the tiles of the experts' products on this GPU and write them to epmoe/moe/experts/triton/tiles.json.

    scripts/bench/tune.py                              minutes
    scripts/bench/tune.py --quick --output tiles.json  fewer candidates and points

Times the candidates as moe.py does (both products in a CUDA graph, weights rotating past the L2), for several numbers
of rows an expert, T·K/E. The table replaces the one of this GPU's generation; others stay. What was measured stands in
the file, so that a choice can be looked up, and is printed as one line of JSON at the end.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.kernels.gpu import generation
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.triton import TritonExperts
from epmoe.moe.experts.triton.tiles import FILE, ExpertTile, hopper_serves, read_tables
from scripts.bench.moe import Layer, copies_needed, inputs, random_weights, sweep

Point = dict[str, Any]  # rows: T·K/E; experts, tokens: how they came about; us: {tile: µs a call}

CANDIDATES = (
    "64x8x64x4x3 64x16x64x4x3 64x16x64x4x4 128x16x64x4x3 128x32x64x4x3 128x64x64x8x2 128x64x64x8x3 128x128x64x8x2"
)
QUICK = "64x8x64x4x3 64x16x64x4x3 128x32x64x4x3 128x64x64x8x2"
# on that generation these too
HOPPER = " hopper:128x32x64x4x2 hopper:128x64x64x4x2 hopper:128x96x64x4x2 hopper:256x64x64x8x2 hopper:256x128x64x8x2"
# A tile more is worth it when it saves this much of the time at one point: each is compiled before a run is ready, and
# a tile's times differ by 2 % from measurement to measurement.
CHANGE = 0.03
MOST_COPIES = 16


def best_table(points: Sequence[Point], change: float = CHANGE) -> list[tuple[float, ExpertTile]]:
    """The table [(most rows of an expert, tile)] that takes the least time over all points.

    Minimises Σ log µs + change · (tiles − 1) over all tables whose tiles have the same `words`: one order of summation.
    A limit lies half-way, as a ratio, between the points on its two sides. Tiles that some point lacks are left out.

    >>> us = [{"64x16x64x4x3": 10.0, "128x32x64x4x3": 12.0}, {"64x16x64x4x3": 40.0, "128x32x64x4x3": 30.0}]
    >>> [(limit, str(tile)) for limit, tile in best_table([{"rows": r, "us": each} for r, each in zip((1, 16), us)])]
    [(4.0, '64x16x64x4x3'), (inf, '128x32x64x4x3')]
    """
    rows = sorted({point["rows"] for point in points})
    costs = {row: _log_us([point["us"] for point in points if point["rows"] == row]) for row in rows}
    everywhere = set.intersection(*map(set, costs.values()))
    orders = {ExpertTile.parse(name).words for name in everywhere}
    paths = [
        _cheapest([n for n in everywhere if ExpertTile.parse(n).words == words], costs, change) for words in orders
    ]
    _, path = min(paths)
    table = [
        (math.sqrt(below * above), ExpertTile.parse(tile))
        for (below, tile), (above, following) in pairwise(zip(costs, path, strict=True))
        if tile != following
    ]
    return [*table, (math.inf, ExpertTile.parse(path[-1]))]


def _log_us(times: list[Mapping[str, float]]) -> dict[str, float]:
    """Σ log µs of each tile that all of these measurements have."""
    names = set.intersection(*(set(each) for each in times))
    return {name: sum(math.log(each[name]) for each in times) for name in names}


def _cheapest(names: list[str], costs: Mapping[float, Mapping[str, float]], change: float) -> tuple[float, list[str]]:
    """(cost, tile of each point) of the best sequence of tiles: dynamic programming from the fewest rows upwards."""
    best: dict[str, tuple[float, list[str]]] = {name: (0.0, []) for name in names}  # that end with this tile
    for cost in costs.values():
        total, path = min(best.values())
        moved = (total + change, path)
        following = {}
        for name in names:
            total, path = min(best[name], moved)
            following[name] = (total + cost[name], [*path, name])
        best = following
    return min(best.values())


def updated(content: dict[str, Any], of: int, points: Sequence[Point], conditions: dict[str, Any]) -> dict[str, Any]:
    """The file's content with the bf16 table and the measurements of one generation of GPUs replaced.

    Raises:
        ValueError: the chosen table breaks a rule of tiles.json.
    """
    rows = [
        {"up_to": None if limit == math.inf else _rounded(limit), "kernel": tile.kernel, **vars(tile)}
        for limit, tile in best_table(points)
    ]
    tables = {**content["tiles"], "bfloat16": {**content["tiles"]["bfloat16"], str(of): rows}}
    measured = {**content["measured"], str(of): {**conditions, "points": list(points)}}
    new = {"tiles": tables, "measured": measured}
    read_tables(new)
    return new


def _rounded(limit: float) -> float:
    """A number to read, of 8 binary digits: limits of which one is at least twice the other stay so.

    >>> [_rounded(math.sqrt(rows * 2 * rows)) for rows in (1, 8, 16, 32)]
    [1.4140625, 11.3125, 22.625, 45.25]
    """
    fraction, exponent = math.frexp(limit)
    return math.ldexp(round(fraction * 256), exponent - 8)


def to_text(value: Any, indent: str = "") -> str:
    """JSON with a line for each tile and each list of times: for people and for diffs."""
    if not isinstance(value, dict | list) or not any(isinstance(each, dict | list) for each in _values(value)):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{inner}{json.dumps(key)}: {to_text(each, inner)}" for key, each in value.items()]
    else:
        parts = [inner + to_text(each, inner) for each in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return first + "\n" + ",\n".join(parts) + "\n" + indent + last


def _values(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def measure(layer: Layer, tokens_list: list[int], tiles: str, spread: float) -> list[Point]:
    """A point for each number of tokens."""
    copies = max(copies_needed(layer, tokens, MOST_COPIES) for tokens in tokens_list)
    experts = [TritonExperts.pack(random_weights(layer, seed), GatedActivation()) for seed in range(copies)]
    return [measure_point(layer, tokens, tiles, experts, spread) for tokens in tokens_list]


def measure_point(layer: Layer, tokens: int, tiles: str, experts: list[TritonExperts], spread: float) -> Point:
    """`experts` are copies of the layer."""
    xs, dispatches = inputs(layer, tokens, spread)
    used = copies_needed(layer, tokens, len(experts))
    point: Point = {"rows": tokens * layer.top_k / layer.experts, "experts": f"{layer.local}/{layer.experts}"}
    print("T={} experts {experts}, {rows:g} rows an expert:".format(tokens, **point), flush=True)
    times = sweep(tiles, lambda call: experts[call % used].forward(xs[call], dispatches[call]))
    return {**point, "tokens": tokens, "us": {name: round(us, 1) for name, us in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="32/32,32/128", help="local/all, with commas")
    parser.add_argument("--tokens", default="1,4,16,64,128,256,512,1024,4096")
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--intermediate", type=int, default=2880)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--spread", type=float, default=0.0, help="of the experts' mean logits, as moe.py's")
    parser.add_argument("--tiles", help="the candidates, with spaces; otherwise a list for this generation of GPUs")
    parser.add_argument("--quick", action="store_true", help="few candidates, few points")
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args()
    if options.quick:
        options.experts, options.tokens = "32/32", "1,16,256,4096"
    if not torch.cuda.is_available():
        sys.exit("scripts/bench/tune.py needs a CUDA device")
    of = generation(torch.device("cuda"))
    known = hopper_serves(options.hidden) and hopper_serves(options.intermediate)
    tiles = options.tiles or (QUICK if options.quick else CANDIDATES) + (HOPPER if of == 9 and known else "")

    points: list[Point] = []
    for share in options.experts.split(","):
        local, experts = map(int, share.split("/"))
        layer = Layer(local, experts, options.hidden, options.intermediate, options.top_k)
        points += measure(layer, [int(tokens) for tokens in options.tokens.split(",")], tiles, options.spread)
    conditions = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(["scripts/bench/tune.py", *sys.argv[1:]]),
        **{name: getattr(options, name) for name in ("hidden", "intermediate", "top_k", "spread")},
    }
    content = json.loads(FILE.read_text(encoding="utf-8"))
    try:
        new = updated(content, of, points, conditions)
    except ValueError as error:
        print(json.dumps({"bench": "tune", **conditions, "points": points}))
        sys.exit(f"scripts/bench/tune.py: nothing was written, since the choice breaks a rule: {error}")
    options.output.write_text(to_text(new) + "\n", encoding="utf-8")
    for row in new["tiles"]["bfloat16"][str(of)]:
        print(row)
    print(json.dumps({"bench": "tune", **new["measured"][str(of)], "tiles": new["tiles"]["bfloat16"][str(of)]}))


if __name__ == "__main__":
    main()
