"""Guard: SIGINT and SIGTERM end a command within seconds, whatever it is at.

Python answers a signal between two operations of the main thread, and the watch (watch.py) in a thread of its own; both
need Python's lock. One operation may keep that lock for minutes, and one that releases it may never come back: a power
of large numbers, a library's own threads, a device. What needs no lock is the handler that Python has in C: it writes
the signal's number to a file descriptor. There a small child process reads:

    signal ── number ──▶ guard ── number ──▶ the watch, which ends all ranks with one line
                           └── after GRACE_S: the line, if nobody has said it, and SIGKILL

A command that brings its work to an end first says so (`patient`): the first signal then has that much longer.

The child is forked before torch is imported, so it is small. It ends with its parent.
"""

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from epmoe.ranks import launchers

GRACE_S = 6.0  # more than a clean end takes: another rank than 0 waits 3 s for the verdict, a stream's flush 1 s
LOOK_S = 10.0  # how often the child looks for a parent that has died and left its socket to another process
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}
AGAIN_S = 1.0  # a terminal's signal and the launcher's that follows are one
TOLD = 0  # no signal's number: the parent is about to say why it ends
PATIENT = 128  # nor is this and all above: so many seconds more for the first signal

ENDS: list[socket.socket] = []  # this process' end, once there is a guard: signals are the process' own, too


def begin(grace_s: float = GRACE_S) -> None:
    """Start this process' guard, once. Until the process handles the two signals itself, they end it at once.

    For a command's first lines, before it imports what takes seconds and before it starts a thread.

    Args:
        grace_s: from the first signal to SIGKILL, where the process has not ended and is not `patient`.
    """
    launchers.adopt(os.environ)  # the guard must know which rank's it is
    if ENDS:
        return
    here, there = socket.socketpair()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError:  # no more processes for this user: signals are answered where Python can
        return
    if child == 0:
        _keep_watch(there, parent, grace_s)
    there.close()
    here.setblocking(False)
    signal.set_wakeup_fd(here.fileno(), warn_on_full_buffer=False)  # for signals with a handler in Python
    ENDS.append(here)


def heard() -> socket.socket | None:
    """Where numbers of signals can be read, as the guard passes them on; None: this process has no guard."""
    return ENDS[0] if ENDS else None


def received(source: socket.socket) -> bytes | None:
    """The numbers of signals that the guard has passed on there; None: the guard was killed. Waits for nothing."""
    try:
        numbers = source.recv(4096)
    except BlockingIOError:
        return b""
    except OSError:
        return None
    return bytes(each for each in numbers if each in SIGNALS) if numbers else None


class Handlers:
    """The process' own handlers of the signals: Python's, which run in the main thread, when that comes to it.

    They are for want of better: what the guard passes on (or a file descriptor for wake-ups tells) is heard elsewhere,
    and a handler that runs much later would only tell it once more. Main thread only.

    Args:
        answer: called with a signal's number that nobody else has heard.
        guarded: somebody else hears them, until `take_over`.
    """

    def __init__(self, answer: Callable[[int], object], *, guarded: bool) -> None:
        self.answer, self.guarded = answer, guarded
        self.last = 0, float("-inf")  # a signal, and when its handler ran
        self.old = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def take_over(self) -> None:
        """The guard was killed, and may have taken a signal with it. On any thread."""
        self.guarded = False
        number, when = self.last
        if time.monotonic() - when <= AGAIN_S:
            self.answer(number)

    def close(self) -> None:
        """Put back those that were there before."""
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.last = number, time.monotonic()  # first: `take_over` may come in between
        if not self.guarded:
            self.answer(number)


def told() -> None:
    """This process says itself why it ends: the guard need not."""
    for each in ENDS:
        with suppress(OSError):
            each.send(bytes([TOLD]))


def patient(seconds: float) -> None:
    """The first signal asks this process to come to an end, which may take so many seconds, 127 at most."""
    for each in ENDS:
        with suppress(OSError):
            each.send(bytes([PATIENT + min(127, int(seconds + 1))]))


def _keep_watch(there: socket.socket, parent: int, grace_s: float) -> NoReturn:
    """The child's whole life. It keeps nothing of its parent's but standard error and the socket."""
    try:
        for number in (*SIGNALS, signal.SIGQUIT, signal.SIGHUP):  # a terminal sends them to all of its job
            signal.signal(number, signal.SIG_IGN)
        _close_all_but(2, there.fileno())
        there.setblocking(False)
        first, silent, patience, heard, deadline = 0, False, 0, 0.0, 0.0
        while True:
            select.select([there], [], [], max(0.0, deadline - time.monotonic()) if first else LOOK_S)
            numbers = _passed_on(there)
            if numbers is None or os.getppid() != parent:
                break
            silent |= TOLD in numbers
            for each in numbers:
                now = time.monotonic()
                if each >= PATIENT:
                    patience = each - PATIENT
                elif each in SIGNALS and not first:
                    first, heard, deadline = each, now, now + grace_s + patience
                elif each in SIGNALS and now - heard > AGAIN_S:
                    deadline = min(deadline, now + grace_s)
            if first and time.monotonic() >= deadline:
                _end(parent, "" if silent else SIGNALS[signal.Signals(first)])
                break
    finally:
        os._exit(0)


def _passed_on(there: socket.socket) -> bytes | None:
    """What has come, once it has gone back; None when the parent has ended."""
    try:
        numbers = there.recv(4096)
    except BlockingIOError:
        return b""
    except OSError:
        return None
    with suppress(OSError):  # the parent may read none of it
        there.send(bytes(number for number in numbers if number in SIGNALS))
    return numbers or None


def _end(parent: int, text: str) -> None:
    """Rank 0 says it; another rank is named by rank 0, which sees its end. A stream that is full is not waited for."""
    if text and os.environ.get("RANK", "0") == "0" and select.select([], [2], [], 0)[1]:
        with suppress(OSError):
            os.write(2, f"epmoe: {text}\n".encode())
    os.kill(parent, signal.SIGKILL)


def _close_all_but(*kept: int) -> None:
    """What stayed open here would not end for its reader when the parent ends."""
    try:
        numbers = [int(each) for each in os.listdir("/dev/fd")]
    except OSError:  # no such folder: at a command's begin few are open
        numbers = list(range(256))
    for number in numbers:
        if number not in kept:
            with suppress(OSError):
                os.close(number)
