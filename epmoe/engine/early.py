"""Early: answers of a batch on their way to rank 0 as they are made, long before all replicas have ended.

    another replica's first rank   tell ─▶ a queue ─▶ a thread ══ a socket ══ a thread ─▶ rank 0: come, wait

Rank 0 writes them: what a run of hours has answered is there when it is killed.
"""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import msgspec

from epmoe.engine.request import Result
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.star import star

_LENGTH = struct.Struct("<I")


@dataclass
class Answered:
    """What listeners hear of one request."""

    index: int
    told: list[int]  # its tokens, one call each
    result: Result


_answered = msgspec.msgpack.Decoder(Answered)


class Early:
    """Each rank makes one; a collective of all ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.leads = ranks.is_main
        sockets = [*star(ranks, ranks.start_timeout_s).values()]
        self.queue: SimpleQueue[Answered | None] = SimpleQueue()  # None: a replica has no more
        self.open = len(sockets) if self.leads else 0  # replicas that rank 0 still may hear of
        work = self._read if self.leads else self._write
        self.threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in sockets]
        for each in self.threads:
            each.start()

    def tell(self, answered: Answered) -> None:
        """Let rank 0 have it; returns at once. It means nothing but on another replica's first rank."""
        if self.threads and not self.leads:
            self.queue.put(answered)

    def come(self, *, all_of_them: bool) -> Iterator[Answered]:
        """On rank 0 those that are here, or all that still come: a rank that lives answers, or ends the run."""
        while self.open:
            try:
                found = self.queue.get(block=all_of_them)
            except Empty:
                return
            if found is None:
                self.open -= 1
            else:
                yield found

    def close(self) -> None:
        """No more are told; returns when rank 0 has been sent all."""
        self.queue.put(None)
        for each in self.threads:
            each.join()

    def _write(self, own: socket.socket) -> None:
        with own, suppress(OSError):  # rank 0 is gone, which the watch tells
            while (answered := self.queue.get()) is not None:
                data = msgspec.msgpack.encode(answered)
                own.sendall(_LENGTH.pack(len(data)) + data)

    def _read(self, own: socket.socket) -> None:
        with own, own.makefile("rb") as stream, suppress(OSError, msgspec.MsgspecError):
            while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                (length,) = _LENGTH.unpack(head)
                self.queue.put(_answered.decode(stream.read(length)))
        self.queue.put(None)
