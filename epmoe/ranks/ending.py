"""What a process still says and does when it ends: on every way but kill -9, also where nothing is unwound.

The watch ends a process while its main thread is anywhere, perhaps in a collective that never returns. What must not be
lost then registers here, and `leave` asks it.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from epmoe.streams import tell_raw

WAYS: list[Callable[[], str]] = []  # the process's own: it ends once


@contextmanager
def at_the_end(words: Callable[[], str]) -> Iterator[None]:
    """If the block does not come to its end, `words` is called when the process leaves.

    It gives a line for standard error, or "". It may be called on another thread, while the block still runs, and must
    not wait long.
    """
    WAYS.append(words)
    yield
    WAYS.remove(words)


def last_words() -> None:
    """Say them: on standard error, which may be gone."""
    while WAYS:
        if line := WAYS.pop()():
            tell_raw(f"{line}\n")


def leave(code: int) -> NoReturn:
    """End the process without unwinding: torch's own threads crash some interpreters at exit."""

    def flush() -> None:
        last_words()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()

    flusher = threading.Thread(target=flush, daemon=True)  # the main thread may hold a stream's lock for ever
    flusher.start()
    flusher.join(1)
    os._exit(code)
