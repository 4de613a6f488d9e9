"""Line: the HTTP process' end of the line to rank 0: what a `Service` is to those in its own process."""

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict

from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.request import Finished, PromptLogprobs, Request, Result, Token
from epmoe.errors import UserError
from epmoe.server.frames import (
    PIECE,
    Abort,
    Ask,
    Bye,
    Damaged,
    Drain,
    Ended,
    Frame,
    Frames,
    FromRank0,
    Hello,
    Idle,
    Load,
    NewToken,
    Packed,
    Ready,
    Refused,
    Scores,
    Step,
    Submit,
    packed,
)  # fmt: skip

REFUSALS: dict[str, Callable[[str], Exception]] = {"mistake": UserError, "full": QueueFull, "stopped": Stopped}


class Line:
    """One a process; all of it runs in the event loop's thread.

    Args:
        end: called when rank 0 says goodbye, or is gone.
    """

    def __init__(self, own: socket.socket, end: Callable[[], None]) -> None:
        self.socket, self.end = own, end
        self.calls: dict[int, Call] = {}
        self.scores: dict[int, list[Scores]] = {}  # of calls of which nothing else has come
        self.numbers = itertools.count()
        self.ready: Ready | None = None
        self.load: Load | None = None
        self.draining = False
        self.active = 0  # requests of clients that are being answered
        self.over = False  # nothing can be asked any more

    async def greet(self) -> Hello:
        """Open the line; rank 0's first frame."""
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self.socket)
        self.frames, self.early = Frames(FromRank0), list[Frame]()
        while not self.early:
            piece = await self.reader.read(PIECE)
            if not piece:
                os._exit(0)  # rank 0 has gone: there is nobody to tell
            self.early += self.frames.feed(piece)
        hello = self.early.pop(0)
        assert isinstance(hello, Hello)
        return hello

    def say(self, frame: Frame) -> None:
        """For rank 0. It reads at once, so nothing piles up here."""
        self.writer.write(packed(frame))

    async def listen(self) -> None:
        """Hear rank 0 until it says goodbye or is gone; all calls have ended then."""
        try:
            for frame in self.early:
                self._hear(frame)
            while not self.over and (piece := await self.reader.read(PIECE)):
                for frame in self.frames.feed(piece):
                    self._hear(frame)
        except (OSError, Damaged):
            pass
        finally:
            self.over = True
            for call in [*self.calls.values()]:
                self._fail(call, Stopped("the model's ranks have ended, and all requests with them"))
            self.end()

    def submit(self, prompts: Sequence[tuple[Request, Sequence[Call]]]) -> None:
        """Let the calls of these prompts wait for their turn, all or none; a refusal comes to their listeners.

        Raises:
            Stopped: there is no service any more, or not yet.
        """
        if self.over or self.ready is None:
            raise Stopped("the model is not ready" if not self.over else "the model's ranks have ended")
        asks = []
        for request, calls in prompts:
            for call in calls:
                call.id = next(self.numbers)
                self.calls[call.id] = call
            params = [(call.id, asdict(call.request.params)) for call in calls]
            asks.append(Ask(list(request.ids), request.priority, params))
        self.say(Submit(asks))

    def abort(self, calls: Sequence[Call]) -> None:
        """End them; their listeners hear nothing more. Those that have ended are left alone."""
        numbers = [call.id for call in calls if self.calls.pop(call.id, None) is not None]
        for number in numbers:
            self.scores.pop(number, None)
        if numbers and not self.over:
            self.say(Abort(numbers))

    def begin(self) -> None:
        """A client's request is being answered."""
        self.active += 1

    def finish(self) -> None:
        """One is answered."""
        self.active -= 1
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self.draining and not self.active and not self.over:
            self.say(Idle())

    def _hear(self, frame: Frame) -> None:
        match frame:
            case Step():
                for token in frame.tokens:
                    self._token(token)
                for end in frame.ends:
                    self._ended(end)
                for failed in frame.failed:
                    if (call := self.calls.get(failed.call)) is not None:
                        self._fail(call, Stopped(failed.text))
            case Scores():
                if frame.call in self.calls:
                    self.scores.setdefault(frame.call, []).append(frame)
            case Refused(numbers, kind, text):
                for call in [self.calls[number] for number in numbers if number in self.calls]:
                    self._fail(call, REFUSALS[kind](text))
            case Ready():
                self.ready = frame
            case Load():
                self.load = frame
            case Drain():
                self.draining = True
                self._tell_idle()
            case Bye():
                self.over = True

    def _scores(self, number: int) -> PromptLogprobs:
        found = self.scores.pop(number, None)
        return () if found is None else Packed(found)

    def _token(self, new: NewToken) -> None:
        call = self.calls.get(new.call)
        if call is None:
            return  # it has ended here; that it ends is on its way
        event = Token(new.call, new.token, new.logprobs, self._scores(new.call), new.cached_tokens)
        try:
            if call.hear(event):
                self.abort([call])
        except Exception as error:  # a listener's, and so this call's alone
            self.abort([call])
            call.fail(error)

    def _ended(self, end: Ended) -> None:
        call = self.calls.pop(end.call, None)
        if call is None:
            return
        ids, logprobs = (*call.ids, *end.ids), (*call.logprobs, *end.logprobs)
        prompt = call.prompt_logprobs or self._scores(end.call)
        try:
            result = Result(ids, end.reason, 0.0, 0.0, logprobs, end.cached_tokens, prompt, end.failure)
            call.hear(Finished(end.call, result))
        except Exception as error:
            call.fail(error)

    def _fail(self, call: Call, error: Exception) -> None:
        self.calls.pop(call.id, None)
        self.scores.pop(call.id, None)
        call.fail(error)
