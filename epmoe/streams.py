"""Standard streams that may be closed, full or without a reader: a run that writes a file goes on all the same.

A process that starts with a standard stream closed (`>&-`) gives its number to the next file that it opens, and whoever
writes to that number writes into the file. Python has None for such a stream, and `print(..., file=None)` is standard
output. Hence commands call `open_missing` before they open anything, and messages go through `tell`.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def open_missing() -> None:
    """Put the null device in the place of each standard stream that is closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            taken = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            assert taken == number
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            # A file of its own: where the number was taken before this call, it is some other file's.
            setattr(sys, name, Path(os.devnull).open("w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def tell(line: str) -> None:
    """Say something on standard error, at once; nowhere if that is closed, full or has no reader."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def tell_raw(lines: str) -> None:
    """The same past Python's stream, whose lock another thread may hold."""
    if sys.stderr is not None:  # else the number may be another file's
        with suppress(OSError):
            os.write(2, lines.encode())


def on_terminal() -> bool:
    """Whether somebody may be looking at standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def let_go(stream: TextIO) -> None:
    """Nobody reads `stream` any more: what is still written to it goes to the null device."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
