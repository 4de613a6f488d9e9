"""Waits of tests: for what they need, with a bound that only a hang meets."""

import time
from collections.abc import Callable
from contextlib import suppress

import psutil


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Raises AssertionError where it does not hold within so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether the process has ended, though nobody may have asked how."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True
