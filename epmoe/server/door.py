"""Door: rank 0's end of the line to its HTTP process, and who starts that process, and starts it again.

    engine's thread, writer     asker.py
    reader                      frames ─▶ Service.submit, abort; at their end: abort what is left, start anew

The socket that listens is rank 0's, so that clients which come while there is no process wait for the next one.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from epmoe.engine.call import Serving, Stopped
from epmoe.engine.figures import Figures
from epmoe.errors import UserError
from epmoe.server.asker import Asker, Patience
from epmoe.server.frames import (
    PIECE,
    Abort,
    Broken,
    Bye,
    Damaged,
    Drain,
    Frames,
    FromHttp,
    Hello,
    Idle,
    Opened,
    Ready,
    Submit,
    Up,
)  # fmt: skip
from epmoe.streams import tell


@dataclass(frozen=True)
class Limits(Patience):
    """What an HTTP process may take."""

    start_s: float = 60.0  # until it answers
    restarts: int = 5  # within `within_s`
    within_s: float = 60.0
    end_s: float = 3.0  # to finish what is being sent, at the end


class Http(Asker):
    """One HTTP process, from its start to its end."""

    name = "the HTTP process"

    def __init__(self, hello: Hello, listener: socket.socket, limits: Limits) -> None:
        here, there = socket.socketpair()
        super().__init__(here, limits)
        command = [sys.executable, "-P", "-m", "epmoe.server", str(there.fileno()), str(listener.fileno())]
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)  # its modules are this process' own
        with there:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(there.fileno(), listener.fileno()),
                env={**os.environ, "PYTHONPATH": path},
            )
        self.say(hello)

    def end(self) -> None:
        with suppress(OSError):
            self.process.kill()
        super().end()


class Door:
    """Starts the HTTP process at once, so that it answers while the weights are read; `open` lets requests in.

    Raises:
        UserError: the HTTP process has found a mistake (in the tokenizer, say), or does not start.
    """

    def __init__(self, hello: Hello, listener: socket.socket, limits: Limits | None = None) -> None:
        self.hello, self.listener, self.limits = hello, listener, limits or Limits()
        self.service: Serving | None = None
        self.ready: Ready | None = None
        self.closing = self.draining = False
        self.error: BaseException | None = None  # why there is no HTTP process any more
        self.up, self.opened, self.idle = threading.Event(), threading.Event(), threading.Event()
        self.begun: deque[float] = deque()  # when processes have begun, of the last ones
        self.http = Http(self.hello, self.listener, self.limits)
        self.thread = threading.Thread(target=self._run, name="epmoe-door", daemon=True)
        self.thread.start()
        self._await(self.up)
        self.check()

    def check(self) -> None:
        """Raises what has ended the HTTP process for good."""
        if self.error is not None:
            self.close()
            raise self.error

    def open(self, service: Serving, ready: Ready) -> None:
        """Requests may come, and go to this service: from now on none is refused since it came too early."""
        self.service, self.ready = service, ready
        if self.draining:
            service.stop(Stopped("the server ends before it was ready"))
            return
        self.http.say(ready)
        self._await(self.opened)
        if self.error is not None:  # it may have failed while there was no service to stop
            service.stop(self.error)

    def drain(self, seconds: float) -> None:
        """Let nothing in, wait so long for what is in flight, then stop the service."""
        self.draining = True
        self.http.say(Drain())
        if self.service is None:  # `open` stops it
            return
        self.idle.wait(seconds)
        self.service.stop(Stopped("the server ends, and the answer was not complete within serve.drain_s"))

    def close(self) -> None:
        """Let the HTTP process finish what it is sending, and end; called once the service has."""
        self.closing = True
        self.http.say(Bye())
        with suppress(subprocess.TimeoutExpired):
            self.http.process.wait(self.limits.end_s)
        self.http.end()
        self.http.process.wait()

    def _await(self, event: threading.Event) -> None:
        if not event.wait(self.limits.start_s):
            self.error = UserError(f"the HTTP process does not answer within {self.limits.start_s:g} s")

    # The door's thread

    def _run(self) -> None:
        try:
            self._keep()
        except BaseException as error:  # the run must not go on without anybody who listens
            traceback.print_exc()
            self.http.end()
            self._fail(error)

    def _keep(self) -> None:
        """Start process after process."""
        while True:
            http = self.http
            writer = threading.Thread(target=http.write, args=(self._figures,), name="epmoe-tell", daemon=True)
            self.begun.append(time.monotonic())
            writer.start()
            with http.socket:
                why = self._hear(http)
                http.end()
                writer.join(self.limits.end_s)
            code = http.process.wait()
            self._abort_all(http)
            if self.closing or self.draining or self.error is not None:
                self._release()
                return
            why = why or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
            if not self.up.is_set() or self._too_often():
                times = f" {len(self.begun)} times" if self.up.is_set() else ""
                self._fail(UserError(f"the HTTP process has ended{times} ({why}): its own lines above say more"))
                return
            tell(f"epmoe: the HTTP process has ended ({why}): another one starts")
            self.http = Http(self.hello, self.listener, self.limits)
            if self.ready is not None:
                self.http.say(self.ready, *([Drain()] if self.draining else []))

    def _too_often(self) -> bool:
        while time.monotonic() - self.begun[0] > self.limits.within_s:
            self.begun.popleft()
        return len(self.begun) > self.limits.restarts

    def _release(self) -> None:
        """Nobody need wait any more: there will be no other process."""
        for event in (self.up, self.opened, self.idle):
            event.set()

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self._release()
        if self.service is not None:
            self.service.stop(error)

    def _hear(self, http: Http) -> str:
        """Obey the process until it is gone; why it must go, where that is known."""
        frames = Frames(FromHttp)
        try:
            while piece := http.socket.recv(PIECE):
                for frame in frames.feed(piece):
                    self._obey(http, frame)
        except Damaged as error:
            return f"it sent {error}"
        except OSError:
            pass
        return "it did not read its tokens" if len(http.outbox) > self.limits.unsent else ""

    def _obey(self, http: Http, frame: FromHttp) -> None:
        match frame:
            case Up():
                self.up.set()
            case Opened():
                self.opened.set()
            case Broken(text):
                self._fail(UserError(text))
            case Submit():
                http.submit(frame, self.service)
            case Abort(numbers):
                http.abort(numbers, self.service)
            case Idle():
                self.idle.set()

    def _abort_all(self, http: Http) -> None:
        http.abort([*http.calls], self.service)

    def _figures(self) -> Sequence[Figures]:
        return () if self.service is None else self.service.figures()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises UserError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"nobody can listen at serve.host={host} serve.port={port} ({error}): choose another address or port"
        ) from error
