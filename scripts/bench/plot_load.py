#!/usr/bin/env python3
"""What users wait for against the load: first token, between tokens, tokens/s.

    for users in 1 8 64; do python -m epmoe.bench load=concurrent users=$users size=20b; done | tee -a load.log
    scripts/bench/plot_load.py load.svg load.log ...           (or load.png)

Reads the lines of JSON that epmoe.bench load=… ends in and passes over everything else. A row of panels for each model,
number of ranks and kind of load; where runs at the same load repeat, the last one counts. Dashed: the rate of
LLM.generate over requests of the same lengths. Needs matplotlib (`pip install 'epmoe[bench]'`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from scripts.bench.plot import Record, asked, plotter, read, save

LEVEL = {"poisson": "rate", "concurrent": "users"}  # the key that says how much comes
AXES = {"poisson": "requests a second", "concurrent": "requests at a time"}
PERCENTS = ("p50", "p90", "p99")

Row = tuple[str, int, str]  # model, ranks, kind of load


def main() -> None:
    options = asked(__doc__, "output of epmoe.bench load=…")
    draw(group(read("scripts/bench/plot_load.py", options.picture, options.logs, "load")), options.picture)


def group(runs: Sequence[Record]) -> dict[Row, list[Record]]:
    """The last run at each load, by what a row of panels shows; loads ascending."""
    found: dict[Row, dict[float, Record]] = {}
    for run in runs:
        row = run["model"], run["ranks"], run["load"]
        found.setdefault(row, {})[run[LEVEL[run["load"]]]] = run
    return {row: [run for _, run in sorted(of_row.items())] for row, of_row in found.items()}


def draw(rows: dict[Row, list[Record]], picture: Path) -> None:
    """Percentiles and tokens/s over the load, which grows by factors."""
    pyplot = plotter()
    figure, axes = pyplot.subplots(len(rows), 3, figsize=(13, 4 * len(rows)), squeeze=False, layout="constrained")
    for (first, between, rate), ((model, ranks, load), runs) in zip(axes, rows.items(), strict=True):
        at = [run[LEVEL[load]] for run in runs]
        for axis, key, name in ((first, "first_token_ms", "first token"), (between, "between_ms", "between tokens")):
            with_it = [run for run in runs if run[key]]  # answers of one token have none between
            for percent in PERCENTS:
                levels = [run[LEVEL[load]] for run in with_it]
                axis.plot(levels, [run[key][percent] for run in with_it], "o-", label=percent)
            axis.set_title(f"{name}, ms", fontsize="medium")
            axis.legend(frameon=False)
        rate.plot(at, [run["tokens_per_s"] for run in runs], "o-", label="tokens/s")
        rate.plot(at, [run["generate_tokens_per_s"] for run in runs], "--", color="gray", label="LLM.generate")
        rate.set_title("tokens/s", fontsize="medium")
        rate.legend(frameon=False)
        for axis in (first, between, rate):
            axis.set_xscale("log", base=2)
            axis.set_xticks(at, [f"{level:g}" for level in at])
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
            axis.set_xlabel(AXES[load])
        one = runs[-1]
        first.set_ylabel(
            f"{model}, {ranks} x {one['device']}\nprompts {one['prompt_tokens']}, answers {one['answer_tokens']}"
        )
    save(figure, picture)


if __name__ == "__main__":
    main()
