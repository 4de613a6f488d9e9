"""Watch: ranks take different times to start: who is ready first waits for long, and sees at once who is gone."""

import os
import re
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM, Signals
from typing import Any

import pytest
from spawn import Command, commands

from epmoe import generate, llm
from epmoe.ranks import launch, mesh
from epmoe.ranks.ending import leave

pytestmark = pytest.mark.alone  # who is silent, and for how long, is not to depend on other tests


def generate_slowly(step: str, slow: int, *keys: str) -> None:
    """The real command, whose `step` takes rank `slow` longer than timeout_s."""
    sys.argv[1:] = ["runtime.device=cpu", "runtime.timeout_s=3", *keys]
    real = getattr(llm, step)

    def late(*arguments: Any, **options: Any) -> Any:
        if launch.Launch.read().rank == slow:
            time.sleep(4.5)
        return real(*arguments, **options)

    setattr(llm, step, late)
    generate.generate()


@pytest.mark.parametrize(
    "cases", [[("resolve", 1), ("load", 0)], pytest.param([("load", 2)], marks=pytest.mark.slow)], ids=["some", "rest"]
)
def test_a_slow_node_is_waited_for(cases: list[tuple[str, int]], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A download and the reading of weights may take one node longer than a collective may wait. Runs at once."""
    keys = [f"checkpoint={tiny_checkpoint}", "prompt=x", "max_new_tokens=4"]
    with ExitStack() as stack:
        runs = []
        for step, slow in cases:
            (folder := tmp_path / step).mkdir()
            runs.append(stack.enter_context(commands(generate_slowly, 3, step, slow, *keys, folder=folder)))
        for started in runs:
            assert [command.wait(40) for command in started] == [0, 0, 0], started[0].stderr
            assert started[0].stdout and "4 tokens in" in started[0].stderr


def meet_late(seconds: float, work: bool = False) -> None:
    """Rank 1 comes late to the second meeting, for which ranks wait for a second."""
    with mesh.start(device="cpu") as mine:
        mine.meet()
        mine = replace(mine, start_timeout_s=1.0)
        print("waiting", flush=True)
        if mine.rank == 1:
            time.sleep(seconds)
        mine.meet_after_work("answers") if work else mine.meet()


def wait_until_waiting(started: list[Command]) -> None:
    deadline = time.monotonic() + 60
    while not all(command.stdout for command in started):
        assert time.monotonic() < deadline, [command.stderr for command in started]
        time.sleep(0.05)


def test_a_rank_that_is_never_ready_is_named(tmp_path: Path) -> None:
    """It is alive and answers, so that only start_timeout_s ends the wait; the message names that key."""
    with commands(meet_late, 3, 1000.0, folder=tmp_path) as started:
        assert [command.wait(60) for command in started] == [1, 1, 1]
        late = "epmoe: rank 1 was not ready within 1 s of the others (runtime.start_timeout_s); rank {} ends too\n"
        assert [command.stderr for command in started] == [late.format(rank) for rank in range(3)]


def test_work_may_take_a_rank_as_long_as_it_takes(tmp_path: Path) -> None:
    """Longer than ranks wait for each other's start."""
    with commands(meet_late, 2, 3.0, True, folder=tmp_path) as started:
        assert [command.wait(60) for command in started] == [0, 0], [command.stderr for command in started]


def wait_for_ever() -> None:
    with mesh.start(device="cpu", timeout_s=8.0) as mine:
        print("waiting", flush=True)
        if mine.rank == 1:
            time.sleep(1000)
        mine.meet()


@pytest.mark.parametrize(
    ("number", "says"), [(SIGKILL, "ended without a word"), (SIGSTOP, r"has been silent for \d+ s")]
)
def test_a_rank_that_goes_while_others_wait_is_named(number: Signals, says: str, tmp_path: Path) -> None:
    """The long wait does not hide a death: within seconds, not within start_timeout_s."""
    with commands(wait_for_ever, 3, folder=tmp_path) as started:
        wait_until_waiting(started)
        started[1].signal(number)
        for rank in (0, 2):
            assert started[rank].wait(30) == 1
            assert re.match(f"epmoe: rank 1 {says}", started[rank].stderr)


def end_too_early() -> None:
    """Rank 0 takes the run for finished, as one that counts another run's rank would, and goes; rank 1 is at work."""
    with mesh.start(device="cpu", timeout_s=8.0) as mine:
        mine.meet()
        assert mine.watch is not None
        if mine.is_main:
            mine.watch.peers[1].send("bye")
            time.sleep(0.5)
            leave(0)
        time.sleep(1000)


def test_an_end_counts_only_after_a_ranks_own(tmp_path: Path) -> None:
    with commands(end_too_early, 2, folder=tmp_path) as started:
        assert [command.wait(30) for command in started] == [0, 1]
        assert started[1].stderr == "epmoe: rank 0 ended without a word (killed?); rank 1 ends too\n"


def live_on(number: int) -> None:
    """Ranks 2 and 3 are a unit of their own; rank 0 says when they are lost, and all that are left meet and end."""
    with mesh.start(device="cpu", timeout_s=8.0) as mine:
        assert mine.watch is not None
        lost: list[frozenset[int]] = []
        if mine.is_main:
            mine.watch.spare([frozenset({2, 3})], lost.append)
        mine.meet()
        print("waiting", flush=True)
        if mine.rank >= 2:
            time.sleep(1000)
        while mine.is_main and not lost:
            time.sleep(0.05)
        mine.meet("survivors")
        print("met", lost, flush=True)
        if number:  # what is left is one again
            mine.watch.spare((), lost.append)
            if mine.rank == 1:
                os.kill(os.getpid(), number)
            mine.meet()


@pytest.mark.parametrize("number", [SIGKILL, SIGTERM, pytest.param(SIGSTOP, marks=pytest.mark.slow)])
def test_a_unit_that_goes_leaves_the_others(number: Signals, tmp_path: Path) -> None:
    with commands(live_on, 4, 0, folder=tmp_path) as started:
        wait_until_waiting(started)
        started[2].signal(number)
        assert [started[rank].wait(30) for rank in (0, 1)] == [0, 0], started[0].stderr
        assert "met [frozenset({2, 3})]" in started[0].stdout and "met" in started[1].stdout
        line = started[0].stderr
        assert line.startswith("epmoe: rank 2") and line.endswith("; the others go on without ranks 2, 3\n")
        assert started[1].stderr == "" and started[3].wait(30) is not None


def test_without_units_a_lost_rank_ends_all_again(tmp_path: Path) -> None:
    with commands(live_on, 4, int(SIGKILL), folder=tmp_path) as started:
        wait_until_waiting(started)
        started[3].signal(SIGKILL)
        assert started[0].wait(30) == 1
        lines = started[0].stderr.splitlines()
        assert [line.split(";")[0] for line in lines] == [
            "epmoe: rank 3 ended without a word (killed?)", "epmoe: rank 1 ended without a word (killed?)",
        ]  # fmt: skip
