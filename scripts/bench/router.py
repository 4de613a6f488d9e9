#!/usr/bin/env python3
"""The router on one GPU, logits → experts, weights, gather and scatter index: µs a call of every entry of ROUTERS.

    scripts/bench/router.py                                    (the table)
    scripts/bench/router.py --experts 32/128 --tokens 1,64

A CUDA graph holds calls with different logits, as in moe.py; time: the median of its replays / calls. Of "L/E" experts,
L live here. The logits' own product is not in it. An empty kernel is timed in the same way: a router of two kernels
cannot be faster than two of those. The last line is one JSON object.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.moe.router import ROUTERS
from epmoe.tables import lookup
from scripts.bench.moe import CALLS, REPLAYS, measure_us


@triton.jit
def _nothing(out_ptr):
    tl.store(out_ptr, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="32/32,8/32,128/128,32/128", help="local/all, with commas")
    parser.add_argument("--tokens", default="1,4,16,64,256,1024,4096,8192")
    parser.add_argument("--top-k", type=int, default=4)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("scripts/bench/router.py needs a CUDA device")

    scratch = torch.empty(1, dtype=torch.int32, device="cuda")
    launch_us = measure_us(lambda _: _nothing[(1,)](scratch))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; µs a call")
    print(f"an empty kernel: {launch_us:.2f}")
    print(f"{'experts':>9} {'tokens':>6}" + "".join(f" {name:>10}" for name in ROUTERS), flush=True)
    rows = []
    for share in options.experts.split(","):
        for tokens in map(int, options.tokens.split(",")):
            rows.append(bench(share, tokens, options.top_k))
            times = "".join(f" {rows[-1]['us'][name]:10.2f}" for name in ROUTERS)
            print(f"{share:>9} {tokens:6}{times}", flush=True)
    record = {
        "bench": "router",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "calls": CALLS,
        "replays": REPLAYS,
        "top_k": options.top_k,
        "launch_us": launch_us,
        "rows": rows,
    }
    print(json.dumps(record))


def bench(share: str, tokens: int, top_k: int) -> dict[str, Any]:
    """µs of every router for one number of tokens."""
    local, experts = map(int, share.split("/"))
    generator = torch.Generator("cuda").manual_seed(tokens)
    local_E = torch.full((experts,), -1, dtype=torch.int32, device="cuda")
    local_E[:local] = torch.arange(local, dtype=torch.int32, device="cuda")
    logits = [
        torch.randn(tokens, experts, device="cuda", generator=generator, dtype=torch.bfloat16) for _ in range(CALLS)
    ]

    def us(name: str) -> float:
        route = lookup("router", ROUTERS, name)().route
        return measure_us(lambda call: route(logits[call], top_k, local_E, local))

    return {"experts": share, "tokens": tokens, "us": {name: us(name) for name in ROUTERS}}


if __name__ == "__main__":
    main()
