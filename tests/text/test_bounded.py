"""Bounded: a function in a process of its own answers, or ends, and never takes more than it may."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any
from unittest import mock

import pytest
from waits import gone, until

from epmoe.text.bounded import Bounded, ExceededError, Limits

SMALL = Limits(seconds=0.2, seconds_per_mb=0.5, memory_mb=64, memory_mb_per_mb=8)


def act(call: dict[str, Any]) -> Any:
    """What the tests ask of the process."""
    match call:
        case {"echo": value}:
            return value
        case {"spin": float(seconds)}:
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass
        case {"power": int(size)}:  # one operation, which Python cannot interrupt
            return (7**size) % 10
        case {"take": int(megabytes)}:
            return len(bytes(megabytes * 1_000_000))
        case {"signal": int(number)}:
            os.kill(os.getpid(), number)
        case {"print": str(words)}:
            print(words, flush=True)
            print(words, file=sys.stderr, flush=True)
        case {"exit": int(code)}:
            sys.exit(code)
        case {"leave": int(code), "after": float(seconds)}:  # it says nothing more, and ends later: a busy machine
            os.closerange(3, 100)
            time.sleep(seconds)
            os._exit(code)
    return os.getpid()


@pytest.fixture
def bounded() -> Bounded:
    return Bounded(f"{__name__}:act", SMALL)


def test_any_json_comes_back(bounded: Bounded) -> None:
    value: Any
    for value in (None, "é\ud800\n", [1, 2.5, True, {"a": [None]}], "x" * 300_000, {}):
        assert bounded({"echo": value}) == value
    for wrong in (float("nan"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            bounded({"echo": wrong})
    assert bounded({"echo": 1}) == 1


def test_one_process_stays_and_is_not_this_one(bounded: Bounded) -> None:
    first = bounded({})
    assert first == bounded({"print": "between the messages"}) == bounded({"spin": 0.01}) != os.getpid()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"spin": 99.0}, r"runs for more than 0\.2 s"),
        ({"power": 10**9}, r"(runs for more than 0\.2 s|takes more than 64 MB of memory)"),
        ({"take": 100}, "takes more than 64 MB of memory"),
        ({"signal": int(signal.SIGSEGV)}, r"has ended its process \(signal 11\)"),
        ({"exit": 3}, r"has ended its process \(exit code 3\)"),
        ({"leave": 4, "after": 0.7}, r"has ended its process \(exit code 4\)"),
    ],
)
def test_what_takes_too_much_ends_and_the_next_call_runs(bounded: Bounded, call: dict[str, Any], says: str) -> None:
    bounded({})
    began = time.monotonic()
    with pytest.raises(ExceededError, match=says):
        bounded(call)
    assert time.monotonic() - began < 40  # on a busy machine, too
    assert bounded({"echo": 1}) == 1


def test_ctrl_c_while_one_ends_leaves_none(bounded: Bounded) -> None:
    bounded({})
    process = bounded._process
    assert process is not None
    with mock.patch.object(process, "wait", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        bounded({"leave": 4, "after": 600.0})
    assert process.wait(60) == -signal.SIGKILL
    assert bounded({"echo": 1}) == 1


def test_one_that_does_not_end_is_not_said_to_be_full(bounded: Bounded) -> None:
    bounded({})
    process = bounded._process
    assert process is not None
    late = subprocess.TimeoutExpired("", 10)
    with mock.patch.object(process, "wait", side_effect=[late, -9]), pytest.raises(ExceededError, match="nor ends"):
        bounded({"leave": 4, "after": 600.0})
    assert process.wait(60) == -signal.SIGKILL
    assert bounded({"echo": 1}) == 1


def test_time_and_memory_count_for_each_call_and_grow_with_what_is_given(bounded: Bounded) -> None:
    for _ in range(3):
        bounded({"spin": 0.12})
        assert bounded({"take": 40}) == 40_000_000
    more = {"padding": "x" * 1_000_000}
    bounded({"spin": 0.4, **more})
    assert bounded({"take": 68, **more}) == 68_000_000


def test_the_terminals_interrupt_does_not_reach_it(bounded: Bounded) -> None:
    first = bounded({})
    os.kill(first, signal.SIGINT)
    assert bounded({}) == first


def test_one_that_ended_between_two_calls_is_replaced(bounded: Bounded) -> None:
    first = bounded({})
    os.kill(first, signal.SIGTERM)
    assert bounded._process is not None
    bounded._process.wait()
    assert bounded({}) != first


def test_it_ends_with_the_process_that_calls() -> None:
    """However that ends: here it has no time to say anything."""
    program = (
        "import os; from epmoe.text.bounded import Bounded; "
        "b = Bounded('os:waitstatus_to_exitcode'); b(0); print(b._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    pid = int(ended.stdout.split()[-1])
    until(lambda: gone(pid))


def test_threads_take_turns(bounded: Bounded) -> None:
    bounded({})  # of one process
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda number=each: found.update({number: bounded({"echo": [number] * 99_999})}))
        for each in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {each: [each] * 99_999 for each in range(8)}  # more than a pipe holds at a time
