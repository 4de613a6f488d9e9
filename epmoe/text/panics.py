"""The tokenizers library, for all that it can raise.

It raises nothing narrower than Exception. Where its Rust code panics (an index out of range, say), that reaches Python
as a BaseException of its own, after Rust has printed a trace on standard error.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from epmoe.errors import UserError

_ALONE = threading.RLock()  # file descriptor 2 is one for all threads


@contextmanager
def guarded(what: str, remedy: str) -> Iterator[None]:
    """Whatever the library raises within is a UserError, "{what} ({the error}): {remedy}", and nothing is printed.

    Standard error of the whole process is kept aside meanwhile, and given out after it unless there was a panic.
    """
    with _aside() as panicked:
        try:
            yield
        except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            panicked[:] = [not isinstance(error, Exception)]
            raise refused(error, what, remedy) from error


def refused(error: BaseException, what: str, remedy: str) -> UserError:
    """What was raised, as a user's mistake."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{what} ({said}): {remedy}")


@contextmanager
def _aside() -> Iterator[list[bool]]:
    """Keep what is written to file descriptor 2 in memory; drop it in the end if the list says so."""
    drop = [False]
    with _ALONE:
        try:
            kept, real = os.memfd_create("standard-error"), os.dup(2)
        except (OSError, AttributeError):  # closed, or a system without such files: then it is printed
            yield drop
            return
        _replace(kept)
        try:
            yield drop
        finally:
            _replace(real)
            os.lseek(kept, 0, os.SEEK_SET)
            while not drop[0] and (data := os.read(kept, 1 << 16)):
                os.write(2, data)
            os.close(real)
            os.close(kept)


def _replace(file: int) -> None:
    """Make file descriptor 2 this file, once what Python holds back for it is written."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or what Python code has put in its place
        sys.stderr.flush()
    os.dup2(file, 2)
