"""Local ranks: the processes that `LLM(ranks=N)` starts beside its own, which is rank 0, and what it tells them to do.

    rank 0 ──┬── a line of JSON a call, on standard input ──▶ python -m epmoe.follow     rank 1
             └──────────────────────────────────────────────▶ python -m epmoe.follow     rank 2

They do not run the caller's script again. All join as ranks that torchrun has started, with the same checks and the
same watch: when one dies, the others name it and end; when rank 0 dies, they end.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

import torch.distributed as dist

from epmoe.errors import UserError
from epmoe.ranks.admission import STARTED
from epmoe.ranks.ending import leave
from epmoe.ranks.launch import Launch
from epmoe.streams import tell_raw

Order = Mapping[str, Any]  # "call", and what belongs to it

PARTING_S = 10.0  # how long a rank may take to end after all have parted
UNEXPLAINED_S = 15.0  # after a rank's end: by then the ranks' watch has said why, if it can


class Followers:
    """The ranks from 1 on, as rank 0 sees them; `variables` are rank 0's own of the launch."""

    def __init__(self, ranks: int, first: Order) -> None:
        """Start them. The first thing they read is `first`."""
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # so no port is guessed
        self.launch = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            STARTED: str(time.monotonic()),
        }
        self.streams = 0  # so many were begun
        self.parting = threading.Event()
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)  # theirs is the caller's: no other epmoe
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "epmoe.follow"],
                env={**os.environ, "PYTHONPATH": path, **self.variables(rank)},
                stdin=subprocess.PIPE,
                stdout=2,  # standard output is the caller's alone
            )
            for rank in range(1, ranks)
        ]
        for rank, process in enumerate(self.processes, 1):
            threading.Thread(target=self._see_the_end, args=(rank, process), daemon=True).start()
        self.order(**first)

    def variables(self, rank: int) -> dict[str, str]:
        """What a launcher would put into this rank's environment."""
        return {**self.launch, "RANK": str(rank), "LOCAL_RANK": str(rank)}

    def order(self, **order: Any) -> None:
        """Let all do that. One that has gone is for the watch to tell."""
        line = json.dumps(order).encode() + b"\n"
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError, ValueError):
                process.stdin.write(line)
                process.stdin.flush()

    def stream(self, pieces: Generator[str]) -> Iterator[str]:
        """The pieces of a stream that all have begun: a follower makes each when it is asked for here."""
        number, self.streams = self.streams, self.streams + 1
        return self._led(number, pieces)

    def _led(self, number: int, pieces: Generator[str]) -> Iterator[str]:
        try:
            while True:
                with ordered(self, "next", stream=number):
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece
        finally:
            pieces.close()
            self.order(call="drop", stream=number)

    def part(self) -> None:
        """Wait for their end, PARTING_S at most; what is still there is killed."""
        self.parting.set()
        deadline = time.monotonic() + PARTING_S
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _see_the_end(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        """One that ends before it has met the others, by a fault that nobody foresaw."""
        code = process.wait()
        if not self.parting.wait(UNEXPLAINED_S):
            tell_raw(f"epmoe: rank {rank} ended with exit code {code}; rank 0 ends too\n")
            leave(1)


@contextmanager
def followers(ranks: int, first: Order) -> Iterator[Followers]:
    """Ranks 1 to `ranks` - 1 on this machine; within the block of `as_rank_0` this process may join them as rank 0.

    Raises:
        UserError: `ranks` is no number of ranks, this process is a launcher's rank, or it is not the main thread.
    """
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise UserError(f"ranks={ranks!r} is not a whole number, at least 1")
    if (size := Launch.read().size) > 1:
        raise UserError(f"ranks={ranks}, but this process is one of {size} ranks already: leave ranks out")
    if threading.current_thread() is not threading.main_thread():
        raise UserError(f"ranks={ranks} can be started by the main thread alone, to which signals come")
    started = Followers(ranks, first)
    try:
        yield started
    finally:
        started.part()


@contextmanager
def as_rank_0(started: Followers) -> Iterator[None]:
    """Within the block, this process' environment is that of rank 0."""
    before = {name: os.environ.get(name) for name in started.variables(0)}
    os.environ.update(started.variables(0))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def ordered(led: Followers | None, call: str, **more: Any) -> Iterator[None]:
    """In the block the followers make the same call, and may fail in it as it does; None: there are none."""
    if led is None:
        yield
        return
    led.order(call=call, **more)
    try:
        yield
    except UserError as error:
        led.order(call="failed", text=str(error))
        raise


class Orders:
    """A follower's orders, as they come."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.rest = stream, b""

    def next(self, within_s: float | None = None) -> Order | None:
        """The next one; None: it did not come within that time. Without a bound it ends with rank 0.

        Raises:
            UserError: rank 0 has gone without a word. Its watch tells that, too.
        """
        until = None if within_s is None else time.monotonic() + within_s
        while b"\n" not in self.rest:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self.stream], [], [], left)[0]:
                return None
            data = os.read(self.stream.fileno(), 1 << 20)
            if not data:
                raise UserError("rank 0 has gone without a word")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        order: Order = json.loads(line)
        return order
