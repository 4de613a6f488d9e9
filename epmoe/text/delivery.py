"""Delivery: one prompt's answers on their way from the engine's thread to whoever waits for them, at any pace.

    engine's thread:  token ─▶ Answer (epmoe/text/output.py) ─▶ wake        once, until somebody has taken what is new
    any thread:       take ─▶ a Piece of each answer that has anything new, at last the Completion

What is not taken is kept: no more than the answers themselves, so a slow reader holds up nobody, and costs nothing.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epmoe.engine.call import Call
from epmoe.engine.request import Request, Result, TokenLogprobs, choices
from epmoe.text.completion import Choice, Completion, completions
from epmoe.text.output import Answer
from epmoe.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """What is new of one of a prompt's answers. All pieces of an answer add up to its text, ids and logprobs."""

    index: int  # among the prompt's n answers
    text: str  # "" while a character, a header or what may become a stop string is not complete
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one for each id when asked for, else empty


class Delivery:
    """A prompt's `calls`, to submit to a service.

    Args:
        prompt: of n answers.
        wake: called on the engine's thread when there is something to take, and not again until it is taken.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Request, wake: Callable[[], object]) -> None:
        self.prompt, self.wake = prompt, wake
        self.lock = threading.Lock()
        self.woken = False
        self.parts = [_Part(self, index, Answer(tokenizer, each)) for index, each in enumerate(choices([prompt]))]
        self.calls = [Call(each, part) for each, part in zip(choices([prompt]), self.parts, strict=True)]
        self.error: BaseException | None = None

    def take(self) -> tuple[list[Piece], Completion | None]:
        """What is new since the last call; the completion once all answers have ended.

        Raises:
            the error that an answer has failed with; what came before it is lost then.
        """
        with self.lock:
            self.woken = False
            if self.error is not None:
                raise self.error
            pieces = [piece for part in self.parts if (piece := part.fresh())]
            results = [part.result for part in self.parts if part.result is not None]
            if len(results) < len(self.parts):
                return pieces, None
            requests, answers = [call.request for call in self.calls], [part.answer for part in self.parts]
            made = [Choice.of(*each) for each in zip(requests, results, answers, strict=True)]
            return pieces, completions([self.prompt], made)[0]

    def news(self, error: BaseException | None = None) -> None:
        """There is something to take; called with the lock."""
        self.error = self.error or error
        if not self.woken:
            self.woken = True
            self.wake()


class _Part:
    """One answer's listener."""

    def __init__(self, delivery: Delivery, index: int, answer: Answer) -> None:
        self.delivery, self.index, self.answer = delivery, index, answer
        self.ids: list[int] = []  # not taken
        self.logprobs: list[TokenLogprobs] = []
        self.given = 0  # ids that came, taken or not
        self.result: Result | None = None

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        with self.delivery.lock:
            stopped = self.answer.feed(token)
            self._add([token], [] if logprobs is None else [logprobs])
            self.delivery.news()
        return stopped

    def finish(self, result: Result) -> None:
        with self.delivery.lock:
            self.answer.finish(result)
            self._add(result.ids[self.given :], result.logprobs[self.given :])
            self.result = result
            self.delivery.news()

    def fail(self, error: BaseException) -> None:
        with self.delivery.lock:
            self.delivery.news(error)

    def fresh(self) -> Piece | None:
        """What was not taken; None where there is nothing."""
        text, ids, logprobs = self.answer.fresh(), tuple(self.ids), tuple(self.logprobs)
        self.ids, self.logprobs = [], []
        return Piece(self.index, text, ids, logprobs) if text or ids else None

    def _add(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.given += len(ids)
