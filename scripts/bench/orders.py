#!/usr/bin/env python3
"""What rank 0's orders cost: a step of the embedded model with a turn's message before it, and without.

    torchrun --nproc-per-node 4 scripts/bench/orders.py [--rows 8] [--steps 400]

On the CPU. Steps with and without take turns, so that other work on the machine meets both alike; `more` is the median
of a step with less its neighbour without, on rank 0, and `error` that median's standard error. `turn` is what the main
thread of a rank spends in `Control.turn`, the median over steps of the slowest and of the fastest rank; `alone` is a
turn with nothing to compute between, so that the message has not come yet. Ends in a line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.engine.request import Request, SamplingParams
from epmoe.llm import LLM
from epmoe.ranks.control import Control


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400)
    asked = parser.parse_args()
    with LLM(runtime={"device": "cpu", "max_batch": asked.rows}) as llm:
        record = measure(llm, asked.rows, asked.steps)
        if llm.ranks.is_main:
            print(json.dumps(record))


def measure(llm: LLM, rows: int, steps: int) -> dict[str, float]:
    control = Control(llm.ranks, 60)
    params = SamplingParams(max_new_tokens=10**6, ignore_eos=True)
    taken_us: dict[str, list[int]] = {"with": [], "without": [], "turn": [], "alone": []}
    length = llm.architecture.max_positions - 8
    for number in range(2 * steps):
        if not llm.engine.busy or number % (length // 2) == 0:
            llm.engine.clear()
            for row in range(rows):
                llm.engine.add(Request((row + 1, 2, 3), params))
            for _ in range(3):
                llm.engine.step()
        begin = time.perf_counter()
        if number % 2:
            control.turn({} if control.leads else None)
            taken_us["turn"].append(microseconds(begin))
        llm.engine.step()
        taken_us["with" if number % 2 else "without"].append(microseconds(begin))
    for _ in range(steps):
        begin = time.perf_counter()
        control.turn({} if control.leads else None)
        taken_us["alone"].append(microseconds(begin))
    control.settle()
    more = [one - other for one, other in zip(taken_us["with"], taken_us["without"], strict=True)]
    first, _, third = statistics.quantiles(more)
    error = 1.25 * (third - first) / 1.35 / len(more) ** 0.5  # of a median, as if they were normal
    medians = {name: llm.ranks.gather([round(statistics.median(each))]) for name, each in taken_us.items()}
    found = {f"{name}_us": max(values)[0] for name, values in medians.items()}
    found |= {"turn_fastest_us": min(medians["turn"])[0], "more_us": round(statistics.median(more))}
    return {"ranks": llm.ranks.size, "rows": rows, "steps": steps, **found, "error_us": round(error)}


def microseconds(begin: float) -> int:
    return round(1e6 * (time.perf_counter() - begin))


if __name__ == "__main__":
    main()
