"""The one kind of exception that is a user's mistake, and what is said of something that may be one."""

import os
import sys
from functools import cache


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the value, the place and the remedy.

    Rank 0 prints it once, without a traceback, and every rank exits non-zero. A broken invariant is an
    `assert`, never a `UserError`.
    """

    def __init__(self, message: str) -> None:
        # Names of files and text may hold newlines, or bytes that are no UTF-8; they are shown as \n and \udcff.
        shown = (each if each.isprintable() else repr(each)[1:-1] for each in message)
        super().__init__("".join(shown))


@cache
def warn(message: str) -> None:
    """Say on standard error, once and on rank 0 alone, what may be a mistake and stops nothing: one line, as above."""
    if os.environ.get("RANK", "0") == "0":
        print(f"epmoe: warning: {UserError(message)}", file=sys.stderr)
