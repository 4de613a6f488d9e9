#!/usr/bin/env python3
"""Dense products on one GPU: µs a call behind the norm that feeds them, and the library's bits beside ours.

    scripts/bench/dense.py                        the table
    scripts/bench/dense.py --root ../before       the same of another checkout's epmoe, for a comparison in one run
    scripts/bench/dense.py --write                measure all candidates and write epmoe/kernels/ways.json
    scripts/bench/dense.py --bits                 at which numbers of rows the library has other bits

A CUDA graph holds calls of a norm and a product, with weights that were not used for four times the L2 cache: what a
call takes includes what the two overlap. "layer" is a norm, q/k/v, a norm in attention's place, the output
projection, and the norm with the router. The last line is one JSON object.
"""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, HEADS, VOCAB, CHUNK = 2880, 4096, 201_088, 16_384
# outputs x columns: gpt-oss's q/k/v, whole and as 2, 4 and 8 ranks would share it; its output projection
PRODUCTS = ((5120, 2880), (2560, 2880), (1280, 2880), (640, 2880), (2880, 4096))
EXPERTS = (32, 128)
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
CANDIDATES = (
    "few:16x8x256x1x4 few:16x8x256x1x5 few:16x8x256x1x8 few:16x8x512x1x3 few:16x8x512x1x4 few:16x8x256x2x4 "
    "few:16x16x256x1x4 few:16x16x256x1x5 few:16x16x256x1x6 64x16x128x4x6 64x16x128x4x4 64x32x128x4x5 64x32x128x4x4"
)
# A tile more is worth it when it saves this much at some point: each is compiled before a run is ready.
CHANGE = 0.03

Linear = Callable[[torch.Tensor, nn.Linear], torch.Tensor]


def layer(outputs: int, columns: int) -> nn.Linear:
    made = nn.Linear(columns, outputs, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    made.weight.normal_(0, 0.02)
    return made


def layers(outputs: int, columns: int, most: int = 80) -> list[nn.Linear]:
    """As many as pass four times the L2 cache before one comes back, or `most`: of small ones it holds all."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [layer(outputs, columns) for _ in range(min(most, 2 + 4 * cache // (2 * outputs * columns)))]


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def behind_norm(count: int, weights: list[nn.Linear], product: Linear | None) -> float:
    """µs of a norm and a product, or of a norm alone."""
    from epmoe.kernels.norm import add_norm

    columns = weights[0].in_features
    x_TH, owed_TKH, ones_H = rows(count, columns), rows(count, 1, columns), torch.ones(columns).bfloat16().cuda()

    def call(index: int) -> None:
        _, norm_TH = add_norm(x_TH, owed_TKH, ones_H, 1e-5)
        if product is not None:
            product(norm_TH, weights[index % len(weights)])

    return measured(call, 2 * len(weights))


def measured(call: Callable[[int], object], calls: int) -> float:
    from scripts.bench.moe import measure_us

    return round(float(measure_us(call, calls)), 2)


def library(x_TH: torch.Tensor, weight: nn.Linear) -> torch.Tensor:
    return nn.functional.linear(x_TH, weight.weight, weight.bias)


def ours(x_TH: torch.Tensor, weight: nn.Linear) -> torch.Tensor:
    """What the layers call, whatever serves."""
    from epmoe.layers.twin import twin

    out_TN: torch.Tensor = twin("linear", x_TH).linear(x_TH, weight)
    return out_TN


def product_times(outputs: int, columns: int, counts: list[int]) -> dict[int, dict[str, float]]:
    weights = layers(outputs, columns)
    return {
        count: {
            "norm": behind_norm(count, weights, None),
            "library": behind_norm(count, weights, library),
            "ours": behind_norm(count, weights, ours),
        }
        for count in counts
    }


def norm_and_router(count: int, weights: list[nn.Linear], product: Linear | None) -> Callable[[int], object]:
    """A call of the norm with the router's logits: by `product` after the norm, or as the layer makes it."""
    from epmoe.kernels.norm import add_norm, add_norm_linear

    x_TH, owed_TKH, ones_H = rows(count, HIDDEN), rows(count, 1, HIDDEN), torch.ones(HIDDEN).bfloat16().cuda()

    def call(index: int) -> object:
        weight = weights[index % len(weights)]
        if product is None:
            return add_norm_linear(x_TH, owed_TKH, ones_H, 1e-5, weight)
        return product(add_norm(x_TH, owed_TKH, ones_H, 1e-5)[1], weight)

    return call


def router_times(experts: int, counts: list[int]) -> dict[int, dict[str, float]]:
    """The norm with the router's logits, one behind the other: their weights stay in the cache."""
    weights = layers(experts, HIDDEN)
    return {
        count: {
            "norm": behind_norm(count, weights, None),
            "library": measured(norm_and_router(count, weights, library), 2 * len(weights)),
            "ours": measured(norm_and_router(count, weights, None), 2 * len(weights)),
        }
        for count in counts
    }


def layer_call(count: int, weights: tuple[list[nn.Linear], ...], product: Linear) -> Callable[[int], object]:
    """A call of all dense products of a layer, one behind the other as in a step, weights cold."""
    from epmoe.kernels.norm import add_norm, add_norm_linear

    x_TH, owed_TKH, y_TX = rows(count, HIDDEN), rows(count, 4, HIDDEN), rows(count, HEADS)
    ones_X = torch.ones(HEADS).bfloat16().cuda()
    ones_H = ones_X[:HIDDEN].clone()

    def call(index: int) -> object:
        qkv, out, router = (each[index % len(each)] for each in weights)
        product(add_norm(x_TH, owed_TKH, ones_H, 1e-5)[1], qkv)
        o_TH = product(add_norm(y_TX, None, ones_X, 1e-5)[1], out)
        if product is library:
            return library(add_norm(x_TH, o_TH[:, None], ones_H, 1e-5)[1], router)
        return add_norm_linear(x_TH, o_TH[:, None], ones_H, 1e-5, router)

    return call


def layer_times(experts: int, counts: list[int]) -> dict[int, dict[str, float]]:
    weights = layers(5120, HIDDEN), layers(HIDDEN, HEADS), layers(experts, HIDDEN)
    return {
        count: {
            "library": measured(layer_call(count, weights, library), 24),
            "ours": measured(layer_call(count, weights, ours), 24),
        }
        for count in counts
    }


def vocabulary_times(counts: list[int]) -> dict[int, dict[str, float]]:
    from epmoe.layers import vocabulary
    from epmoe.layers.twin import twin

    weights, found = [layer(VOCAB, HIDDEN).weight for _ in range(2)], {}
    for count in (count for count in counts if count <= 1024):
        x_TH = rows(count, HIDDEN)

        def call(index: int, module: Any, x_TH: torch.Tensor = x_TH) -> object:
            return module.part_logits(x_TH, weights[index % 2], (0, VOCAB), CHUNK)

        found[count] = {
            name: measured(partial(call, module=module), 4)
            for name, module in (("library", vocabulary), ("ours", twin("vocabulary", x_TH)))
        }
    return found


def bits() -> dict[str, Any]:
    """Numbers of rows at which the library's bits are not ours, of all up to 300 and some above."""
    from epmoe.kernels.product import tiled
    from epmoe.kernels.vendor import MANY

    counts, found = [*range(1, 301), *range(320, 4097, 32)], {}
    for outputs, columns in (*PRODUCTS, *((experts, HIDDEN) for experts in EXPERTS)):
        weight, x_TH = layer(outputs, columns), rows(4096, columns)
        wanted_TN = tiled(x_TH, weight.weight, weight.bias, MANY)
        differ = [count for count in counts if not torch.equal(library(x_TH[:count], weight), wanted_TN[:count])]
        found[f"{outputs}x{columns}"] = differ
        print(f"{outputs} x {columns}: {len(differ)} of {len(counts)} numbers of rows differ: {runs_of(differ)}")
    return found


def runs_of(numbers: list[int]) -> str:
    """Neighbours as one entry.

    >>> runs_of([1, 2, 3, 7, 9, 10])
    '1-3, 7, 9-10'
    """
    begins = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(begins, ends, strict=True))


def _by(kernel: Callable[..., torch.Tensor], tile: Any, x_TH: torch.Tensor, weight: nn.Linear) -> torch.Tensor:
    return kernel(x_TH, weight.weight, weight.bias, tile)


def candidate_times(outputs: int, columns: int, names: list[str]) -> dict[int, dict[str, float]]:
    """Every way that has room, up to 64 rows; beyond, the library serves wherever it has the bits."""
    from epmoe.kernels.few import few
    from epmoe.kernels.product import tiled
    from epmoe.kernels.ways import Way

    weights, found = layers(outputs, columns), {}
    for count in (count for count in ROWS if count <= 64):
        found[count] = {"library": behind_norm(count, weights, library)}
        for name in names:
            way = Way.parse(name)
            assert way.tile is not None
            if way.tile.tokens < min(count, 64) or way.tile.tokens > 4 * max(count, 4):
                continue
            found[count][name] = behind_norm(
                count, weights, partial(_by, few if way.kernel == "few" else tiled, way.tile)
            )
    return found


def best_table(times: dict[int, dict[str, float]], change: float = CHANGE) -> list[dict[str, Any]]:
    """The ways that take the least time, one for each limit at a power of two; the last is the library's.

    A way goes on serving while no other is faster by more than `change`.

    >>> best_table({1: {"library": 12.0, "a": 10.0}, 2: {"library": 12.0, "a": 10.1, "b": 10.0}, 16: {"library": 9.0}})
    [{'up_to': 2, 'way': 'a'}, {'up_to': None, 'way': 'library'}]
    """
    chosen: list[tuple[int, str]] = []
    for count in sorted(count for count in times if count & (count - 1) == 0):
        fastest = min(times[count], key=times[count].__getitem__)
        before = chosen[-1][1] if chosen else fastest
        same = before in times[count] and times[count][before] <= (1 + change) * times[count][fastest]
        chosen.append((count, before if same else fastest))
    if chosen[-1][1] != "library":
        chosen.append((2 * chosen[-1][0], "library"))
    entries = [{"up_to": count, "way": way} for (count, way), (_, after) in pairwise(chosen) if way != after]
    return [*entries, {"up_to": None, "way": "library"}]


def write(names: list[str], output: Path) -> dict[str, Any]:
    from epmoe.kernels.gpu import generation
    from epmoe.kernels.ways import FILE, read_tables

    content = json.loads(FILE.read_text(encoding="utf-8"))
    name = str(generation(torch.device("cuda")))
    points: list[dict[str, Any]] = []
    tables: dict[str, Any] = {}
    for outputs, columns in PRODUCTS:
        times = candidate_times(outputs, columns, names)
        size = f"{outputs}x{columns}"
        tables[size] = best_table(times)
        points += [{"product": size, "rows": count, "us": us} for count, us in times.items()]
        print(size, tables[size], flush=True)
    content["ways"][name] = tables
    content["measured"][name] = {**conditions(), "points": points}
    read_tables(content)
    output.write_text(as_text(content), encoding="utf-8")
    return {"ways": tables, "points": points}


def as_text(content: dict[str, Any]) -> str:
    """JSON with a line for each way, and for each point's times.

    >>> print(as_text({"a": [{"b": 1, "c": 2}]}), end="")
    {
      "a": [
        {"b": 1, "c": 2}
      ]
    }
    """
    text = re.sub(r"\{[^{}]*\}", lambda found: " ".join(found[0].split()), json.dumps(content, indent=2))
    return re.sub(r"\{ (.*?) \}", r"{\1}", text) + "\n"


def conditions() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["scripts/bench/dense.py", *sys.argv[1:]]),
    }


def show(what: str, times: dict[int, dict[str, float]]) -> None:
    for count, us in times.items():
        print(
            f"{what:>16} {count:>5} rows  " + "  ".join(f"{name} {value:7.2f}" for name, value in us.items()),
            flush=True,
        )


def table(counts: list[int], parts: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "layer" in parts:
        found |= {f"layer, {experts}": layer_times(experts, counts) for experts in EXPERTS}
    if "products" in parts:
        found |= {f"{n}x{h}": product_times(n, h, counts) for n, h in PRODUCTS}
    if "router" in parts:
        found |= {f"router, {experts}": router_times(experts, counts) for experts in EXPERTS}
    if "vocabulary" in parts:
        found["vocabulary"] = vocabulary_times(counts)
    for what, times in found.items():
        show(what, times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=str(ROOT), help="the checkout whose epmoe is measured")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--parts", default="layer,products,router,vocabulary")
    parser.add_argument("--bits", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--candidates", default=CANDIDATES)
    parser.add_argument("--output", type=Path, default=ROOT / "epmoe/kernels/ways.json")
    options = parser.parse_args()
    sys.path[:0] = [options.root, str(ROOT)]  # scripts.bench comes from this checkout, unless the other has it
    torch.manual_seed(0)
    result: dict[str, Any] = {**conditions(), "root": options.root}
    if options.bits:
        result["differ"] = bits()
    elif options.write:
        result |= write(options.candidates.split(), options.output)
    else:
        result |= table([int(count) for count in options.rows.split(",")], set(options.parts.split(",")))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
