#!/usr/bin/env python3
"""The choice of a step's tokens beside the greedy one: µs a call by way, rows and kind of logits.

    scripts/bench/sampler.py                                (the table, on a GPU)
    scripts/bench/sampler.py --rows 64 --ways greedy,top_p
    scripts/bench/sampler.py --device cpu --rows 64         (torch's version, on --threads threads)

On a GPU a CUDA graph holds calls with different logits, as in moe.py; time: the median of its replays / calls. On a CPU
it is the least of REPEATS calls. `one of all`: one row draws by top-p, the others are greedy. `penalty`: repetition,
frequency and presence, greedy. `logprobs`: a greedy choice and its five likeliest tokens. Kinds of logits: ordinary,
normal · 3; broad, normal / 2, about what random weights give; peaked, a token that has nearly everything; flat,
normal / 100; tied, ordinary ones in bf16. The last line
is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.batch import Adjustments, SamplingTensors
from epmoe.engine.request import Level, SamplingParams
from epmoe.engine.sampler import sample, sampling_tensors, top_logprobs

KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ordinary": lambda normal_BV: normal_BV * 3,
    "broad": lambda normal_BV: normal_BV / 2,
    "peaked": lambda normal_BV: torch.where(normal_BV == normal_BV.amax(1, keepdim=True), 30.0, normal_BV * 3),
    "flat": lambda normal_BV: normal_BV / 100,
    "tied": lambda normal_BV: (normal_BV * 3).bfloat16().float(),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "both": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "one of all": {"temperature": 1.0, "top_p": 0.9},
    "penalty": {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1},
    "logprobs": {},
}
CALLS, REPEATS = 4, 5  # different logits on a GPU: more than its L2 cache holds from 64 rows on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--vocab", type=int, default=201_088)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("scripts/bench/sampler.py needs a CUDA device, or --device cpu")
    torch.set_num_threads(options.threads)
    ways = options.ways.split(",")
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(f"{name}, torch {torch.__version__}; {options.vocab} ids; µs a call")
    print(f"{'rows':>5} {'logits':>9}" + "".join(f" {way:>12}" for way in ways), flush=True)
    rows = []
    for count in map(int, options.rows.split(",")):
        for kind in options.kinds.split(","):
            us = {way: bench(way, kind, count, options) for way in ways}
            rows.append({"rows": count, "logits": kind, "us": us})
            print(f"{count:5} {kind:>9}" + "".join(f" {us[way]:12.1f}" for way in ways), flush=True)
    record = {"bench": "sampler", "device": name, "torch": torch.__version__, "vocab": options.vocab, "rows": rows}
    print(json.dumps(record))


def bench(way: str, kind: str, rows: int, options: argparse.Namespace) -> float:
    """µs of one way with rows of one kind."""
    device, calls = torch.device(options.device), CALLS if options.device == "cuda" else 1
    generator = torch.Generator(device).manual_seed(rows)
    logits = [KINDS[kind](torch.randn(rows, options.vocab, device=device, generator=generator)) for _ in range(calls)]
    asked = [SamplingParams(seed=row, **WAYS[way]) for row in range(rows)]
    if way == "one of all":
        asked[:-1] = [SamplingParams()] * (rows - 1)
    params = sampling_tensors(asked, device)
    row_B, position_B = torch.arange(rows, device=device), torch.arange(rows, device=device) + 1000
    adjustments = penalties(params, asked, options.vocab) if asked[-1].kept else None
    level = Level.GREEDY if way in ("greedy", "logprobs", "penalty") else Level.SAMPLE

    def choose(call: int) -> object:
        id_B = sample(logits[call], row_B, position_B, params, adjustments, level)
        return top_logprobs(logits[call], id_B, 5) if way == "logprobs" else id_B

    if options.device == "cuda":
        from scripts.bench.moe import measure_us  # only here: a CPU machine need not have triton

        return measure_us(choose, CALLS)
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        choose(0)
        times.append(1e6 * (time.perf_counter() - begin))
    return min(times)


def penalties(params: SamplingTensors, asked: list[SamplingParams], vocab: int) -> Adjustments:
    """After prompts and answers of random ids."""
    device, count = params.seed_S.device, len(asked)
    penalty_S3 = torch.tensor([each.settled().penalties() for each in asked], device=device)
    number_SV = torch.randint(-100, 3, (count, vocab), dtype=torch.int32, device=device).clamp_(0)
    return Adjustments(penalty_S3, number_SV > 0, number_SV)


if __name__ == "__main__":
    main()
