"""Drain: the first SIGTERM or SIGINT asks a run to come to an end in its own time, the next one ends it. Both exit 0.

launcher ── SIGTERM ──▶ any rank ──watch──▶ rank 0: begin() ──▶ the block ends, on every rank
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Protocol

from epmoe.ranks import guard


class Watched(Protocol):
    """A rank's watch, which hears the signals where there are several ranks."""

    drain: "Drain | None"


class Drain:
    """Calls `begin` once, on a thread of its own, when the run is asked to end. For signal handlers, too."""

    def __init__(self, begin: Callable[[], object]) -> None:
        self.begin = begin
        self.first_s: float | None = None
        self.signals: SimpleQueue[bool] = SimpleQueue()  # a handler may come between any two operations: no lock
        self.thread = threading.Thread(target=self._wait, name="epmoe-drain", daemon=True)
        self.thread.start()

    def asked(self) -> bool:
        """A signal has come; False: it is another one than the first, and the run must end now."""
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now
            self.signals.put(True)
        return now - self.first_s <= guard.AGAIN_S

    def close(self) -> None:
        """It is no longer asked; whatever has begun goes on."""
        self.signals.put(False)

    def _wait(self) -> None:
        if self.signals.get():
            self.begin()


@contextmanager
def drained(
    watch: Watched | None, seconds: float, begin: Callable[[], object], end: Callable[[], object]
) -> Iterator[None]:
    """Let signals ask for the end of the block. Main thread only.

    Args:
        watch: the rank's; None: it is alone.
        seconds: that coming to an end may take, before the guard ends this process.
        begin: called on another thread, once; on a rank other than 0 it has nothing to do.
        end: called on the main thread by another signal, where the rank is alone; it does not return.
    """
    drain = Drain(begin)
    guard.patient(seconds)
    if watch is not None:
        watch.drain = drain  # up to the process' end
        yield
        drain.close()
        return

    def answer(number: int, frame: Any) -> None:
        if not drain.asked():
            end()

    old = {number: signal.signal(number, answer) for number in guard.SIGNALS}
    yield
    drain.close()
    for number, handler in old.items():
        signal.signal(number, handler)
