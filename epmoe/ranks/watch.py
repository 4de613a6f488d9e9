"""Watch: every rank learns within seconds that another one died, stopped or failed, says so once, and ends.

The collectives cannot do this. An NCCL kernel waits for a dead peer until a timeout, a CUDA graph never raises, and the
error that gloo does raise names a socket. So each rank has a thread with connections of its own:

    rank 1 ──┐               a line of JSON each second or so; silence means that the process is stopped
    rank 2 ──┼── rank 0      an end without "bye" means that it was killed: the kernel closes a dead process's sockets
    rank 3 ──┘               a "fault" is a rank's own error, which rank 0 prints

A failure seldom comes alone (the peers of a killed rank see errors, torchrun's agent terminates them). Rank 0 therefore
collects faults for a while, takes the likeliest cause (judge.py) and sends it as the "verdict". When rank 0 itself is
gone, each rank sees that on its own connection and needs no verdict.

The thread must run while the main thread waits in a collective, which releases Python's lock. Signals reach it through
`signal.set_wakeup_fd` for the same reason: a Python handler would have to wait for the main thread. In a command they
come by way of its guard (guard.py), which ends a process whose thread cannot run.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import torch.distributed as dist

from epmoe.ranks import guard
from epmoe.ranks.admission import Admission, Hello
from epmoe.ranks.drain import Drain
from epmoe.ranks.ending import leave
from epmoe.ranks.fault import SETTLE_S, Fault
from epmoe.ranks.judge import Judge
from epmoe.ranks.launch import Launch, Patience
from epmoe.ranks.meeting import Meeting, Meetings
from epmoe.ranks.peer import Peer, reach_rank_0, wait_for_ends
from epmoe.streams import tell_raw

EARLY_S = 10.0  # how long a mistake from before the ranks met waits for those that still import: they hear of it then
SILENT_SHARE = 0.75  # of timeout_s: a stopped rank must be named before the collectives' own timeout fires
SIGNALS = {signal.SIGINT: "interrupt", signal.SIGTERM: "term"}  # → the kind of fault


class Watch:
    """The constructor waits for rank 0, `gather` until every rank has come, `meet` and `finish` until each calls them.

    A thread ends the process as soon as any rank has failed. Main thread only, because of the signals.
    """

    def __init__(self, launch: Launch, store: dist.Store, host: str, timeout_s: float, patience: Patience) -> None:
        """`host` is the name or address by which other ranks reach this one; used on rank 0.

        `patience` is for ranks that are still to come, `timeout_s` for those that are there.

        Raises:
            NoRankZero: rank 0 has not come, or not to where this rank can reach it, or it is another run's.
        """
        self.rank, self.size, self.port, self.timeout_s = launch.rank, launch.size, launch.port, timeout_s
        self.host, self.patience = host, patience
        self.silent_s = SILENT_SHARE * timeout_s
        self.beat_s = min(1.0, self.silent_s / 4)
        self.peers: dict[int, Peer] = {}
        self.meetings = Meetings(self.size)  # at `meet` or `finish`, on rank 0
        self.judge = Judge(self.rank)
        self.lose: Callable[[frozenset[int]], object] = lambda unit: None  # called on rank 0 when these are lost
        self.details = ""  # the traceback of this rank's own fault
        self.inbox: deque[Fault | Meeting | tuple[Any, ...] | None] = deque()  # from other threads
        self.all_here, self.all_met, self.all_finished = threading.Event(), threading.Event(), threading.Event()
        self.finishing = self.closing = False
        self.drain: Drain | None = None  # whoever is asked to end before it must
        self.heard: Callable[..., object] = lambda *said: None  # called with what others report to this rank
        self.selector = selectors.DefaultSelector()
        self.admission = Admission(launch.hello(), self.port, shared=not launch.agent)
        self._join(store, host)
        self._catch_signals()
        self.thread = threading.Thread(target=self._run, name="epmoe-watch", daemon=True)
        self.thread.start()

    # The main thread's side

    def gather(self) -> None:
        """Wait until every rank has come; one that does not ends the process."""
        self.all_here.wait()

    def fail(self, kind: str, text: str, code: int, details: str = "") -> NoReturn:
        """End every rank because of this rank's error; `details` (a traceback) is printed here if it is the cause."""
        self.details = details
        self._tell(Fault(kind, self.rank, text[:2000], code))
        self.thread.join(30)  # the thread ends the process
        os._exit(code)

    def meet(self, meeting: Meeting) -> None:
        """Wait until every rank calls this. A rank that comes later than `within_s` after the first one is a fault.

        So is one that comes with something else than rank 0 (see `difference`).
        """
        self.all_met.clear()
        self._tell(meeting)
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
            if 0 in self.peers:  # it may have gone meanwhile
                self.peers[0].connection.close()
        self.thread.join(5)
        self.handlers.close()
        if guard.heard() is None:
            signal.set_wakeup_fd(-1)

    def spare(self, units: Sequence[frozenset[int]], lose: Callable[[frozenset[int]], object]) -> None:
        """From now on the run goes on where one of these is lost, and `lose` is called, on the watch's thread.

        On rank 0, from any thread. None of them has rank 0, and no collective goes on over what is lost and what not.
        """
        self.lose, self.judge.units = lose, units

    def accuse(self, rank: int, text: str) -> None:
        """That rank is of no use any more, as far as this one sees. Any thread."""
        self._tell(Fault("lost", rank, text, 1))

    def report(self, rank: int, *said: Any) -> None:
        """Let that rank hear this, on its watch's thread: what JSON can hold. On another rank than 0, any thread."""
        self._tell((rank, *said))

    def _tell(self, message: Fault | Meeting | tuple[Any, ...] | None) -> None:
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
            return
        peer, more = reach_rank_0(store, self.admission.own, self.port, self.patience)
        self.peers[0] = peer
        self.selector.register(peer.connection, selectors.EVENT_READ, partial(self._hear, peer))
        self._answer(peer, more)

    def _catch_signals(self) -> None:
        """Let the thread learn of SIGINT and SIGTERM while the main thread is in a collective; it answers for both."""
        self.woken, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        source = guard.heard()
        if source is None:
            signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        for each in filter(None, (source, self.woken)):
            self.selector.register(each, selectors.EVENT_READ, partial(self._wake, each))
        self.handlers = guard.Handlers(self._signal, guarded=True)

    def _signal(self, number: int) -> None:
        with suppress(BlockingIOError):
            self.waker.send(bytes([number]))

    # The thread's side

    def _run(self) -> None:
        try:
            last = beat = time.monotonic()
            while not self._may_go():
                for key, _ in self.selector.select(self._nap()):
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

    def _nap(self) -> float:
        """Seconds until something is to be done that nobody sends for."""
        naps = [self.beat_s, SETTLE_S / 2]
        if self.meetings.complete:  # one that is to settle
            naps.append(max(0.01, self.admission.settled_at - time.monotonic()))
        return min(naps)

    def _may_go(self) -> bool:
        """After `close`: at once, but rank 0 when the connections of all others have ended (or `close` gave up)."""
        return self.closing and (self.rank != 0 or not self.peers)

    def _wake(self, source: socket.socket) -> None:
        try:
            said = source.recv(4096)
        except ConnectionError:
            said = b""
        if not said:
            self.selector.unregister(source)  # the guard was killed
            self.handlers.take_over()
        for byte in said:
            if byte in SIGNALS and not self._drains(byte):
                self._end_by(self.rank, byte)
        while self.inbox:
            message = self.inbox.popleft()
            if isinstance(message, Fault):
                self._fault(message)
            elif message is None:
                self.closing = True
            elif isinstance(message, tuple):
                self._all("report", *message)
            else:
                self.finishing = message.last
                if self.rank == 0:
                    self._arrive(0, message)
                else:
                    self._all("arrive", asdict(message))

    def _end_by(self, rank: int, byte: int) -> None:
        """A signal has come to a rank, and ends the run."""
        number, code = signal.Signals(byte), 128 + byte if self.drain is None else 0
        self._fault(Fault(SIGNALS[number], rank, guard.SIGNALS[number], code))

    def _drains(self, byte: int) -> bool:
        """Whether a signal only asks this run to come to an end; rank 0 does it, whichever rank was asked."""
        if self.drain is None or not self.drain.asked():
            return False
        if self.rank != 0:
            self._all("drain", byte)
        return True

    def _drain(self, rank: int, byte: int) -> None:
        """Another rank was asked; it may be ready a moment before this one.

        One that the others can do without goes alone, unless rank 0 is asked, too, before the faults settle.
        """
        if self.judge.spares(rank):
            self._fault(Fault("term", rank, guard.SIGNALS[signal.Signals(byte)], 0))
        elif self.drain is None or self.drain.begin is None:
            self._end_by(rank, byte)
        else:
            self.drain.asked()

    def _accept(self) -> None:
        peer = Peer(self.listener.accept()[0], -1)  # a stranger until its hello
        self.selector.register(peer.connection, selectors.EVENT_READ, partial(self._hear, peer))

    def _hear(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None or (peer.rank < 0 and not self._welcome(peer, messages)):
            self.selector.unregister(peer.connection)
            peer.connection.close()
            if self.peers.pop(peer.rank, None) and not self._finished():
                self._fault(Fault("lost", peer.rank, "ended without a word (killed?)", 1))
            return
        if peer.rank not in self.judge.lost:
            self._answer(peer, messages)

    def _pass_on(self, rank: int, *said: Any) -> None:
        """A report, to whom it belongs; all of them come by rank 0."""
        if rank == self.rank:
            self.heard(*said)
        elif rank in self.peers:
            self.peers[rank].send("report", rank, *said)

    def _finished(self) -> bool:
        """Whether the others may end: after all have come to `finish`, this rank too."""
        return self.finishing and self.all_finished.is_set()

    def _answer(self, peer: Peer, messages: list[list[Any]]) -> None:
        answers: dict[str, Callable[..., object]] = {
            "hello": lambda token, hello: None,
            "beat": lambda: None,
            "report": self._pass_on,
            "drain": lambda byte: self._drain(peer.rank, byte),
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
            case [["hello", self.token, dict(said)], *_]:
                hello = Hello(**said)
            case _:
                return False
        judgement = self.admission.judge(hello, time.monotonic())
        if judgement.mixed and hello.rank not in self.judge.lost and not self._finished():
            self._fault(Fault("port", 0, judgement.mixed, 2))
        if judgement.refused:
            peer.send("refused", judgement.refused)
            return False
        peer.rank = hello.rank
        self.peers[hello.rank] = peer
        peer.send("known")
        if self.admission.met_at is not None:
            self._all("welcome")
            self.all_here.set()
        return True

    def _arrive(self, rank: int, meeting: Meeting) -> None:
        self.meetings.arrive(rank, meeting, time.monotonic())
        self._decide(time.monotonic())

    def _decide(self, now: float) -> None:
        """Let all go on from a meeting to which all have come with the same."""
        if self.rank != 0 or self.judge.faults:
            return
        done, fault = self.meetings.decide(settled=now >= self.admission.settled_at)
        for ranks, meeting in done:
            for peer in [self.peers[rank] for rank in ranks & set(self.peers)]:
                peer.send("bye" if meeting.last else "met")
            if 0 in ranks:
                (self.all_finished if meeting.last else self.all_met).set()
        if fault is not None:
            self._fault(fault)

    def _all(self, *message: Any) -> None:
        for peer in self.peers.values():
            peer.send(*message)

    def _fault(self, fault: Fault) -> None:
        """Take note of a fault; a rank other than 0 passes on its own and waits for the verdict."""
        self.judge.add(fault, time.monotonic())
        if self.rank != 0 and fault.rank == self.rank:
            self._all("fault", asdict(fault))

    def _look(self, now: float) -> None:
        """Find who is absent, silent or late; end when the faults have settled."""
        self._decide(now)
        if not self.judge.faults:
            for rank, text in self._overdue(now):
                self._fault(Fault("lost", rank, text, 1))
        if self.judge.settled(now, 0.0 if self.all_here.is_set() else EARLY_S):
            self._judge()

    def _judge(self) -> None:
        """End, or let ranks go without which the others can go on."""
        end, lost = self.judge.verdict(draining=self.drain is not None and self.drain.first_s is not None)
        if end is not None:
            self._end(end)
        for unit, fault in lost:
            tell_raw(fault.loss(unit))
            for rank in unit & set(self.peers):
                self.peers.pop(rank).send("verdict", asdict(fault))
            self.meetings.lose(unit)
            self.lose(unit)

    def _overdue(self, now: float) -> list[tuple[int, str]]:
        if self.rank == 0 and not self.all_here.is_set():
            absent = sorted(set(range(1, self.size)) - set(self.peers))
            if now > self.patience.until:
                where = f"did not come to MASTER_PORT {self.port} within {self.patience} (runtime.timeout_s)"
                return [(rank, where) for rank in absent]
            return []
        if self._finished():
            return []
        silent = "has been silent for {:.0f} s (stopped, or its machine is gone?)"
        overdue = [
            (peer.rank, silent.format(now - peer.heard))
            for peer in self.peers.values()
            if now - peer.heard > self.silent_s
        ]
        return overdue + self.meetings.late(now)

    def _end(self, fault: Fault) -> NoReturn:
        """Say why, tell the others, leave. The main thread may be anywhere, so nothing of it is unwound."""
        guard.told()
        text = self.details if fault.kind == "error" and fault.rank == self.rank else fault.line(self.rank)
        tell_raw(text)
        if self.rank == 0:
            self._all("verdict", asdict(fault))
            wait_for_ends(self.peers, 1)  # a connection closed too early could take the verdict with it
        leave(fault.code)
