"""The one kind of exception that is a user's mistake, and what is said of something that may be one."""

import os
from functools import cache

from epmoe.streams import tell

MOST = 480  # characters of a message; "epmoe: error: " stands before it


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the value, the place and the remedy.

    Rank 0 prints it once, without a traceback, and every rank exits non-zero. A broken invariant is an
    `assert`, never a `UserError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


def shown(message: str) -> str:
    """A text from anywhere as one line of at most MOST characters: a longer one loses its middle.

    Names of files and text may hold newlines, or bytes that are no UTF-8; they are shown as \\n and \\udcff.
    """
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in _cut(message))
    return _cut(line)


def _cut(text: str) -> str:
    """The place stands at the beginning of a message and the remedy at its end; a long value between them."""
    if len(text) <= MOST:
        return text
    return f"{text[: MOST - 190]} … ({len(text)} characters) … {text[-150:]}"


@cache
def warn(message: str) -> None:
    """Say on standard error, once and on rank 0 alone, what may be a mistake and stops nothing: one line, as above."""
    if os.environ.get("RANK", "0") == "0":
        tell(f"epmoe: warning: {shown(message)}")


def first_line(error: BaseException) -> str:
    """What an error from elsewhere says, with its name: the first line of it."""
    said = (str(error).strip().splitlines() or [""])[0].rstrip(" :.")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
