"""Drain: before a run is ready a signal ends it; then the first one asks, those of its second are it, the next ends."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from spawn import GRACE, Command, commands
from waits import until

from epmoe.ranks import guard, mesh
from epmoe.ranks.drain import Drain, drained
from epmoe.ranks.ending import leave

WITHIN_S = 30


def test_begin_comes_once_and_elsewhere() -> None:
    threads: list[threading.Thread] = []
    begun = threading.Event()

    def begin() -> None:
        threads.append(threading.current_thread())
        begun.set()

    drain = Drain()
    assert not drain.asked()  # it is not ready
    drain.ready(1.0, begin)
    with mock.patch("time.monotonic", return_value=time.monotonic()):
        assert drain.asked() and drain.asked()
    assert begun.wait(WITHIN_S)
    with mock.patch("time.monotonic", return_value=time.monotonic() + guard.AGAIN_S + 1):
        assert not drain.asked()
    drain.thread.join(WITHIN_S)
    assert threads == [drain.thread] and not drain.thread.is_alive()


def test_a_block_that_is_never_asked_leaves_nothing() -> None:
    handlers = [signal.getsignal(number) for number in guard.SIGNALS]
    before = threading.active_count()
    with drained(None, lambda number: pytest.fail(f"signal {number}")) as drain:
        drain.ready(1.0, pytest.fail)
        assert [signal.getsignal(number) for number in guard.SIGNALS] != handlers
    until(lambda: threading.active_count() <= before)
    assert [signal.getsignal(number) for number in guard.SIGNALS] == handlers


def work(seconds: float) -> None:
    """All ranks go on until rank 0 is asked to end, and then so long."""
    with mesh.start(device="cpu", timeout_s=20) as mine:
        asked = threading.Event()
        with drained(mine.watch, lambda number: leave(0)) as drain:
            drain.ready(seconds, asked.set)
            os.write(1, b"running\n")
            if mine.is_main:
                while not asked.wait(0.05):
                    pass
                os.write(1, b"asked\n")
                time.sleep(seconds)
                os.write(1, b"done\n")
            mine.meet()


# (signals, to which rank, seconds between, how long the work goes on) of ranks → whether it comes to its end
CASES = {
    "one": ([signal.SIGTERM], 0.0, 0.5, True),
    "twice, as a terminal and a launcher do": ([signal.SIGINT, signal.SIGTERM], 0.1, 1.0, True),
    "again, later": ([signal.SIGTERM, signal.SIGTERM], guard.AGAIN_S + 0.5, 60.0, False),
}


def never_ends(seconds: float) -> None:
    with mesh.start(device="cpu"), drained(None, lambda number: None) as drain:
        drain.ready(seconds, lambda: None)
        os.write(1, b"running\n")
        time.sleep(1000)


def wait_in_c() -> None:
    """One operation that neither ends nor comes back for a signal, and lets other threads run: a mutex locked twice."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def starts(ready: list[int]) -> None:
    """Ranks that start, as compilers make them wait; some are ready already."""
    with mesh.start(device="cpu", timeout_s=60) as mine, drained(mine.watch, lambda number: leave(0)) as drain:
        if mine.rank in ready:
            drain.ready(60, lambda: None)
        os.write(1, b"running\n")
        wait_in_c()


# ranks, those that are ready, to which the signal comes
STARTING: list[tuple[int, list[int], int]] = [(1, [], 0), (2, [], 0), (2, [], 1), (2, [1], 1), (2, [0], 1)]


@pytest.mark.alone
@pytest.mark.parametrize(
    "number",
    [pytest.param(each, marks=() if each == signal.SIGINT else pytest.mark.slow) for each in guard.SIGNALS],
)
def test_before_all_are_ready_a_signal_ends_them_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """Also where no main thread comes to it: long before the guard would kill them (see spawn), and with 0."""
    for place, (ranks, ready, told) in enumerate(STARTING):
        (folder := tmp_path / str(place)).mkdir()
        with commands(starts, ranks, ready, folder=folder) as started:
            until_running(started)
            time.sleep(0.2)  # they are in that operation
            started[told].signal(number)
            deadline = time.monotonic() + WITHIN_S
            codes = [each.wait(deadline - time.monotonic()) for each in started]
            assert codes == [0] * ranks, (place, codes, [each.stderr for each in started])


def comes_to_it_late(seconds: float) -> None:
    """Rank 0's main thread, whose handlers run so long after the signal, since one operation in C takes as long."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)

    def begin() -> None:
        os.write(1, b"asked\n")
        time.sleep(seconds)
        library.pthread_mutex_unlock(mutex)

    with mesh.start(device="cpu", timeout_s=60) as mine, drained(mine.watch, lambda number: leave(0)) as drain:
        drain.ready(60, begin)
        os.write(1, b"running\n")
        if mine.is_main:
            library.pthread_mutex_lock(mutex)
            time.sleep(1.0)  # longer than the watch waits for other faults
            os.write(1, b"went on\n")
        mine.meet()


@pytest.mark.alone
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_signal_is_one_however_late_a_handler_runs(ranks: int, tmp_path: Path) -> None:
    with commands(comes_to_it_late, ranks, guard.AGAIN_S + 1.0, folder=tmp_path) as started:
        until_running(started)
        time.sleep(0.2)
        started[0].signal(signal.SIGTERM)
        assert [each.wait(WITHIN_S) for each in started] == [0] * ranks, [each.stderr for each in started]
        assert started[0].stdout == "running\nasked\nwent on\n"


def until_running(started: list[Command]) -> None:
    until(lambda: all("running" in each.stdout for each in started))


@pytest.mark.alone
def test_a_block_that_does_not_end_is_killed(tmp_path: Path) -> None:
    """By the guard: after the time that it said it may take, and not before."""
    with commands(never_ends, 1, 0.5, folder=tmp_path, env={GRACE: str(guard.GRACE_S)}) as (started,):
        until_running([started])
        begin = time.monotonic()
        started.signal(signal.SIGTERM)
        assert started.wait(guard.GRACE_S + WITHIN_S) == -signal.SIGKILL
        assert time.monotonic() - begin >= guard.GRACE_S + 0.5
        assert started.stderr == "epmoe: ended by SIGTERM\n"


@pytest.mark.alone
@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        *zip(CASES, (2, 1, 2), strict=True),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in zip(CASES, (1, 2, 1), strict=True)),
    ],
)
def test_signals(case: str, ranks: int, tmp_path: Path) -> None:
    """Whichever rank they come to, all end with 0."""
    signals, between_s, seconds, ends = CASES[case]
    with commands(work, ranks, seconds, folder=tmp_path) as started:
        until_running(started)
        for number in signals:
            started[-1].signal(number)
            if between_s > guard.AGAIN_S:
                until(lambda: "asked" in started[0].stdout)  # it counts from here at the latest
            time.sleep(between_s)
        assert [each.wait(WITHIN_S) for each in started] == [0] * ranks, [each.stderr for each in started]
        assert started[0].stdout == "running\nasked\n" + "done\n" * ends
