"""Call: a request and who listens to its answer, on rank 0 or in the process that speaks HTTP. No torch."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from epmoe.engine.figures import Figures
from epmoe.engine.request import Event, PromptLogprobs, Request, Result, Token, TokenLogprobs
from epmoe.errors import UserError


class QueueFull(UserError):
    """So many wait already that this one is refused; nothing is wrong with it, and it may come again (HTTP 429)."""


class Stopped(RuntimeError):
    """The service has ended before the answer: it was closed, or a part of it has failed."""


class Listener(Protocol):
    """What rank 0 does with a call's tokens, on the engine's thread: none of it may wait."""

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        """A token that does not end the text by itself; True where the answer ends with it, by a stop string."""
        ...

    def finish(self, result: Result) -> None:
        """The answer is complete; called once, or `fail` is."""
        ...

    def fail(self, error: BaseException) -> None:
        """There will be no answer."""
        ...


class Serving(Protocol):
    """What callers of rank 0 see of a service, on any thread: epmoe/engine/service.py, or all replicas' together."""

    @property
    def failure(self) -> BaseException | None:
        """Why there is no service any more."""
        ...

    def is_running(self, within_s: float) -> bool:
        """Whether the loop takes turns, or does within so many seconds."""
        ...

    def submit(self, calls: "Sequence[Call]") -> None: ...
    def abort(self, call: "Call") -> None: ...
    def stop(self, error: BaseException | None = None) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def figures(self) -> list[Figures]: ...


@dataclass(eq=False)
class Call:
    """A request on rank 0, from `Service.submit` until its end."""

    request: Request
    listener: Listener
    submitted_s: float = field(default_factory=time.perf_counter)
    first_token_s: float = 0.0  # since then
    id: int = -1  # the engine's, once it has it
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs = ()
    cached_tokens: int = 0
    ended: bool = False  # its listener knows
    known: int = 0  # of its tokens, those that come once more: see `again`
    lost: int = 0  # replicas that were lost while they answered it

    def hear(self, event: Event) -> bool:
        """Take the next event and tell the listener. True: that has found a stop string, and knows that it has all.

        Whoever calls it then sees to it that no more tokens are made.
        """
        if self.known and isinstance(event, Token):
            said = self.ids[len(self.ids) - self.known]
            if event.token != said:
                raise RuntimeError(f"token {len(self.ids) - self.known} was {said}, and is {event.token} now")
            self.known -= 1
            return False
        if not self.first_token_s:
            self.first_token_s = time.perf_counter() - self.submitted_s
        if not isinstance(event, Token):
            self.ended = True
            self.prompt_logprobs = self.prompt_logprobs or event.result.prompt_logprobs  # no token has brought them
            self.listener.finish(self.timed(event.result))
            return False
        self.ids.append(event.token)
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs
        self.cached_tokens = self.cached_tokens or event.cached_tokens
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs)
        if not self.listener.token(event.token, event.logprobs):
            return False
        self.ended = True
        self.listener.finish(self.result("stop"))
        return True

    def again(self) -> None:
        """Nobody answers it any more; whoever does next does it from the beginning.

        Its tokens are the same ones then, so that the listener hears of those alone that it does not know.
        """
        self.id, self.known = -1, len(self.ids)
        self.lost += 1

    def fail(self, error: BaseException) -> None:
        """There will be no answer."""
        self.ended = True
        with suppress(Exception):  # whoever was to hear of it has gone
            self.listener.fail(error)

    def result(self, reason: str) -> Result:
        """What has come so far."""
        ids, logprobs = tuple(self.ids), tuple(self.logprobs)
        return self.timed(Result(ids, reason, 0.0, 0.0, logprobs, self.cached_tokens, self.prompt_logprobs))

    def timed(self, result: Result) -> Result:
        """The same with times since it was submitted."""
        total_s = time.perf_counter() - self.submitted_s
        first_s = (self.first_token_s or total_s) if result.ids else 0.0
        return replace(result, first_token_s=first_s, total_s=total_s)
