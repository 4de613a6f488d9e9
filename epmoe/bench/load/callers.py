"""Callers: all who ask, in one thread of rank 0. It submits what is due to the service, and hears what has ended.

Of `poisson` conversations begin at their times, whatever has become of those before; of `concurrent` the next one
begins when one has ended. In a conversation the next turn is due when the answer to the last one is there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from epmoe.bench.load.schedule import after
from epmoe.engine.call import Call
from epmoe.engine.request import Request, Result, TokenLogprobs
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.text.output import Answer
from epmoe.text.tokenizer import Tokenizer

LOOK_S = 0.5  # how long a wait for news lasts before one looks whether the service still lives


@dataclass
class Served:
    """What became of a request; seconds since the beginning."""

    due_s: float
    token_s: list[float] = field(default_factory=list)  # when each token of the answer was heard
    turn: int = 0  # of its conversation
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them, those that the cache had

    @property
    def first_s(self) -> float:
        """From the time when it was due, so what it waited until the engine took it is in it."""
        return self.token_s[0] - self.due_s

    @property
    def between_s(self) -> list[float]:
        """Times between two tokens."""
        return [later - before for before, later in zip(self.token_s, self.token_s[1:], strict=False)]


class Caller:
    """Asks for one answer and listens to it, making text of it as for a reader."""

    def __init__(self, served: Served, request: Request, conversation: int, callers: "Callers") -> None:
        self.served, self.request, self.conversation, self.callers = served, request, conversation, callers
        self.answer = Answer(callers.tokenizer, request)
        self.ids: tuple[int, ...] = ()

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.served.token_s.append(self.callers.clock())
        return self.answer.feed(token)

    def finish(self, result: Result) -> None:
        self.answer.finish(result)
        self.ids, self.served.cached_tokens = result.ids, result.cached_tokens
        self.callers.news.put(_not_finite() if result.finish_reason == "error" else self)

    def fail(self, error: BaseException) -> None:
        self.callers.news.put(error)


class Callers:
    """Those who hold these conversations.

    Args:
        conversations: as `schedule.conversations_of` gives them.
        at_s: when each begins, ascending; None: there are so many `users`, each with one conversation at a time.
    """

    def __init__(
        self,
        service: Service,
        tokenizer: Tokenizer,
        conversations: Sequence[Sequence[Request]],
        at_s: Sequence[float] | None,
        users: int,
    ) -> None:
        self.service, self.tokenizer, self.conversations = service, tokenizer, conversations
        self.at_s = [0.0] * min(users, len(conversations)) if at_s is None else list(at_s)  # as far as it is known
        self.clock: Callable[[], float] = lambda: 0.0
        self.news: SimpleQueue[Caller | BaseException] = SimpleQueue()  # who has the answer
        self.served: list[Served] = []  # in the order in which they were submitted
        self.error: BaseException | None = None

    def run(self) -> None:
        """Wait for the service, hold all conversations, then stop it; with an `error` it stops at once."""
        try:
            while not self.service.running.wait(LOOK_S):
                if self.service.failure is not None:
                    raise self.service.failure
            begin = time.perf_counter()
            self.clock = lambda: time.perf_counter() - begin
            self._hold_all()
            self.service.stop()
        except BaseException as error:
            self.error = error
            self.service.stop(error)

    def _hold_all(self) -> None:
        begun = ended = 0
        while ended < len(self.conversations):
            while begun < len(self.at_s) and self.at_s[begun] <= self.clock():
                self._ask(begun, 0, self.conversations[begun][0], self.at_s[begun])
                begun += 1
            wait_s = self.at_s[begun] - self.clock() if begun < len(self.at_s) else LOOK_S
            try:
                heard = self.news.get(timeout=min(max(wait_s, 0.0), LOOK_S))
            except Empty:
                continue
            if isinstance(heard, BaseException):
                raise heard
            ended += self._go_on(heard)

    def _go_on(self, caller: Caller) -> bool:
        """Ask for the next turn; whether there is none. Then somebody else's conversation may begin."""
        turns, now = self.conversations[caller.conversation], caller.served.token_s[-1]
        if (turn := caller.served.turn + 1) < len(turns):
            said = (*caller.request.ids, *caller.ids)
            self._ask(caller.conversation, turn, after(said, turns[turn]), now)
            return False
        if len(self.at_s) < len(self.conversations):
            self.at_s.append(now)
        return True

    def _ask(self, conversation: int, turn: int, request: Request, due_s: float) -> None:
        served = Served(due_s, turn=turn, prompt_tokens=len(request.ids))
        self.served.append(served)
        self.service.submit([Call(request, Caller(served, request, conversation, self))])


def _not_finite() -> UserError:
    return UserError("logits of a request are not finite: epmoe.generate on this checkpoint says where that begins")
