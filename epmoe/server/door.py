"""Door: rank 0's end of the line to its HTTP process, and who starts that process, and starts it again.

    engine's thread    listener ─▶ outbox          an append, whatever the HTTP process does
    writer             outbox ─▶ frames            all of a step in one, then scores of prompts; figures once a second
    reader             frames ─▶ Service.submit, abort; at their end: abort what is left, start the process anew

The socket that listens is rank 0's, so that clients which come while there is no process wait for the next one.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.request import Request, Result, SamplingParams, TokenLogprobs
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.server.frames import (
    PIECE,
    Abort,
    Broken,
    Bye,
    Damaged,
    Drain,
    Ended,
    Failed,
    Frame,
    Frames,
    FromHttp,
    Hello,
    Idle,
    Load,
    NewToken,
    Ready,
    Refused,
    Scores,
    Step,
    Submit,
    Up,
    packed,
    scores,
)  # fmt: skip
from epmoe.streams import tell

Said = NewToken | Ended | Failed | Frame
TOGETHER = 1024  # tokens in a frame, at most


@dataclass(frozen=True)
class Limits:
    """What an HTTP process may take."""

    start_s: float = 60.0  # until it answers
    unsent: int = 500_000  # tokens that it has not read; then it counts as lost
    restarts: int = 5  # within `within_s`
    within_s: float = 60.0
    end_s: float = 3.0  # to finish what is being sent, at the end
    figures_s: float = 1.0  # between two sets of figures


class Http:
    """One HTTP process, from its start to its end."""

    def __init__(self, hello: Hello, listener: socket.socket, limits: Limits) -> None:
        self.limits = limits
        self.calls: dict[int, Call] = {}  # by the process' number
        self.outbox: deque[Said] = deque()
        self.later: deque[Said] = deque()  # prompts' scores, and what comes after them of their calls; the writer's own
        self.behind: Counter[int] = Counter()  # of each such call, how much that is
        self.fresh = threading.Event()  # something is in it
        self.lost = False
        self.socket, there = socket.socketpair()
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

    def say(self, *what: Said) -> None:
        """For any thread; returns at once."""
        self.outbox.extend(what)
        if not self.fresh.is_set():
            self.fresh.set()
        if len(self.outbox) > self.limits.unsent and not self.lost:
            self.end()

    def end(self) -> None:
        """It counts as lost: whoever reads sees the end of its frames."""
        self.lost = True
        with suppress(OSError):
            self.process.kill()
            self.socket.shutdown(socket.SHUT_RDWR)
        self.fresh.set()

    def write(self, figures: Callable[[], Load | None]) -> None:
        """Send what comes, until the process is gone."""
        told_s = 0.0
        try:
            while not self.lost:
                if not self.later:
                    self.fresh.wait(self.limits.figures_s)
                self.fresh.clear()
                frames = self.taken()
                now = time.monotonic()
                if now - told_s >= self.limits.figures_s and (load := figures()) is not None:
                    told_s = now
                    frames.append(load)
                if frames:
                    self.socket.sendall(b"".join(map(packed, frames)))
        except Damaged as error:
            tell(f"epmoe: the HTTP process cannot be told: {error}")
            self.end()
        except OSError:  # it is gone, which the reader sees
            return
        except BaseException:  # its calls must not wait for ever
            traceback.print_exc()
            self.end()

    def taken(self) -> list[Frame]:
        """All of the outbox as frames: tokens and ends that stand together are one. Of prompts' scores one frame.

        What comes of their calls after them waits for them, and nothing else does.
        """
        due: list[Said] = []
        while self.outbox:
            each = self.outbox.popleft()
            call: Any = getattr(each, "call", None)
            if isinstance(each, Scores) or call in self.behind:
                self.behind[call] += 1
                self.later.append(each)
            else:
                due.append(each)
        if self.later:
            due.append(each := self.later.popleft())
            self.behind[each.call] -= 1  # type: ignore[union-attr]
            self.behind += Counter()  # without those that have nothing more
        return _framed(due)


def _framed(due: Sequence[Said]) -> list[Frame]:
    """Tokens and ends that stand together are one frame."""
    found: list[Frame] = []
    step: Step | None = None  # that the next token or end joins
    for each in due:
        if isinstance(each, Frame):
            found.append(each)
            step = None
            continue
        if step is None or len(step.tokens) >= TOGETHER:
            step = Step([], [], [])
            found.append(step)
        match each:
            case NewToken():
                step.tokens.append(each)
            case Ended():
                step.ends.append(each)
            case Failed():
                step.failed.append(each)
            case _:
                raise TypeError(f"no frame: {each!r}")
    return found


class Hearing:
    """The listener of a call: what it hears goes to the HTTP process as it is."""

    call: Call

    def __init__(self, http: Http, number: int) -> None:
        self.http, self.number, self.given = http, number, 0

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        first, self.given = not self.given, self.given + 1
        self.http.say(
            *scores(self.number, self.call.prompt_logprobs if first else ()),
            NewToken(self.number, token, logprobs, self.call.cached_tokens if first else 0),
        )
        return False

    def finish(self, result: Result) -> None:
        self.http.calls.pop(self.number, None)
        prompt = () if self.given else result.prompt_logprobs
        ids, logprobs = result.ids[self.given :], result.logprobs[self.given :]
        end = Ended(self.number, result.finish_reason, ids, logprobs, result.cached_tokens, result.failure)
        self.http.say(*scores(self.number, prompt), end)

    def fail(self, error: BaseException) -> None:
        self.http.calls.pop(self.number, None)
        mistake = isinstance(error, UserError)  # of the request's, found while it waited
        self.http.say(Refused([self.number], "mistake", str(error)) if mistake else Failed(self.number, str(error)))


class Door:
    """Starts the HTTP process at once, so that it answers while the weights are read; `open` lets requests in.

    Raises:
        UserError: the HTTP process has found a mistake (in the tokenizer, say), or does not start.
    """

    def __init__(self, hello: Hello, listener: socket.socket, limits: Limits | None = None) -> None:
        self.hello, self.listener, self.limits = hello, listener, limits or Limits()
        self.service: Service | None = None
        self.ready: Ready | None = None
        self.closing = self.draining = False
        self.error: BaseException | None = None  # why there is no HTTP process any more
        self.up, self.idle = threading.Event(), threading.Event()
        self.begun: deque[float] = deque()  # when processes have begun, of the last ones
        self.http = Http(self.hello, self.listener, self.limits)
        self.thread = threading.Thread(target=self._run, name="epmoe-door", daemon=True)
        self.thread.start()
        if not self.up.wait(self.limits.start_s):
            self.error = UserError(f"the HTTP process does not answer within {self.limits.start_s:g} s")
        self.check()

    def check(self) -> None:
        """Raises what has ended the HTTP process for good."""
        if self.error is not None:
            self.close()
            raise self.error

    def open(self, service: Service, ready: Ready) -> None:
        """Requests may come, and go to this service."""
        self.service, self.ready = service, ready
        if self.draining:
            service.stop(Stopped("the server ends before it was ready"))
            return
        self.http.say(ready)
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
                self.idle.set()
                self.up.set()
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

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.up.set()
        self.idle.set()
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
            case Broken(text):
                self._fail(UserError(text))
            case Submit():
                self._submit(http, frame)
            case Abort(numbers):
                for number in numbers:
                    if (call := http.calls.pop(number, None)) is not None and self.service is not None:
                        self.service.abort(call)
            case Idle():
                self.idle.set()

    def _submit(self, http: Http, frame: Submit) -> None:
        numbers = [number for ask in frame.asks for number, _ in ask.calls]
        try:
            if self.service is None:
                raise Stopped("the model is not ready")
            calls = []
            for ask in frame.asks:
                for number, params in ask.calls:
                    hearing = Hearing(http, number)
                    request = Request(tuple(ask.ids), SamplingParams(**params), priority=ask.priority)
                    hearing.call = Call(request, hearing)
                    calls.append(hearing.call)
            http.calls.update(zip(numbers, calls, strict=True))  # their first tokens may come before `submit` returns
            self.service.submit(calls)
        except (UserError, Stopped) as error:
            for number in numbers:
                http.calls.pop(number, None)
            kind = "full" if isinstance(error, QueueFull) else "stopped" if isinstance(error, Stopped) else "mistake"
            http.say(Refused(numbers, kind, str(error)))

    def _abort_all(self, http: Http) -> None:
        for call in list(http.calls.values()):
            if self.service is not None:
                self.service.abort(call)
        http.calls.clear()

    def _figures(self) -> Load | None:
        if (service := self.service) is None:
            return None
        engine = service.engine
        scheduler, pages = engine.scheduler, engine.cache.pages
        drafting = scheduler.speculation and scheduler.speculation.drafting
        return Load(
            queued=service.queued,
            queued_tokens=service.queued_tokens,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            put_back=scheduler.put_back,
            pages=pages.count,
            pages_free=pages.left,
            steps=service.steps,
            step_s=service.step_s,
            drafted=drafting.drafted if drafting else 0,
            accepted=drafting.accepted if drafting else 0,
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises UserError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"nobody can listen at serve.host={host} serve.port={port} ({error}): choose another address or port"
        ) from error
