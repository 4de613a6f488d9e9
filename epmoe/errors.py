"""The one kind of exception that is a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the value, the place and the remedy.

    Rank 0 prints it once, without a traceback, and every rank exits non-zero. A broken invariant is an
    `assert`, never a `UserError`.
    """
