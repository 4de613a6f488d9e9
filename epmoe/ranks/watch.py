"""Watch: every rank learns within seconds that another one died, stopped or failed, says so once, and ends.

The collectives cannot do this. An NCCL kernel waits for a dead peer until a timeout, a CUDA graph never raises, and the
error that gloo does raise names a socket. So each rank has a thread with connections of its own:

    rank 1 ──┐               a line of JSON each second or so; silence means that the process is stopped
    rank 2 ──┼── rank 0      an end without "bye" means that it was killed: the kernel closes a dead process's sockets
    rank 3 ──┘               a "fault" is a rank's own error, which rank 0 prints

A failure seldom comes alone (the peers of a killed rank see errors, torchrun's agent terminates them). Rank 0 therefore
collects faults for `SETTLE_S`, takes the likeliest cause and sends it to all as the "verdict". When rank 0 itself is
gone, each rank sees that on its own connection and needs no verdict.

The thread must run while the main thread waits in a collective, which releases Python's lock. Signals reach it through
`signal.set_wakeup_fd` for the same reason: a Python handler would have to wait for the main thread.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NoReturn

import torch.distributed as dist

from epmoe.errors import UserError
from epmoe.ranks.ending import last_words
from epmoe.streams import tell_raw

SETTLE_S = 0.5  # a peer's EOF, its neighbours' errors and the agent's SIGTERM (within 0.1 s) all fall into this window
SILENT_SHARE = 0.75  # of timeout_s: a stopped rank must be named before the collectives' own timeout fires
KINDS = ("interrupt", "closed", "lost", "mistake", "error", "term")  # the likeliest cause first
SIGNALS = {signal.SIGINT: ("interrupt", "interrupted"), signal.SIGTERM: ("term", "ended by SIGTERM")}


@dataclass(frozen=True)
class Fault:
    """Why the run ends: what happened to `rank`, and every rank's exit code."""

    kind: str  # one of KINDS
    rank: int
    text: str
    code: int

    def line(self, reader: int) -> str:
        """What rank `reader` prints: a lost rank is named by everyone, all else is said once, by rank 0."""
        if self.kind == "lost":
            return f"epmoe: rank {self.rank} {self.text}; rank {reader} ends too\n"
        if reader != 0 or self.kind == "closed":
            return ""
        error = "error: " if self.kind == "mistake" else ""
        whose = f"rank {self.rank}: " if self.rank != 0 and self.kind != "interrupt" else ""
        return f"epmoe: {error}{whose}{self.text}\n"


@dataclass(frozen=True)
class Meeting:
    """A point that every rank passes; rank 0 counts who has arrived, and compares what they came for."""

    within_s: float = 0.0  # of the first arrival
    remedy: str = ""
    last: bool = False
    purpose: str = ""  # the same on every rank

    def missed(self) -> str:
        what = "did not finish" if self.last else "was not ready"
        return f"{what} within {self.within_s:g} s of the others" + (f" ({self.remedy})" if self.remedy else "")


class NoRankZero(UserError):
    """Rank 0 cannot be reached, so that whoever finds it says it."""


class Peer:
    """One end of a connection. Only the watch's thread uses it."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.rank = connection, rank
        self.heard, self.rest = time.monotonic(), b""

    def send(self, *message: Any) -> None:
        with suppress(OSError):  # a dead peer is found by reading
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """The messages that have arrived, or None at the end of the connection."""
        try:
            data = self.connection.recv(65536)
            *lines, self.rest = (self.rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError):  # reset, as by a killed peer with unread data; or a stranger's bytes
            return None
        self.heard = time.monotonic()
        return messages if data else None


class Watch:
    """The constructor waits until every rank has come, `meet` and `finish` until every rank calls them.

    In between a thread ends the process as soon as any rank has failed. Main thread only, because of the signals.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, host: str, timeout_s: float) -> None:
        """`host` is the name or address by which other ranks reach this one; used on rank 0.

        A rank that does not come within `timeout_s` ends the process.

        Raises:
            NoRankZero: rank 0 has not come, or not to where this rank can reach it.
        """
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.silent_s = SILENT_SHARE * timeout_s
        self.beat_s = min(1.0, self.silent_s / 4)
        self.peers: dict[int, Peer] = {}
        self.arrived: dict[int, str] = {}  # at `meet` or `finish`, on rank 0: what each rank came for
        self.meeting = Meeting()
        self.faults: list[Fault] = []
        self.details = ""  # the traceback of this rank's own fault
        self.inbox: deque[Fault | Meeting | None] = deque()  # from the main thread
        self.all_here, self.all_met, self.all_finished = threading.Event(), threading.Event(), threading.Event()
        self.closing = False
        self.begin = self.first_fault = self.first_arrival = time.monotonic()
        self.selector = selectors.DefaultSelector()
        self._join(store, host)
        self._catch_signals()
        self.thread = threading.Thread(target=self._run, name="epmoe-watch", daemon=True)
        self.thread.start()
        self.all_here.wait()

    # The main thread's side

    def fail(self, kind: str, text: str, code: int, details: str = "") -> NoReturn:
        """End every rank because of this rank's error; `details` (a traceback) is printed here if it is the cause."""
        self.details = details
        self._tell(Fault(kind, self.rank, text[:2000], code))
        self.thread.join(30)  # the thread ends the process
        os._exit(code)

    def meet(self, within_s: float, remedy: str, purpose: str = "") -> None:
        """Wait until every rank calls this. A rank that comes later than `within_s` after the first one is a fault.

        So is one that comes with another `purpose` than rank 0.
        """
        self.all_met.clear()
        self._tell(Meeting(within_s, remedy, purpose=purpose))
        self.all_met.wait()

    def finish(self) -> None:
        """The last meeting: after it a connection may end without a word."""
        self._tell(Meeting(self.timeout_s, last=True, purpose="end"))
        self.all_finished.wait()

    def close(self) -> None:
        """Leave, after `finish`. Rank 0 goes last, since it may host the store."""
        self._tell(None)
        if self.rank != 0:
            self.thread.join()
            self.peers[0].connection.close()
        self.thread.join(5)
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)

    def _tell(self, message: Fault | Meeting | None) -> None:
        self.inbox.append(message)
        self.waker.send(b"\0")

    # Set-up

    def _join(self, store: dist.Store, host: str) -> None:
        if self.rank == 0:
            self.token = secrets.token_hex(8)  # keeps strangers out of the port
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            self.listener = socket.create_server(
                ("", 0), family=family, backlog=self.size, dualstack_ipv6=family == socket.AF_INET6
            )
            self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
            store.set("watch", json.dumps([host, self.listener.getsockname()[1], self.token]))
        else:
            try:
                host, port, token = json.loads(store.get("watch"))
                connection = socket.create_connection((host, port), self.timeout_s)
            except dist.DistError as error:
                raise NoRankZero(f"rank 0 did not come within {self.timeout_s:g} s of rank {self.rank}") from error
            except OSError as error:
                raise NoRankZero(f"rank {self.rank} cannot reach rank 0 at {host}:{port} ({error})") from error
            peer = self.peers[0] = Peer(connection, 0)
            self.selector.register(connection, selectors.EVENT_READ, partial(self._hear, peer))
            peer.send("hello", self.rank, token)

    def _catch_signals(self) -> None:
        """Let the thread learn of SIGINT and SIGTERM while the main thread is in a collective; it answers for both."""
        self.woken, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        self.selector.register(self.woken, selectors.EVENT_READ, self._wake)
        self.old_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)

    # The thread's side

    def _run(self) -> None:
        try:
            last = beat = time.monotonic()
            while not self._may_go():
                for key, _ in self.selector.select(min(self.beat_s, SETTLE_S / 2)):
                    key.data()
                now = time.monotonic()
                if now - last > self.silent_s / 2:  # this rank was stopped itself: what the others sent is still unread
                    for peer in self.peers.values():
                        peer.heard = now
                last = now
                if now >= beat:
                    beat = now + self.beat_s
                    for peer in self.peers.values():
                        peer.send("beat")
                self._look(now)
        except Exception:  # a rank that nobody watches would hang its peers
            traceback.print_exc()
            os._exit(1)

    def _may_go(self) -> bool:
        """After `close`: at once, but rank 0 when the connections of all others have ended (or `close` gave up)."""
        return self.closing and (self.rank != 0 or not self.peers)

    def _wake(self) -> None:
        for byte in self.woken.recv(4096):
            if byte in SIGNALS:
                kind, text = SIGNALS[signal.Signals(byte)]
                self._fault(Fault(kind, self.rank, text, 128 + byte))
        while self.inbox:
            message = self.inbox.popleft()
            if isinstance(message, Fault):
                self._fault(message)
            elif message is None:
                self.closing = True
            elif self.rank == 0:
                self._arrive(0, message)
            else:
                self._all("arrive", asdict(message))

    def _accept(self) -> None:
        peer = Peer(self.listener.accept()[0], -1)  # a stranger until its hello
        self.selector.register(peer.connection, selectors.EVENT_READ, partial(self._hear, peer))

    def _hear(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None or (peer.rank < 0 and not self._welcome(peer, messages)):
            self.selector.unregister(peer.connection)
            peer.connection.close()
            if self.peers.pop(peer.rank, None) and not self.all_finished.is_set():
                self._fault(Fault("lost", peer.rank, "ended without a word (killed?)", 1))
            return
        answers: dict[str, Callable[..., None]] = {
            "hello": lambda rank, token: None,
            "beat": lambda: None,
            "fault": lambda fault: self._fault(Fault(**fault)),
            "verdict": lambda fault: self._end(Fault(**fault)),
            "arrive": lambda meeting: self._arrive(peer.rank, Meeting(**meeting)),
            "welcome": self.all_here.set,
            "met": self.all_met.set,
            "bye": self.all_finished.set,
        }
        for what, *content in messages:
            answers[what](*content)

    def _welcome(self, peer: Peer, messages: list[list[Any]]) -> bool:
        """Whether a new connection may stay: its first word is a rank's, or still to come."""
        match messages:
            case []:
                return True
            case [["hello", int(rank), self.token], *_]:
                peer.rank = rank
                self.peers[rank] = peer
            case _:
                return False
        if len(self.peers) == self.size - 1:
            self._all("welcome")
            self.all_here.set()
        return True

    def _arrive(self, rank: int, meeting: Meeting) -> None:
        if not self.arrived:
            self.first_arrival, self.meeting = time.monotonic(), meeting
        self.arrived[rank] = meeting.purpose
        if len(self.arrived) == self.size:
            purposes = dict(self.arrived)
            self.arrived.clear()
            for other in sorted(purposes):
                if purposes[other] != purposes[0]:
                    theirs, ours = purposes[other] or "start", purposes[0] or "start"
                    text = f"it comes to {theirs}, rank 0 to {ours}: every rank's program must make the same calls"
                    self._fault(Fault("mistake", other, text, 2))
                    return
            self._all("bye" if meeting.last else "met")
            (self.all_finished if meeting.last else self.all_met).set()

    def _all(self, *message: Any) -> None:
        for peer in self.peers.values():
            peer.send(*message)

    def _fault(self, fault: Fault) -> None:
        """Take note of a fault; a rank other than 0 passes on its own and waits for the verdict."""
        if not self.faults:
            self.first_fault = time.monotonic()
        self.faults.append(fault)
        if self.rank != 0 and fault.rank == self.rank:
            self._all("fault", asdict(fault))

    def _look(self, now: float) -> None:
        """Find who is absent, silent or late; end when the faults have settled."""
        if not self.faults:
            for rank, text in self._overdue(now):
                self._fault(Fault("lost", rank, text, 1))
        if self.faults:
            judge = self.rank == 0 or self.faults[0].rank == 0  # the others wait longer, for rank 0's verdict
            if now - self.first_fault > (SETTLE_S if judge else 6 * SETTLE_S):
                self._end(min(self.faults, key=lambda fault: (KINDS.index(fault.kind), fault.rank)))

    def _overdue(self, now: float) -> list[tuple[int, str]]:
        if self.rank == 0 and not self.all_here.is_set():
            absent = sorted(set(range(1, self.size)) - set(self.peers))
            if now - self.begin > self.timeout_s:
                return [(rank, f"did not come within {self.timeout_s:g} s") for rank in absent]
            return []
        if self.all_finished.is_set():
            return []
        silent = "has been silent for {:.0f} s (stopped, or its machine is gone?)"
        overdue = [
            (peer.rank, silent.format(now - peer.heard))
            for peer in self.peers.values()
            if now - peer.heard > self.silent_s
        ]
        if self.arrived and now - self.first_arrival > self.meeting.within_s:
            late = sorted(set(range(self.size)) - set(self.arrived))
            overdue += [(rank, self.meeting.missed()) for rank in late]
        return overdue

    def _end(self, fault: Fault) -> NoReturn:
        """Say why, tell the others, leave. The main thread may be anywhere, so nothing of it is unwound."""
        text = self.details if fault.kind == "error" and fault.rank == self.rank else fault.line(self.rank)
        tell_raw(text)
        if self.rank == 0:
            self._all("verdict", asdict(fault))
            deadline = time.monotonic() + 1  # a connection closed too early could take the verdict with it
            while self.peers and time.monotonic() < deadline:
                for peer in list(self.peers.values()):
                    peer.connection.settimeout(0.02)
                    if peer.receive() is None:
                        del self.peers[peer.rank]
        leave(fault.code)


def leave(code: int) -> NoReturn:
    """End the process without unwinding: torch's own threads crash some interpreters at exit."""

    def flush() -> None:
        last_words()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()

    flusher = threading.Thread(target=flush, daemon=True)  # the main thread may hold a stream's lock for ever
    flusher.start()
    flusher.join(1)
    os._exit(code)
