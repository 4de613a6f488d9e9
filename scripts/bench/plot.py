#!/usr/bin/env python3
"""Time of a decode step against the batch, a curve for each number of ranks, each with its floor as a dashed line.

    python -m epmoe.bench size=20b | tee -a runs.log
    torchrun --nproc-per-node 2 -m epmoe.bench size=20b | tee -a runs.log
    scripts/bench/plot.py steps.svg runs.log ...           (or steps.png)

Reads the lines of JSON that epmoe.bench ends in and passes over everything else, so logs can be given as they are. A
panel for each model; where runs of a model on as many ranks repeat, the last one counts. Needs matplotlib
(`pip install 'epmoe[bench]'`).
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def main() -> None:
    options = asked(__doc__, "output of epmoe.bench")
    draw(group(read("scripts/bench/plot.py", options.picture, options.logs, "model")), options.picture)


def asked(what: str | None, logs: str) -> argparse.Namespace:
    """The command line of a script that draws `picture` from `logs`, which its help says."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="written; its name ends in .svg or .png")
    parser.add_argument("logs", type=Path, nargs="+", help=logs)
    return parser.parse_args()


def read(script: str, picture: Path, logs: Sequence[Path], bench: str) -> list[Record]:
    """The records of one of epmoe.bench's benchmarks in the logs; a mistake ends the script with a line."""
    if picture.suffix not in (".svg", ".png"):
        sys.exit(f"{script}: {picture} must end in .svg or .png")
    try:
        text = [line for file in logs for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        sys.exit(f"{script}: {error.filename} cannot be read: {error.strerror}")
    found = records(text, bench)
    if not found:
        sys.exit(f"{script}: no line of epmoe.bench in {', '.join(map(str, logs))}")
    return found


def records(lines: Iterable[str], bench: str = "model") -> list[Record]:
    """The results of epmoe.bench among the lines of its output."""
    found = []
    for line in lines:
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except json.JSONDecodeError:  # another program's output
                continue
            if value.get("bench") == bench:
                found.append(value)
    return found


def group(runs: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """{model: {number of ranks: its last run}}, ranks ascending."""
    panels: dict[str, dict[int, Record]] = {}
    for run in runs:
        panels.setdefault(run["model"], {})[run["ranks"]] = run
    return {model: dict(sorted(panel.items())) for model, panel in panels.items()}


def draw(panels: dict[str, dict[int, Record]], picture: Path) -> None:
    """Both axes are logarithmic, so that equal distances to the floor are equal ratios."""
    pyplot = plotter()
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    counts = sorted({ranks for panel in panels.values() for ranks in panel})
    color = {ranks: f"C{index}" for index, ranks in enumerate(counts)}  # the same in every panel
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 5 * len(panels), 4.5), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (model, panel) in zip(axes[0], panels.items(), strict=True):
        for ranks, run in panel.items():
            rows = sorted(run["decode"], key=lambda row: row["batch"])
            batches = [row["batch"] for row in rows]
            axis.plot(batches, [row["ms"] for row in rows], "o-", color=color[ranks])
            axis.plot(batches, [row["floor_ms"] for row in rows], "--", color=color[ranks], linewidth=1)
        ticks = sorted({row["batch"] for run in panel.values() for row in run["decode"]})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(which="both", alpha=0.25)
        axis.set_xlabel("sequences that decode together")
        last = list(panel.values())[-1]
        axis.set_title(
            f"{model}, {last['device']}, {last['dtype']}, prompt {last['prompt_tokens']}\n"
            f"torch {last['torch']}, triton {last['triton']}",
            fontsize="medium",
        )
    axes[0][0].set_ylabel("ms a step")
    names = [f"{ranks} rank{'s' if ranks > 1 else ''}" for ranks in counts] + ["floor: bytes to read"]
    lines = [Line2D([], [], marker="o", color=color[ranks]) for ranks in counts]
    lines.append(Line2D([], [], linestyle="--", color="gray", linewidth=1))
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    save(figure, picture)


def plotter() -> Any:
    """matplotlib's pyplot, which draws into files alone: the same runs give the same bytes, and text stays text."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "epmoe"
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, picture: Path) -> None:
    """Write a figure, without a date."""
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
