"""Calls: what a process has asked another one for, whose service answers in frames."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict

from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.request import Finished, PromptLogprobs, Request, Result, Token
from epmoe.errors import UserError
from epmoe.server.frames import Ask, Ended, Frame, NewToken, Packed, Refused, Scores, Step, Submit

REFUSALS: dict[str, Callable[[str], Exception]] = {"mistake": UserError, "full": QueueFull, "stopped": Stopped}


class Calls(ABC):
    """Used by one thread at a time."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}  # that have not ended, by number
        self.scores: dict[int, list[Scores]] = {}  # of calls of which nothing else has come
        self.numbers = itertools.count()

    @abstractmethod
    def abort(self, calls: Sequence[Call]) -> None:
        """End them; their listeners hear nothing more. Those that have ended are left alone."""

    def asked(self, prompts: Sequence[tuple[Request, Sequence[Call]]]) -> Submit:
        """The frame that asks for the calls of these prompts, which are known by their numbers from now on."""
        asks = []
        for request, calls in prompts:
            for call in calls:
                call.id = next(self.numbers)
                self.calls[call.id] = call
            params = [(call.id, asdict(call.request.params)) for call in calls]
            asks.append(Ask(list(request.ids), request.priority, params))
        return Submit(asks)

    def left(self, calls: Sequence[Call]) -> list[int]:
        """The numbers of those that have not ended; they are forgotten."""
        numbers = [call.id for call in calls if self.calls.get(call.id) is call]
        for number in numbers:
            del self.calls[number]
            self.scores.pop(number, None)
        return numbers

    def heard(self, frame: Frame) -> None:
        """Let the calls' listeners hear of it."""
        match frame:
            case Step():
                for token in frame.tokens:
                    self._token(token)
                for end in frame.ends:
                    self._ended(end)
                for failed in frame.failed:
                    if (call := self.calls.get(failed.call)) is not None:
                        self.fail(call, Stopped(failed.text))
            case Scores():
                if frame.call in self.calls:
                    self.scores.setdefault(frame.call, []).append(frame)
            case Refused(numbers, kind, text):
                for call in [self.calls[number] for number in numbers if number in self.calls]:
                    self.fail(call, REFUSALS[kind](text))

    def fail(self, call: Call, error: Exception) -> None:
        """There will be no answer to it."""
        self.calls.pop(call.id, None)
        self.scores.pop(call.id, None)
        call.fail(error)

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
