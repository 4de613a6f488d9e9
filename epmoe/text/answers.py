"""The file of answers (`output=`): a line of JSON a prompt, written as answers finish, so that no fault loses one.

    NAME.unfinished   lines in the order in which answers finish, while the run goes on; the run holds its lock
    NAME              all lines in the order of the prompts, put there in one step at the end

A run that ends early leaves NAME.unfinished, and `resume=true` goes on from there: what is in either file is not
computed again (epmoe/text/recorded.py). Rank 0 alone has such a file.
"""

import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from epmoe import strictjson
from epmoe.engine.request import Request
from epmoe.errors import UserError, warn
from epmoe.ranks.ending import at_the_end
from epmoe.text.recorded import FINAL, Place, recorded, request_digest

UNFINISHED = ".unfinished"  # stands after the file's name while a run goes on
SYNC_S = 1.0  # so often, at most, is what was written forced to the disk before the end


def check_writable(name: str) -> Path:
    """Where `output` is written: behind a link, so that the link stays. Raises UserError where it could not be."""
    path = Path(os.path.realpath(os.path.expanduser(name)))
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # the name is too long, or goes through a file
        raise UserError(f"output={name} cannot be written ({error.strerror}): choose another place") from error
    if path.is_dir():
        raise UserError(f"output={name} is a directory: give a file name")
    if path.exists() and not path.is_file():  # a device or a pipe; the file would take its place
        raise UserError(f"output={name} is no plain file: give a file name")
    if not path.parent.is_dir():
        raise UserError(f"output={name}: the directory {path.parent} does not exist: make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"output={name}: the directory {path.parent} cannot be written: choose another")
    return path


@contextmanager
def opened(name: str, *, resume: bool) -> Iterator["Answers"]:
    """The file of answers while a run goes on. If it ends early, on whatever way, a line says what is kept.

    Raises:
        UserError: the file cannot be written; another run writes it; it has answers, and `resume` is not asked for.
    """
    answers = Answers(name, resume=resume)
    with at_the_end(answers.last_words):
        try:
            yield answers
        finally:
            answers.close()


class Answers:
    """The answers of a run on their way into a file: `remaining`, then `add` each, then `finish`."""

    def __init__(self, name: str, *, resume: bool) -> None:
        self.name, self.resume, self.path = name, resume, check_writable(name)
        self.unfinished = self.path.with_name(f"{self.path.name}{UNFINISHED}")
        self.ordered = self.path.with_name(f".{self.path.name}.{os.getpid()}.ordered")
        self.turn = threading.Lock()  # `last_words` comes on another thread, and nothing is written after it
        self.places: dict[int, Place] = {}  # by index, in the unfinished file
        self.good: set[int] = set()  # those that are answers, and no errors
        self.digests: list[str] = []  # of the requests
        self.rest: list[int] = []
        self.known = self.finished = self.closed = False
        self.words = ""
        self.synced = time.monotonic()
        self.number = self._open()
        self.end = os.fstat(self.number).st_size
        if self.end and not resume:
            os.close(self.number)
            raise UserError(
                f"{self.unfinished} has answers of a run that did not end: go on from there with resume=true, or "
                "remove it"
            )

    def _open(self) -> int:
        """The unfinished file, locked; it may be another run's, which removes it at its end."""
        while True:
            with self._told():  # never truncated: it may be the only copy of answers
                number = os.open(self.unfinished, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(number)
                raise UserError(f"output={self.name} is being written by another run: choose another file") from None
            except OSError as error:
                warn(f"output={self.name}: no lock ({error.strerror}), so let no other run write it at the same time")
            state = os.fstat(number)
            if not stat.S_ISREG(state.st_mode):
                os.close(number)
                raise UserError(f"{self.unfinished} is no plain file: remove it, or choose another output=")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.unfinished), state):
                    return number
            os.close(number)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"output={self.name} cannot be written ({error.strerror}): choose another place") from error

    def remaining(self, requests: Sequence[Request], model: Any) -> list[int]:
        """The indices of the requests that are still to be computed, in order.

        Args:
            model: what tells models apart, anything that JSON can hold.
        Raises:
            UserError: what is there is damaged, or answers other requests. Nothing has been changed then.
        """
        self.digests = [request_digest(request, model) for request in requests]
        if self.resume:
            with self._told():
                self._take_over()
        self.known = True
        self.rest = [index for index in range(len(requests)) if index not in self.good]
        return self.rest

    def _take_over(self) -> None:
        """Let the unfinished file have the answers of both, and drop the line in which a run was killed."""
        with open(self.number, "rb", closefd=False) as file:
            self.places, self.end = recorded(file, self.unfinished, self.digests, torn=True)
        self.good = set(self.places)
        if self.path.exists():
            with self.path.open("rb") as file:
                before, _ = recorded(file, self.path, self.digests, torn=False)
                os.ftruncate(self.number, self.end)
                if len(before) == len(self.digests):  # it needs no other
                    self.good = set(before)
                    return
                for index in sorted(before.keys() - self.good):
                    file.seek(before[index].begin)
                    self._append(index, file.read(before[index].size).removesuffix(b"\n") + b"\n")
                    self.good.add(index)
        os.ftruncate(self.number, self.end)

    def add(self, which: int, record: dict[str, Any]) -> None:
        """The answer to the `which`-th of the remaining requests: it is in the file when this returns.

        Raises:
            UserError: it cannot be written.
        """
        index = self.rest[which]
        line = strictjson.dumps({"index": index, "request": self.digests[index], **record})
        with self.turn, self._told():
            self._append(index, f"{line}\n".encode())
            if record["finish_reason"] in FINAL:
                self.good.add(index)
            if time.monotonic() - self.synced > SYNC_S:
                os.fsync(self.number)
                self.synced = time.monotonic()

    def _append(self, index: int, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self.number, line[written:], self.end + written)
        except OSError:  # the disk is full: no half line is left
            os.ftruncate(self.number, self.end)
            raise
        self.places[index] = Place(self.end, len(line))
        self.end += len(line)

    def finish(self) -> None:
        """Put all lines under the file's name, in the order of the prompts: in one step, or not at all.

        Raises:
            UserError: it cannot be written; the unfinished file stays.
        """
        with self.turn, self._told():
            if self.rest or len(self.places) == len(self.digests):
                try:
                    self._order()
                finally:
                    self.ordered.unlink(missing_ok=True)
            self.unfinished.unlink(missing_ok=True)
            self.finished = True

    def _order(self) -> None:
        with self.ordered.open("xb") as file:
            for index in sorted(self.places):
                place = self.places[index]
                file.write(os.pread(self.number, place.size, place.begin))
            file.flush()
            os.fsync(file.fileno())
        self.ordered.replace(self.path)

    def close(self) -> None:
        """Let the file go; what nobody needs is removed."""
        with self.turn:
            if not self.closed:
                self._leave()
                os.close(self.number)

    def last_words(self) -> str:
        """What is said of a run that ended early, and the end of all writing. On any thread."""
        if not self.turn.acquire(timeout=0.5):  # the disk does not answer
            return f"epmoe: answers may be kept in {self.unfinished}: go on from there with resume=true"
        if not self.closed:
            self._leave()
        return self.words

    def _leave(self) -> None:
        self.closed = True
        count = f"{len(self.good)} answer{'s' if len(self.good) != 1 else ''}"
        with suppress(OSError):
            if self.finished:
                self.words = f"epmoe: {self.path} has the other {count}; resume=true tries the rest again"
                return
            if self.good and self.known:
                os.fsync(self.number)
                self.words = f"epmoe: {count} kept in {self.unfinished}: go on from there with resume=true"
            elif self.known or not os.fstat(self.number).st_size:
                self.unfinished.unlink(missing_ok=True)
            self.ordered.unlink(missing_ok=True)
