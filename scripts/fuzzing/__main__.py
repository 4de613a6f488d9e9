"""scripts/fuzz: run damaged inputs for some minutes, and count by kind what came of them."""

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator

from scripts.fuzzing.cases import Case, Outcome, run
from scripts.fuzzing.damage import KINDS
from scripts.fuzzing.judge import fault, verdict

VERDICTS = ("refused", "the same text", "other text", "fault")


def cases(kinds: list[str], first: int, count: int | None, minutes: float) -> Iterator[Case]:
    """Seeds from `first` on, all kinds by turns, until `count` of each are run or the time is over."""
    end = time.monotonic() + 60 * minutes
    seeds = itertools.count(first) if count is None else range(first, first + count)
    for seed in seeds:
        for kind in kinds:
            if time.monotonic() > end:
                return
            yield kind, seed


def clean_text() -> str:
    """The text of the undamaged checkpoint."""
    texts: list[str] = []
    run(iter([("nothing", 0)]), 1, lambda outcome: texts.append(outcome.stdout))
    return texts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/fuzz")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--first", type=int, default=None, help="the first seed; else a random one")
    parser.add_argument(
        "--count", type=int, default=None, help="so many seeds of each kind; else until the time is over"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--show", action="store_true", help="what each case came to")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds {sorted(unknown)[0]!r} is unknown; known: {', '.join(KINDS)}")
    first = random.randrange(10**9) if options.first is None else options.first
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    clean, slowest, largest = clean_text(), 0.0, 0

    def take(outcome: Outcome) -> None:
        nonlocal slowest, largest
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.most_bytes)
        counts[outcome.case[0]][verdict(outcome, clean)] += 1
        wrong = fault(outcome, clean)
        if wrong or options.show:
            kind, seed = outcome.case
            print(f"--kinds {kind} --first {seed} --count 1: {wrong or 'right'}: {outcome.damage.words[:160]!r}")
            print(f"    exit {outcome.code}: {outcome.stderr[-600:] if wrong else outcome.stderr[-200:]!r}", flush=True)

    run(cases(kinds, first, options.count, options.minutes), options.jobs, take)
    width = max(map(len, kinds))
    print(" " * width, *(f"{name:>14}" for name in VERDICTS))
    for kind, count in counts.items():
        print(f"{kind:{width}}", *(f"{count[name]:14}" for name in VERDICTS))
    faults = sum(count["fault"] for count in counts.values())
    total = sum(count.total() for count in counts.values())
    summary = {
        "cases": total,
        "faults": faults,
        "first": first,
        "slowest_s": round(slowest, 2),
        "most_MB": largest >> 20,
    }
    print(json.dumps(summary))
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
