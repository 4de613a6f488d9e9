"""Turns of tests that run in several processes: many share a turn, or one test has it alone.

A test that depends on time is marked `alone`. Where workers run tests in parallel, it waits until no other test runs,
and the others wait for it.
"""

from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from pathlib import Path


class Turns:
    """The turns of one worker; `folder` is the same for all of them.

    Who wants to be alone waits at the door and keeps it shut: nobody else enters in the meantime, so it waits only for
    the tests that run already.
    """

    def __init__(self, folder: Path) -> None:
        self._door, self._room = (folder / "door").open("w"), (folder / "room").open("w")
        self._inside = False

    def take(self, *, alone: bool) -> None:
        """Wait for a turn. Whoever kept the last one, by not ending it, has this one too."""
        if self._inside:
            return
        flock(self._door, LOCK_EX)
        flock(self._room, LOCK_EX if alone else LOCK_SH)
        flock(self._door, LOCK_UN)
        self._inside = True

    def end(self) -> None:
        flock(self._room, LOCK_UN)
        self._inside = False
