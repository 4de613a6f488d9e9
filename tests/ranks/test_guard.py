"""Guard: a command whose main thread answers no signal ends within seconds all the same, and says why."""

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals

import psutil
import pytest
from spawn import GRACE, Command, commands
from waits import gone, until

from epmoe.ranks import command, guard, mesh

pytestmark = pytest.mark.alone  # it measures time

WITHIN_S = guard.GRACE_S + 60
REAL = {GRACE: str(guard.GRACE_S)}


def never(words: bytes = b"") -> None:
    """Say that, then one operation in C that neither ends nor releases Python's lock: a mutex is locked twice."""
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    os.write(1, words)
    library.pthread_mutex_lock(mutex)


def keep_the_lock(ranks: list[int]) -> None:
    """Some ranks do that; the others wait for them."""
    with mesh.start(device="cpu", timeout_s=300) as mine:
        if mine.rank in ranks:
            never(b"running\n")
        os.write(1, b"running\n")
        mine.barrier()


def wait_for_threads() -> None:
    """Ctrl-C leaves the block, whose end waits for its threads: as a library's download does."""
    with ThreadPoolExecutor() as pool:
        pool.submit(time.sleep, 1000)
        os.write(1, b"running\n")
        time.sleep(1000)


def hang_at_the_end() -> None:
    """It has said why it ends, and then does not."""
    command.leave = lambda code: never()  # type: ignore[assignment, return-value]
    os.write(1, b"running\n")
    time.sleep(1000)


def sleep() -> None:
    with mesh.start(device="cpu"):
        os.write(1, b"running\n")
        time.sleep(1000)


def child(each: Command) -> psutil.Process:
    """The rank's guard."""
    (found,) = psutil.Process(each.process.pid).children()
    return found


def until_running(*runs: list[Command], seconds: float = 200) -> None:
    """Until each rank has said so; who has not, and what it said instead, is in the error."""
    ranks = [each for started in runs for each in started]
    deadline = time.monotonic() + seconds
    while silent := [each for each in ranks if not each.stdout]:
        assert time.monotonic() < deadline, [(each.stderr, each.process.exitcode) for each in silent]
        time.sleep(0.02)


# (what runs, its arguments, ranks, signal, to which ranks) → codes, standard error by rank
KILLED = "epmoe: rank {} ended without a word (killed?); rank {} ends too\n"
CASES: list[tuple[Callable[..., None], tuple[list[int], ...], int, Signals, list[int], list[int], list[str]]] = [
    (keep_the_lock, ([0],), 1, SIGINT, [0], [-SIGKILL], ["epmoe: interrupted\n"]),
    (keep_the_lock, ([0],), 1, SIGTERM, [0], [-SIGKILL], ["epmoe: ended by SIGTERM\n"]),
    (wait_for_threads, (), 1, SIGINT, [0], [-SIGKILL], ["epmoe: interrupted\n"]),
    (hang_at_the_end, (), 1, SIGINT, [0], [-SIGKILL], ["epmoe: interrupted\n"]),
    (keep_the_lock, ([0, 1],), 2, SIGINT, [0, 1], [-SIGKILL] * 2, ["epmoe: interrupted\n", ""]),
    (keep_the_lock, ([1],), 2, SIGINT, [0, 1], [130, -SIGKILL], ["epmoe: interrupted\n", ""]),
    (keep_the_lock, ([0],), 2, SIGINT, [0, 1], [-SIGKILL, 130], ["epmoe: interrupted\n", ""]),
    (keep_the_lock, ([1],), 2, SIGTERM, [1], [1, -SIGKILL], [KILLED.format(1, 0), ""]),
]


def test_a_main_thread_that_answers_no_signal(tmp_path: Path) -> None:
    """All at once, as each takes GRACE_S: they only wait. One line of the run, from rank 0, whoever says it."""
    with ExitStack() as stack:
        runs = []
        for number, (body, arguments, size, *_) in enumerate(CASES):
            (folder := tmp_path / str(number)).mkdir()
            runs.append(stack.enter_context(commands(body, size, *arguments, folder=folder, env=REAL)))
        until_running(*runs)
        time.sleep(0.3)  # they are in that operation
        for started, (*_, signal, victims, _, _) in zip(runs, CASES, strict=True):
            for rank in victims:
                started[rank].signal(signal)
        deadline = time.monotonic() + WITHIN_S
        ended = [[each.wait(deadline - time.monotonic()) for each in started] for started in runs]
        assert ended == [case[-2] for case in CASES]
        assert [[each.stderr for each in started] for started in runs] == [case[-1] for case in CASES]


def test_one_that_answers_ends_before_the_guard_would(tmp_path: Path) -> None:
    """And once only, however many signals come."""
    with commands(sleep, 1, folder=tmp_path) as started:
        until_running(started)
        for number in (SIGINT, SIGTERM, SIGINT):
            started[0].signal(number)
        assert started[0].wait(30) in (128 + SIGINT, 128 + SIGTERM)
        assert len(started[0].stderr.splitlines()) == 1 and started[0].stderr.startswith("epmoe: ")


@pytest.mark.parametrize("size", [1, 2])
def test_without_the_guard_a_signal_still_ends_it(size: int, tmp_path: Path) -> None:
    """Whoever kills the guard has the ranks' own handlers left."""
    with commands(sleep, size, folder=tmp_path) as started:
        until_running(started)
        for each in started:
            child(each).kill()
        for each in started:
            each.signal(SIGINT)
        assert [each.wait(30) for each in started] == [130] * size
        assert [line for line in started[0].stderr.splitlines() if line.startswith("epmoe")] == ["epmoe: interrupted"]


def test_the_guard_holds_nothing_and_goes_with_its_command(tmp_path: Path) -> None:
    """A pipe that it kept open would have no end for its reader."""
    with commands(sleep, 1, folder=tmp_path) as started:
        until_running(started)
        found = child(started[0])
        until(lambda: found.num_fds() == 2)
        started[0].signal(SIGKILL)
        until(lambda: gone(found.pid), guard.LOOK_S - 1)  # not only when it looks
