"""The loop of a server without its network: add what has come, step, note when each token came."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from epmoe.bench.load.arrivals import Arrivals
from epmoe.engine.request import Finished, Request, Token
from epmoe.llm import LLM
from epmoe.text.output import Answer


@dataclass
class Served:
    """What became of a request; seconds since the beginning."""

    due_s: float
    token_s: list[float] = field(default_factory=list)  # when each token of the answer came

    @property
    def first_s(self) -> float:
        """From the time when it was due, so what it waited until the engine took it is in it."""
        return self.token_s[0] - self.due_s

    @property
    def between_s(self) -> list[float]:
        """Times between two tokens."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]


def serve(llm: LLM, requests: Sequence[Request], arrivals: Arrivals) -> list[Served]:
    """Run all requests, each added when it comes, and make the text of each answer; a collective.

    Raises:
        NotFinite: a UserError: the model's numbers are none for some prompts.
    """
    engine, begin = llm.engine, time.perf_counter()
    served: list[Served] = []
    running: dict[int, tuple[Served, Answer]] = {}  # by the engine's id

    def clock() -> float:
        return time.perf_counter() - begin

    while running or len(served) < len(requests):
        for due_s in arrivals.come(len(running), clock):
            request = requests[len(served)]
            served.append(Served(due_s))
            running[engine.add(request)] = served[-1], Answer(llm.tokenizer, request)
        events = engine.step() if running else []
        now = clock()
        for event in events:
            if isinstance(event, Token):
                one, answer = running[event.id]
                one.token_s.append(now)
                answer.feed(event.token)
            elif isinstance(event, Finished):
                running.pop(event.id)[1].finish(event.result)
    engine.check_finite()
    return served
