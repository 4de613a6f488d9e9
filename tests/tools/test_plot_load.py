"""scripts/bench/plot_load.py: the last run at each load counts, every percentile is drawn."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import plot_load
from scripts.bench.plot import records

ROOT = Path(__file__).resolve().parents[2]


def run(load: str, level: float, ms: float = 1.0) -> dict[str, Any]:
    """What plot_load.py reads of a line of JSON (test_run.py holds those to be there)."""
    waited = {f"p{percent}": ms * percent for percent in (50, 90, 99)}
    named = {"device": "cpu", "prompt_tokens": "uniform:1:9", "answer_tokens": "8", "rate": level, "users": level}
    rates = {"tokens_per_s": 9.0, "generate_tokens_per_s": 10.0}
    return {"bench": "load", "model": "20b", "ranks": 1, "load": load, "first_token_ms": waited, "between_ms": waited,
            **named, **rates}  # fmt: skip


def test_the_last_run_at_each_load_counts() -> None:
    lines = [json.dumps(each) for each in (run("poisson", 4), run("poisson", 2), run("poisson", 4, ms=3))]
    found = records(["| table |", '{"bench": "model"}', *lines], "load")
    rows = plot_load.group([*found, run("concurrent", 1)])
    assert list(rows) == [("20b", 1, "poisson"), ("20b", 1, "concurrent")]
    assert [(each["rate"], each["first_token_ms"]["p50"]) for each in rows["20b", 1, "poisson"]] == [(2, 50), (4, 150)]


def test_everything_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")  # an optional extra
    rows = plot_load.group([run("poisson", 4), run("poisson", 0.5), {**run("concurrent", 8), "between_ms": None}])
    plot_load.draw(rows, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    for part in ("20b, 1 x cpu", "prompts uniform:1:9", "p50", "p99", "requests at a time", "requests a second"):
        assert part in picture
    plot_load.draw(rows, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == picture


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.log").write_text('{"bench": "model"}\n')
    command = [sys.executable, str(ROOT / "scripts/bench/plot_load.py"), "a.svg", "other.log"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "scripts/bench/plot_load.py: no line of epmoe.bench in other.log\n"
