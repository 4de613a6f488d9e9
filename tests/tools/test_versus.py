"""scripts/bench/versus.py: sides take turns forth and back, a failed one ends the run, what is no checkout is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import versus
from scripts.bench.versus import Side, take_turns

ROOT = Path(__file__).resolve().parents[2]
# In place of a checkout's process: writes each turn into the folder, and takes as many µs a call as it has tokens.
FAKE = """
import sys
where, cases, tile = sys.argv[1:]
print("ready", flush=True)
for line in sys.stdin:
    with open(where + "/turns", "a") as file:
        file.write(f"{tile or 'table'} {line}")
    print(float(line.split()[0]) * (3 if tile else 2), flush=True)
"""


def test_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(versus, "gpu", lambda: ["1980", "699.5"])
    sides = [Side(f"{tmp_path}{tile}", "8,16", [sys.executable, "-c", FAKE]) for tile in ("", "=tile")]
    for side in sides:
        side.wait()
    found = take_turns(sides, [8, 16], rounds=3, seconds=0.01)
    turns = (tmp_path / "turns").read_text().splitlines()
    assert turns == [
        f"{side} {tokens} 0.01" for tokens in (8, 16) for side in ("table", "tile", "tile", "table", "table", "tile")
    ]
    assert [row["us"] for row in found] == [[16.0] * 3, [24.0] * 3, [32.0] * 3, [48.0] * 3]
    told = capsys.readouterr().out.splitlines()
    assert told[1] == f"     8      24.0 us  150.0%   1980 MHz   699.5 W  {tmp_path}=tile" and len(told) == 4
    end(sides)


READY = "print('ready', flush=True); input()"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit(1)", "has failed; what it said is above"),
        (READY, "has failed; what it said is above"),  # in its first turn
        (f"{READY}; input()", r"has said nothing for 0\.11 s"),
    ],
)
def test_a_side_that_fails_or_is_silent_ends_the_run(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versus, "gpu", lambda: ["1980", "699.5"])
    if "nothing" in said:  # else a slow start is not to look like it
        monkeypatch.setattr(versus, "TURN_S", 0.1)
    side = Side(str(tmp_path), "8", [sys.executable, "-c", program])
    with pytest.raises(SystemExit, match=f"versus.py: {tmp_path} {said}"):
        side.wait()
        side.turn(8, 0.01)
    end([side])


def end(sides: list[Side]) -> None:
    for side in sides:
        side.end()
        assert side.process.returncode is not None


@pytest.mark.parametrize("mistake", [("--tokens", "8,0"), ("--tokens", "8,"), ("--rounds", "-1"), ("--ms", "0.5")])
def test_mistakes_are_one_line(mistake: tuple[str, str]) -> None:
    done = run(".", *mistake)
    assert done.returncode == 2 and done.stdout == ""
    wrong = mistake[1].split(",")[-1]
    assert done.stderr.endswith(f"error: argument {mistake[0]}: {wrong!r} is no number from 1 on\n")


def test_what_is_no_checkout_is_named(tmp_path: Path) -> None:
    done = run(".", f"{tmp_path}=hopper:128x96x64x4x2")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"scripts/bench/versus.py: {tmp_path}=hopper:128x96x64x4x2 is no checkout of epmoe: it has no "
        "scripts/bench/moe.py\n"
    )


@pytest.mark.gpu
def test_a_checkout_against_itself() -> None:
    done = run(".", ".=64x8x64x4x3", "--tokens", "1,16", "--ms", "200", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    *told, record = done.stdout.splitlines()
    rows = json.loads(record)["rows"]
    assert [(row["tokens"], row["side"]) for row in rows] == [
        (tokens, side) for tokens in (1, 16) for side in (".", ".=64x8x64x4x3")
    ]
    assert all(5 < us < 5000 for row in rows for us in row["us"]) and len(told) == 4


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts/bench/versus.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
