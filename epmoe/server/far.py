"""Far and Near: the two ends of rank 0's connection to another replica's first rank.

rank 0    Replicas ─▶ Far ── Submit · Abort · Halt ─▶ Near ─▶ Service      the other replica
          listeners ◀─ Far ◀─ Step · Scores · Refused · Load ── Near (asker.py)
"""

import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from queue import SimpleQueue

from epmoe.engine.call import Call, Serving, Stopped
from epmoe.engine.figures import Figures
from epmoe.errors import UserError
from epmoe.server.asker import Asker, Patience
from epmoe.server.calls import Calls
from epmoe.server.frames import (
    PIECE,
    Abort,
    Bye,
    Damaged,
    Frame,
    Frames,
    FromReplica,
    Halt,
    Load,
    Submit,
    ToReplica,
    Up,
    packed,
)  # fmt: skip

END_S = 3.0  # for what is still to be sent, at the end
LOOK_S = 0.5  # how often a wait for the service looks whether it still may come
FIGURES_S = 0.25  # between two sets of figures: rank 0 passes them on once a second


class Far(Calls):
    """A replica's service as rank 0 asks it; on any thread.

    Args:
        gone: called once, on another thread, when the connection has ended without `close`.
    """

    def __init__(self, own: socket.socket, gone: Callable[[], object]) -> None:
        super().__init__()
        self.socket, self.gone = own, gone
        self.lock = threading.RLock()  # listeners are called with it
        self.outbox: SimpleQueue[bytes] = SimpleQueue()
        self.up = threading.Event()  # its loop takes turns
        self.figures: Figures | None = None
        self.closed = False
        self.writer = threading.Thread(target=self._write, name="epmoe-far", daemon=True)
        self.writer.start()
        threading.Thread(target=self._read, name="epmoe-far", daemon=True).start()

    def submit(self, calls: Sequence[Call]) -> None:
        """Let these wait for their turn there; a refusal comes to their listeners."""
        with self.lock:
            together = [[*group] for _, group in groupby(calls, key=lambda each: each.request.ids)]
            self._say(self.asked([(group[0].request, group) for group in together]))

    def abort(self, calls: Sequence[Call]) -> None:
        with self.lock:
            if numbers := self.left(calls):
                self._say(Abort(numbers))
        for call in calls:
            call.ended = True

    def halt(self, error: BaseException | None) -> None:
        """The service there is to end; with `error`, which all calls hear of."""
        if error is not None:
            self.fail_all(error if isinstance(error, Exception) else Stopped(str(error)))
        self._say(Halt("" if error is None else str(error) or type(error).__name__))

    def fail_all(self, error: Exception) -> None:
        """None of the calls gets an answer."""
        with self.lock:
            for call in [*self.calls.values()]:
                self.fail(call, error)

    def close(self) -> None:
        """Part: the other end's end is no surprise from now on, nor is this one's there."""
        self.closed = True
        self._say(Bye())

    def end(self) -> None:
        """`close`; what was said has been sent then: a halt may be the last of it."""
        self.close()
        self.outbox.put(b"")
        self.writer.join(END_S)

    def drop(self) -> None:
        """It is lost: nothing more is said or heard, and its calls are nobody's."""
        with self.lock:
            self.closed = True
            self.calls.clear()
            self.scores.clear()
        self.up.set()  # nobody waits for it any more
        self._end()

    def _end(self) -> None:
        self.outbox.put(b"")
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def _say(self, frame: Frame) -> None:
        self.outbox.put(packed(frame))

    def _write(self) -> None:
        with suppress(OSError):  # its end is for the reader to see
            while data := self.outbox.get():
                self.socket.sendall(data)

    def _read(self) -> None:
        frames = Frames(FromReplica)
        try:
            while piece := self.socket.recv(PIECE):
                for frame in frames.feed(piece):
                    with self.lock:
                        self._hear(frame)
        except (OSError, Damaged):
            pass
        except Exception:  # its calls must not wait for ever
            traceback.print_exc()
        self._end()
        if not self.closed:
            self.gone()

    def _hear(self, frame: Frame) -> None:
        match frame:
            case Up():
                self.up.set()
            case Load(replicas):
                self.figures = replicas[0]
            case Bye():
                self.closed = True
                self._end()
            case _:
                self.heard(frame)


class Near:
    """On a replica's first rank: rank 0 asks, and a service answers.

    Args:
        gone: as for Far.
    """

    def __init__(self, own: socket.socket, gone: Callable[[], object]) -> None:
        self.asker, self.gone = Asker(own, Patience(figures_s=FIGURES_S)), gone
        self.asker.name = "rank 0"  # type: ignore[misc]
        self.service: Serving | None = None
        self.closed = False
        threading.Thread(target=self._read, name="epmoe-near", daemon=True).start()
        threading.Thread(target=self.asker.write, args=(self._figures,), name="epmoe-tell", daemon=True).start()

    def attach(self, service: Serving) -> None:
        """Let this service answer; rank 0 hears when its loop takes turns."""
        self.service = service
        threading.Thread(target=self._announce, args=(service,), name="epmoe-up", daemon=True).start()

    def close(self) -> None:
        """As `Far.close`."""
        self.closed = True
        self.asker.say(Bye())

    def _announce(self, service: Serving) -> None:
        while not service.is_running(LOOK_S):
            if service.failure is not None or self.closed:
                return
        self.asker.say(Up())

    def _figures(self) -> Sequence[Figures]:
        return () if self.service is None else self.service.figures()

    def _read(self) -> None:
        frames = Frames(ToReplica)
        try:
            while piece := self.asker.socket.recv(PIECE):
                for frame in frames.feed(piece):
                    self._obey(frame)
        except (OSError, Damaged):
            pass
        except Exception:  # who is deaf must not be waited for
            traceback.print_exc()
        self.asker.end()
        if not self.closed:
            self.gone()

    def _obey(self, frame: Frame) -> None:
        match frame:
            case Submit():
                self.asker.submit(frame, self.service)
            case Abort(numbers):
                self.asker.abort(numbers, self.service)
            case Bye():
                self.closed = True
                self.asker.end()
            case Halt(text) if self.service is not None:
                try:
                    self.service.stop(Stopped(text) if text else None)
                except UserError as error:  # of calls that rank 0 knows nothing of
                    self.service.stop(error)
