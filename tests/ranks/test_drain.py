"""Drain: the first signal asks, those of the same second are it, the next one ends."""

import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from spawn import commands

from epmoe.ranks import guard, mesh
from epmoe.ranks.command import leave
from epmoe.ranks.drain import Drain, drained

WITHIN_S = 10


def test_begin_comes_once_and_elsewhere() -> None:
    threads: list[threading.Thread] = []
    begun = threading.Event()

    def begin() -> None:
        threads.append(threading.current_thread())
        begun.set()

    drain = Drain(begin)
    assert drain.asked() and drain.asked()
    assert begun.wait(WITHIN_S)
    with mock.patch("time.monotonic", return_value=time.monotonic() + guard.AGAIN_S + 1):
        assert not drain.asked()
    drain.thread.join(WITHIN_S)
    assert threads == [drain.thread] and not drain.thread.is_alive()


def test_a_block_that_is_never_asked_leaves_nothing() -> None:
    handlers = [signal.getsignal(number) for number in guard.SIGNALS]
    before = threading.active_count()
    with drained(None, 1.0, pytest.fail, pytest.fail):
        assert [signal.getsignal(number) for number in guard.SIGNALS] != handlers
    deadline = time.monotonic() + WITHIN_S
    while threading.active_count() > before:
        assert time.monotonic() < deadline
    assert [signal.getsignal(number) for number in guard.SIGNALS] == handlers


def work(seconds: float) -> None:
    """All ranks go on until rank 0 is asked to end, and then so long."""
    with mesh.start(device="cpu", timeout_s=20) as mine:
        asked = threading.Event()
        with drained(mine.watch, seconds, asked.set, lambda: leave(0)):
            os.write(1, b"running\n")
            if mine.is_main:
                while not asked.wait(0.05):
                    pass
                os.write(1, b"asked\n")
                time.sleep(seconds)
            mine.meet()


# (signals, to which rank, seconds between, how long the work goes on) of ranks → whether it comes to its end
CASES = {
    "one": ([signal.SIGTERM], 0.0, 0.5, True),
    "twice, as a terminal and a launcher do": ([signal.SIGINT, signal.SIGTERM], 0.1, 1.0, True),
    "again, later": ([signal.SIGTERM, signal.SIGTERM], guard.AGAIN_S + 0.5, 60.0, False),
}


def never_ends(seconds: float) -> None:
    with mesh.start(device="cpu"), drained(None, seconds, lambda: None, lambda: None):
        os.write(1, b"running\n")
        time.sleep(1000)


@pytest.mark.alone
def test_a_block_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """By the guard: after the time that it said it may take, and not before."""
    with commands(never_ends, 1, 0.5, folder=tmp_path) as (started,):
        deadline = time.monotonic() + 30
        while "running" not in started.stdout:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        begin = time.monotonic()
        started.signal(signal.SIGTERM)
        assert started.wait(guard.GRACE_S + WITHIN_S) == -signal.SIGKILL
        assert guard.GRACE_S + 0.5 <= time.monotonic() - begin < guard.GRACE_S + 5
        assert started.stderr == "epmoe: ended by SIGTERM\n"


@pytest.mark.alone
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_signals(case: str, ranks: int, tmp_path: Path) -> None:
    """Whichever rank they come to, all end with 0."""
    signals, between_s, seconds, _ = CASES[case]
    with commands(work, ranks, seconds, folder=tmp_path) as started:
        deadline = time.monotonic() + 30
        while not all("running" in each.stdout for each in started):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        begin = time.monotonic()
        for number in signals:
            started[-1].signal(number)
            time.sleep(between_s)
        assert [each.wait(WITHIN_S) for each in started] == [0] * ranks, [each.stderr for each in started]
        assert time.monotonic() - begin < WITHIN_S
        assert started[0].stdout == "running\nasked\n"
