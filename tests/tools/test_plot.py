"""scripts/bench/plot.py: finds the benchmark's lines in logs, keeps the last run of each kind, draws every curve."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import plot

ROOT = Path(__file__).resolve().parents[2]


def run(model: str, ranks: int, factor: float = 1.0) -> dict[str, Any]:
    """What plot.py reads of a line of JSON of epmoe.bench (test_bench.py holds those to be there)."""
    rows = [{"batch": batch, "ms": factor * (1 + batch / 16), "floor_ms": factor} for batch in (16, 1)]
    named = {"device": "cpu", "dtype": "float32", "prompt_tokens": 4, "torch": "2", "triton": "3"}
    return {"bench": "model", "model": model, "ranks": ranks, "decode": rows, **named}


def log(*runs: dict[str, Any]) -> list[str]:
    return ["| table |", "{not JSON}", '{"bench": "moe"}', *map(json.dumps, runs), ""]


def test_the_last_run_of_each_kind_counts() -> None:
    found = plot.records(log(run("20b", 2), run("20b", 1), run("120b", 4), run("20b", 2, factor=3)))
    assert len(found) == 4
    panels = plot.group(found)
    assert {model: list(panel) for model, panel in panels.items()} == {"20b": [1, 2], "120b": [4]}
    assert panels["20b"][2]["decode"][0]["floor_ms"] == 3


def test_every_curve_and_its_floor_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # an optional extra
    panels = plot.group([run("20b", 1), run("20b", 2), run("120b", 4)])
    plot.draw(panels, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    for part in ("20b, cpu, float32, prompt 4", "120b, cpu", "1 rank", "2 ranks", "4 ranks", "floor: bytes to read"):
        assert part in picture
    assert picture.count("stroke-dasharray") == 3 + 1  # a floor for each run, one in the legend
    assert len(picture) < 60_000  # small enough to keep beside the code
    plot.draw(panels, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == picture
    plot.draw(panels, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.log").write_text("nothing\n")
    for picture, logs, message in (
        ("a.pdf", "empty.log", "must end in .svg or .png"),
        ("a.svg", "empty.log", "no line of epmoe.bench"),
        ("a.svg", "missing.log", "missing.log cannot be read: No such file"),
    ):
        command = [sys.executable, str(ROOT / "scripts/bench/plot.py"), picture, logs]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
