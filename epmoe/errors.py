"""The one kind of exception that is a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the value, the place and the remedy.

    Rank 0 prints it once, without a traceback, and every rank exits non-zero. A broken invariant is an
    `assert`, never a `UserError`.
    """

    def __init__(self, message: str) -> None:
        # Names of files and text may hold newlines, or bytes that are no UTF-8; they are shown as \n and \udcff.
        shown = (each if each.isprintable() else repr(each)[1:-1] for each in message)
        super().__init__("".join(shown))
