"""A command's clean end: one line for a user's mistake, whichever ranks made it, and the exit code."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from epmoe import streams
from epmoe.errors import UserError
from epmoe.ranks import guard
from epmoe.ranks.ending import leave
from epmoe.ranks.fault import NoRankZero, SharedMistake
from epmoe.ranks.launch import Launch, Patience, open_store, stdout_closed
from epmoe.ranks.memory import full, is_full
from epmoe.ranks.watch import EARLY_S, Watch


class Terminated(BaseException):
    """SIGTERM, where no watch hears it: in a rank alone, and before the ranks have met."""


def main(body: Callable[[], None]) -> NoReturn:
    """Run a command and end the process: 0, 1 after an exception, 2 after a user's mistake, 130 after Ctrl-C.

    A mistake is one line from rank 0, on whichever ranks it was made. A reader of standard output that has closed it
    (`| head`) has had enough: 0. After SIGTERM it is 143; a process that does not answer a signal is killed (guard.py).
    A standard stream that is closed from the start is the null device.
    """
    streams.open_missing()
    guard.begin()
    try:
        for number in guard.SIGNALS:
            signal.signal(number, _answer)
        code = _run(body)
    except (KeyboardInterrupt, Terminated) as end:
        number = signal.SIGINT if isinstance(end, KeyboardInterrupt) else signal.SIGTERM
        code = 128 + number
        guard.told()
        if os.environ.get("RANK", "0") == "0":  # a terminal interrupts all of them
            streams.tell(f"epmoe: {guard.SIGNALS[number]}")
    leave(code)


def _answer(number: int, _: Any) -> NoReturn:
    """The first signal ends the command; what follows it (an agent's SIGTERM, impatience) must not disturb that."""
    for each in guard.SIGNALS:
        signal.signal(each, lambda *_: None)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _run(body: Callable[[], None]) -> int:
    """The exit code, after whatever there is to be said."""
    try:
        body()
        sys.stdout.flush()
    except UserError as error:
        _tell_once(error)
        return 2
    except SystemExit as end:
        if isinstance(end.code, str):
            streams.tell(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if is_full(error):
            _tell_once(full(error))
            return 2
        if not (isinstance(error, BrokenPipeError) and stdout_closed()):
            streams.tell(traceback.format_exc().removesuffix("\n"))
            return 1
    return 0


def _tell_once(error: UserError) -> None:
    """Say a mistake that was found before the ranks met: rank 0 its own, and another's only if it has none.

    So that ranks which still import hear of it, too, all meet as for a run, for EARLY_S at most. A rank that finds no
    rank 0 says its mistake itself.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0" or isinstance(error, NoRankZero):
        streams.tell(f"epmoe: error: {error}")
    if isinstance(error, NoRankZero | SharedMistake):
        return
    try:
        launch = Launch.read()
        if launch.size == 1:
            return
        patience = Patience.of(EARLY_S, 0.0)
        store, host = open_store(launch, EARLY_S, patience)
        watch = Watch(launch, store, host, EARLY_S, patience)
    except UserError:
        if rank != "0":
            streams.tell(f"epmoe: error: rank {rank}: {error}")
        return
    watch.fail("told" if rank == "0" else "mistake", str(error), 2)
