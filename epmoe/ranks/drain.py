"""Drain: a signal asks a run to come to an end in its own time, the next one ends it. Both exit 0.

launcher ── SIGTERM ──▶ any rank ──watch──▶ rank 0: begin() ──▶ the block ends, on every rank
                          └── before the run is ready: there is nothing to bring to an end, and all ranks end at once
"""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

from epmoe.ranks import guard


class Watched(Protocol):
    """A rank's watch, which hears the signals where there are several ranks."""

    drain: "Drain | None"


class Drain:
    """Calls `begin` once, on a thread of its own, when a run that is ready is asked to end. Signal handlers may ask."""

    def __init__(self) -> None:
        self.begin: Callable[[], object] | None = None  # None: the run is not ready
        self.first_s: float | None = None
        self.signals: SimpleQueue[bool] = SimpleQueue()  # a handler may come between any two operations: no lock
        self.thread = threading.Thread(target=self._wait, name="epmoe-drain", daemon=True)
        self.thread.start()

    def ready(self, seconds: float, begin: Callable[[], object]) -> None:
        """From now on a signal asks, and calls `begin`; on a rank other than 0 that has nothing to do.

        Args:
            seconds: that coming to an end may take, before the guard ends this process.
        """
        guard.patient(seconds)
        self.begin = begin

    def asked(self) -> bool:
        """A signal has come. False: the run must end now: it is not ready, or this is another one than the first."""
        if self.begin is None:
            return False
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now
            self.signals.put(True)
        return now - self.first_s <= guard.AGAIN_S

    def close(self) -> None:
        """It is no longer asked; whatever has begun goes on."""
        self.signals.put(False)

    def _wait(self) -> None:
        if self.signals.get() and self.begin is not None:
            self.begin()


@contextmanager
def drained(watch: Watched | None, end: Callable[[int], object]) -> Iterator[Drain]:
    """Let signals end the block: at once, until it says that it is ready. Main thread only.

    Args:
        watch: the rank's; None: it is alone.
        end: called on any thread with the signal that ends a rank alone at once; it does not return.
    """
    drain = Drain()
    try:
        if watch is not None:
            watch.drain = drain  # up to the process' end
            yield drain
            return
        with _heard(lambda number: drain.asked() or end(number)):
            yield drain
    finally:
        drain.close()


@contextmanager
def _heard(answer: Callable[[int], object]) -> Iterator[None]:
    """Answer the signals of a rank alone: on a thread, since the main thread may be in an operation of minutes."""
    here, there = socket.socketpair()
    source = guard.heard()
    handlers = guard.Handlers(answer, guarded=source is not None)

    def listen() -> None:
        while source and here not in (found := select.select([source, here], [], [])[0]):
            numbers = guard.received(found[0])
            if numbers is None:
                handlers.take_over()
                return
            for each in numbers:
                answer(each)

    thread = threading.Thread(target=listen, name="epmoe-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        there.close()
        thread.join()
        here.close()
        handlers.close()
