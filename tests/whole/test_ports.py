"""Two runs with one MASTER_PORT: the first goes on unharmed, or all end; each line names the port; nothing hangs."""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from spawn import Command, commands, free_port
from waits import until

from epmoe import llm
from epmoe.weights.synthetic import make_checkpoint

pytestmark = pytest.mark.alone  # who comes first, and when, is not to depend on other tests

TIMEOUT_S = 3.0  # of ranks that wait for it
PATIENT_S = 60.0  # of those that do not
WITHIN_S = 40
LATER = -1.0  # a rank comes once the other run has met


def generate(tokens: int, checkpoint: str, timeout_s: float) -> None:
    """The real command."""
    from epmoe.generate import generate as body

    sys.argv[1:] = [f"checkpoint={checkpoint}", "prompt=x", f"max_new_tokens={tokens}", "sampling.ignore_eos=true"]
    sys.argv[1:] += ["runtime.device=cpu", f"runtime.timeout_s={timeout_s}"]
    body()


def meet(place: str, tokens: int, checkpoint: str, waits: list[float], timeout_s: float) -> None:
    """The same; a rank comes when it is `waits` seconds old, as if it had to import torch. When it has met with others
    it waits for the file "go", so that no run ends before the other one has come.
    """
    folder, rank, load = Path(place), int(os.environ["RANK"]), llm.load
    if waits[rank] == LATER:
        until(lambda: len([*folder.glob("met.*")]) == len(waits), WITHIN_S)
    else:
        time.sleep(waits[rank])

    def held(*arguments: Any, **options: Any) -> Any:
        (folder / f"met.{tokens}.{rank}").touch()
        until((folder / "go").exists, WITHIN_S)
        return load(*arguments, **options)

    llm.load = held
    generate(tokens, checkpoint, timeout_s)


def run(stack: ExitStack, port: int, folder: Path, tokens: int, checkpoint: Path, size: int) -> list[Command]:
    folder.mkdir(exist_ok=True)
    started = commands(generate, size, tokens, str(checkpoint), PATIENT_S, folder=folder, port=port)
    return stack.enter_context(started)


def ends(started: list[Command], seconds: float) -> list[int | None]:
    deadline = time.monotonic() + seconds
    return [each.wait(deadline - time.monotonic()) for each in started]


def error(command: Command) -> str:
    """The rank's one line about what went wrong."""
    (line,) = [line for line in command.stderr.splitlines() if line.startswith("epmoe: error: ")]
    return line


def test_a_second_run_is_refused_five_times_and_the_first_unharmed(tmp_path: Path) -> None:
    """Its ranks know at once; the first one goes on, and its text is what it is alone."""
    port, checkpoint = free_port(), make_checkpoint(tmp_path / "long", max_position=65536)
    with ExitStack() as stack:
        alone = run(stack, port, tmp_path / "alone", 50, checkpoint, 1)
        assert ends(alone, WITHIN_S) == [0]
        first = run(stack, port, tmp_path / "A", 60000, checkpoint, 3)
        while not first[0].stdout:
            assert first[0].wait(0.05) is None, first[0].stderr
        sizes = (3, 3, 3, 2, 4)
        others = [run(stack, port, tmp_path / f"B{i}", 5, checkpoint, size) for i, size in enumerate(sizes)]
        for second, size in zip(others, sizes, strict=True):
            assert ends(second, WITHIN_S) == [2] * size
            lines = [error(each) for each in second]
            assert lines[0].startswith(f"epmoe: error: MASTER_PORT {port} is taken, perhaps by another run: give each")
            why = "whose rank {} is there already" if size == 3 else f"of WORLD_SIZE=3 and not {size}"
            for rank, line in enumerate(lines[1:], 1):
                says = f"epmoe: error: MASTER_PORT {port} is another run's, {why.format(rank)}: give each run"
                assert line.startswith(says)
            assert [each.stdout for each in second] == [""] * size
        length, deadline = len(first[0].stdout), time.monotonic() + WITHIN_S
        while len(first[0].stdout) < max(2 * len(alone[0].stdout), length + 100):
            assert time.monotonic() < deadline and ends(first, 0) == [None] * 3, first[0].stderr
            time.sleep(0.05)
        assert first[0].stdout.startswith(alone[0].stdout.rstrip("\n\ufffd"))


@pytest.mark.parametrize(
    ("first", "second", "timeout_s"),
    [
        pytest.param([0.3, 0.3, 0.3], [LATER] * 3, PATIENT_S, id="one-came-first"),
        pytest.param([0.8, 1.3], [1.4, 1.0], TIMEOUT_S, id="met-with-the-other's", marks=pytest.mark.slow),
        pytest.param([0.4, 0.9, 1.5], [0.9, 0.5, 1.6], TIMEOUT_S, id="half-of-each", marks=pytest.mark.slow),
    ],
)
def test_two_runs_at_the_same_moment(
    first: list[float], second: list[float], timeout_s: float, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A rank comes when it has started up, so a rank 0 may have met with the other run's ranks, and takes them on.

    One run goes through whole, or none; which is a matter of time, and of the machine's other work.
    """
    port, place = free_port(), tmp_path / "place"
    place.mkdir()
    with ExitStack() as stack:
        runs: dict[int, list[Command]] = {}
        for tokens, waits in ((150, first), (100, second)):
            (folder := tmp_path / str(tokens)).mkdir()
            given = str(place), tokens, str(tiny_checkpoint), waits, timeout_s
            runs[tokens] = stack.enter_context(commands(meet, len(waits), *given, folder=folder, port=port))

        def all_have_come() -> bool:
            return all(
                each.wait(0) is not None or (place / f"met.{tokens}.{rank}").exists()
                for tokens, started in runs.items()
                for rank, each in enumerate(started)
            )

        until(all_have_come, WITHIN_S)
        (place / "go").touch()
        codes = [ends(started, WITHIN_S) for started in runs.values()]
        whole = [each for each in codes if 0 in each]
        assert len(whole) <= 1 and all(set(each) == {0} for each in whole), codes
        if LATER in second:
            assert set(codes[0]) == {0}, runs[150][0].stderr
        for (tokens, started), ended in zip(runs.items(), codes, strict=True):
            if 0 in ended:
                assert f"epmoe: {tokens} tokens in" in started[0].stderr
                continue
            for each in started:
                assert each.stdout == ""
                assert f"MASTER_PORT {port}" in each.stderr or f"MASTER_PORT 127.0.0.1:{port}" in each.stderr
