"""A command's clean end: one line for a user's mistake, whichever ranks made it, and the exit code."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from epmoe import streams
from epmoe.errors import UserError
from epmoe.ranks.fault import NoRankZero
from epmoe.ranks.launch import Launch, open_store, stdout_closed
from epmoe.ranks.watch import leave

TERMINATED = 128 + signal.SIGTERM
TOLD_S = 10.0  # how long an early error of another rank waits for rank 0 to print the same error


class Terminated(BaseException):
    """SIGTERM has come to a rank without peers; of several ranks the watch hears it."""


def main(body: Callable[[], None]) -> NoReturn:
    """Run a command and end the process: 0, 1 after an exception, 2 after a user's mistake, 130 after Ctrl-C.

    A mistake is one line from rank 0, on whichever ranks it was made. A reader of standard output that has closed it
    (`| head`) has had enough: 0. A standard stream that is closed from the start is the null device.
    """
    code = 0
    streams.open_missing()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            signal.signal(signal.SIGTERM, _terminate)
        body()
        sys.stdout.flush()
    except UserError as error:
        code = 2
        _tell_once(error)
    except KeyboardInterrupt:
        code = 130
        if os.environ.get("RANK", "0") == "0":  # a terminal interrupts all of them
            streams.tell("epmoe: interrupted")
    except Terminated:
        code = TERMINATED
        streams.tell("epmoe: ended by SIGTERM")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            streams.tell(end.code)
    except Exception as error:
        if not (isinstance(error, BrokenPipeError) and stdout_closed()):
            code = 1
            streams.tell(traceback.format_exc().removesuffix("\n"))
    leave(code)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _tell_once(error: UserError) -> None:
    """Print a mistake that was found before the ranks met: on rank 0, and elsewhere only if rank 0 does not make it.

    torchrun's agent terminates rank 0 as soon as another rank ends, perhaps before rank 0 got as far. So the others
    stay until rank 0 has left a note in the agent's store.
    """
    rank, agent = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == "0" or isinstance(error, NoRankZero):
        streams.tell(f"epmoe: error: {error}")
    if not agent or isinstance(error, NoRankZero):
        return
    with suppress(UserError):
        store, _ = open_store(Launch.read(), TOLD_S)
        if rank == "0":
            store.set("told", "")
            return
        try:
            store.wait(["told"], timedelta(seconds=TOLD_S))
        except dist.DistError:
            streams.tell(f"epmoe: error: rank {rank}: {error}")
