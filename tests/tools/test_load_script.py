"""scripts/bench/load.py: every way to read is timed on the same bytes, and the table ends in a line of JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from epmoe.weights.synthetic import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("ring", "mmap", "pread")


@pytest.mark.slow
def test_every_way_is_timed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m")
    script = str(ROOT / "scripts/bench/load.py")
    command = [sys.executable, script, str(tmp_path / "m"), "--ranks", "1,2", "--device", "cpu", "--repeat", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert one["ranks"] == 1 and two["ranks"] == 2 and one["bytes"] > two["bytes"] > one["bytes"] / 3
    for row in (one, two):
        assert all(row[way] > 0 for way in WAYS) and row["fastest"] in (*WAYS, "fast")
        assert row[row["fastest"]] == min(row[way] for way in (*WAYS, "fast") if way in row)
