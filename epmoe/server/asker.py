"""Asker: a process at the other end of a socket, which asks a service of this one.

engine's thread    listener ─▶ outbox          an append, whatever the other process does
writer             outbox ─▶ frames            all of a step in one, then scores of prompts; figures once a second
reader             frames ─▶ submit, abort     the owner's, which obeys them
"""

import socket
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from epmoe.engine.call import Call, QueueFull, Serving, Stopped
from epmoe.engine.figures import Figures
from epmoe.engine.request import Request, Result, SamplingParams, TokenLogprobs
from epmoe.errors import UserError
from epmoe.server.frames import (
    Damaged,
    Ended,
    Failed,
    Frame,
    Load,
    NewToken,
    Refused,
    Scores,
    Step,
    Submit,
    packed,
    scores,
)  # fmt: skip
from epmoe.streams import tell

Said = NewToken | Ended | Failed | Frame
TOGETHER = 1024  # tokens in a frame, at most


@dataclass(frozen=True)
class Patience:
    """What may pile up for a process that does not read, and how often it is told how things stand."""

    unsent: int = 500_000  # tokens that it has not read; then it counts as lost
    figures_s: float = 1.0  # between two sets of figures


class Asker:
    """From the beginning of the connection to its end."""

    name: ClassVar[str] = "the process that asks"

    def __init__(self, own: socket.socket, patience: Patience) -> None:
        self.socket, self.patience = own, patience
        self.calls: dict[int, Call] = {}  # by the other process' number
        self.outbox: deque[Said] = deque()
        self.later: deque[Said] = deque()  # prompts' scores, and what comes after them of their calls; the writer's own
        self.behind: Counter[int] = Counter()  # of each such call, how much that is
        self.fresh = threading.Event()  # something is in it
        self.lost = False

    # What it asks, on the reader's thread

    def submit(self, frame: Submit, service: Serving | None) -> None:
        """Let these wait for their turn, all or none; a refusal goes back."""
        numbers = [number for ask in frame.asks for number, _ in ask.calls]
        try:
            if service is None:
                raise Stopped("the model is not ready")
            calls = []
            for ask in frame.asks:
                for number, params in ask.calls:
                    hearing = Hearing(self, number)
                    request = Request(tuple(ask.ids), SamplingParams(**params), priority=ask.priority)
                    hearing.call = Call(request, hearing)
                    calls.append(hearing.call)
            self.calls.update(zip(numbers, calls, strict=True))  # their first tokens may come before `submit` returns
            service.submit(calls)
        except (UserError, Stopped) as error:
            for number in numbers:
                self.calls.pop(number, None)
            self.say(Refused(numbers, kind_of(error), str(error)))

    def abort(self, numbers: Sequence[int], service: Serving | None) -> None:
        """Nobody there waits for these any more."""
        for number in numbers:
            if (call := self.calls.pop(number, None)) is not None and service is not None:
                service.abort(call)

    # What goes back

    def say(self, *what: Said) -> None:
        """For any thread; returns at once."""
        self.outbox.extend(what)
        if not self.fresh.is_set():
            self.fresh.set()
        if len(self.outbox) > self.patience.unsent and not self.lost:
            self.end()

    def end(self) -> None:
        """It counts as lost: whoever reads sees the end of its frames."""
        self.lost = True
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.fresh.set()

    def write(self, figures: Callable[[], Sequence[Figures]]) -> None:
        """Send what comes, until the process is gone. `figures`: none, where nobody knows any."""
        told_s = 0.0
        try:
            while not self.lost:
                if not self.later:
                    self.fresh.wait(self.patience.figures_s)
                self.fresh.clear()
                frames = self.taken()
                now = time.monotonic()
                if now - told_s >= self.patience.figures_s and (found := figures()):
                    told_s = now
                    frames.append(Load([*found]))
                if frames:
                    self.socket.sendall(b"".join(map(packed, frames)))
        except Damaged as error:
            tell(f"epmoe: {self.name} cannot be told: {error}")
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


def kind_of(error: BaseException) -> str:
    """Of a refusal: see frames.KINDS."""
    return "full" if isinstance(error, QueueFull) else "mistake" if isinstance(error, UserError) else "stopped"


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
    """The listener of a call: what it hears goes to the process that asked, as it is."""

    call: Call

    def __init__(self, asker: Asker, number: int) -> None:
        self.asker, self.number, self.given = asker, number, 0

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        first, self.given = not self.given, self.given + 1
        self.asker.say(
            *scores(self.number, self.call.prompt_logprobs if first else ()),
            NewToken(self.number, token, logprobs, self.call.cached_tokens if first else 0),
        )
        return False

    def finish(self, result: Result) -> None:
        self.asker.calls.pop(self.number, None)
        prompt = () if self.given else result.prompt_logprobs
        ids, logprobs = result.ids[self.given :], result.logprobs[self.given :]
        end = Ended(self.number, result.finish_reason, ids, logprobs, result.cached_tokens, result.failure)
        self.asker.say(*scores(self.number, prompt), end)

    def fail(self, error: BaseException) -> None:
        self.asker.calls.pop(self.number, None)
        if isinstance(error, UserError):  # of the request's, found while it waited
            self.asker.say(Refused([self.number], kind_of(error), str(error)))
        else:
            self.asker.say(Failed(self.number, str(error)))
