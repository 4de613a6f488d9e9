"""Starts as users ask for them: real programs, an empty cache and then a full one; none outlives a mistake."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from waits import gone, until

from epmoe.bench import start as module
from epmoe.bench.options import StartConfig
from epmoe.bench.start import run, start
from epmoe.config.compose import parse
from epmoe.errors import UserError

KEYS = ["runtime=cpu", "size=tiny", "sequences=3", "prompt_tokens=6", "repeat=2"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_command(ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "start", *KEYS[:-1], "repeat=1", f"ranks={ranks}"])
    begin = time.monotonic()
    start()
    taken = time.monotonic() - begin
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert (record["bench"], record["ranks"], record["sequences"], record["prompt_tokens"]) == ("start", ranks, 3, 6)
    starts = [record["cold"], *record["warm"]]
    assert len(record["warm"]) == 1 and sum(each["first_s"] for each in starts) < taken
    assert all(0 < each["load_s"] < each["ready_s"] < each["first_s"] for each in starts)
    (cold,) = (line for line in lines if line.startswith("| none"))
    assert cold == f"| none | {starts[0]['ready_s']:.2f} | {starts[0]['first_s']:.2f} | {starts[0]['load_s']:.2f} |"


def test_the_cache_is_empty_and_then_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program finds in TRITON_CACHE_DIR what those before it have left."""
    found: list[int] = []

    def stands_in(command: Sequence[str], more: Mapping[str, str], limit: float) -> str:
        folder = Path(more["TRITON_CACHE_DIR"])
        found.append(len(list(folder.iterdir())))
        (folder / str(found[-1])).touch()
        return json.dumps(dict.fromkeys(module.TIMES, 0.0))

    monkeypatch.setattr(module, "run", stands_in)
    monkeypatch.setattr(module, "table", lambda record: "")
    monkeypatch.setattr(sys, "argv", ["bench", "start", *KEYS])
    start()
    assert found == [0, 1, 2]


def test_a_program_finds_its_variables() -> None:
    program = "import os; print(os.environ['TRITON_CACHE_DIR'])"
    assert run([sys.executable, "-c", program], {"TRITON_CACHE_DIR": "/somewhere"}, 60) == "/somewhere\n"


def test_nothing_outlives_its_time(tmp_path: Path) -> None:
    """Nor does what the program has started."""
    child = tmp_path / "child"
    program = (
        "import subprocess, sys, time; print('x', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    for limit in (1, 8, 64):  # by then a slow machine may have started nothing
        with pytest.raises(UserError, match=rf"runtime\.start_timeout_s={limit}:"):
            run([sys.executable, "-c", program], {}, limit)
        if child.exists():
            break
    pid = int(child.read_text())
    until(lambda: gone(pid))


def test_a_start_that_fails_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "start", "runtime=cpu", "checkpoint=/nowhere", "repeat=1"])
    with pytest.raises(UserError, match="exit code 2: mend what it says above"):
        start()
    assert "/nowhere" in capfd.readouterr().err


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, part in ((["size=tiny", "checkpoint=x"], "exclude each other"), (["ranks=0"], "ranks=0")):
        with pytest.raises(UserError, match=part):
            parse(words, StartConfig)
    with pytest.raises(UserError, match=r"runtime\.max_batch means nothing to a benchmark of starts"):
        parse(["runtime.max_batch=4"], StartConfig)
    monkeypatch.setattr(sys, "argv", ["bench", "start", *KEYS])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        start()
