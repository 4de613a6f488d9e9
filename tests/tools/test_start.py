"""Where a start's time goes: phases that together are all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_phases_of_a_start(tiny_checkpoint: Path, ranks: int) -> None:
    command = [sys.executable, str(ROOT / "scripts/bench/start.py"), str(tiny_checkpoint), "--repeat", "1"]
    done = subprocess.run(
        [*command, "--ranks", str(ranks), "runtime.device=cpu"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    for start in (record["cold"], *record["warm"]):
        phases = start["phases"]
        assert sum(phases.values()) == pytest.approx(start["first token"], abs=0.01)
        assert 0 < start["ready"] < start["first token"] < 60 and min(phases.values()) >= 0
        assert all(phases[name] > 0 for name in ("imports", "configuration", "requests", "load", "first token"))
        assert phases["rehearsal"] == 0, "a CPU has no kernels"
    assert "to first token" in done.stdout and f"{ranks} ranks" in done.stdout


def test_a_start_that_fails_says_why(tiny_checkpoint: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/bench/start.py"), str(tiny_checkpoint), "runtime.device=abacus"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "runtime.device='abacus' is unknown" in done.stderr
