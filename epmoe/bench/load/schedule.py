"""Which conversations come, and when: a function of its arguments alone, the same on every rank and every machine."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from epmoe.bench.lengths import Lengths
from epmoe.engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Due:
    """A conversation to come."""

    at_s: float  # since the beginning
    turns: tuple[tuple[int, int], ...]  # of each: new tokens of the prompt, tokens of the answer


@dataclass(frozen=True)
class Traffic:
    """How many of which lengths: so many requests, `turns` of a conversation; its last one may have fewer."""

    requests: int
    turns: int
    prompts: Lengths
    answers: Lengths


def schedule(traffic: Traffic, rate: float | None, seed: int) -> list[Due]:
    """Conversations in the order of their times.

    Args:
        rate: requests a second, so `rate` / turns conversations of a Poisson process: the times between two are
            exponential and know nothing of each other. None: all are due at once. Lengths are the same for any rate.
    """
    lengths, times = random.Random(f"lengths {seed}"), random.Random(f"times {seed}")
    found, at_s = [], 0.0
    for begin in range(0, traffic.requests, traffic.turns):
        at_s += times.expovariate(rate / traffic.turns) if rate else 0.0
        count = min(traffic.turns, traffic.requests - begin)
        found.append(
            Due(at_s, tuple((traffic.prompts.draw(lengths), traffic.answers.draw(lengths)) for _ in range(count)))
        )
    return found


def conversations_of(due: Sequence[Due], vocab: int, seed: int) -> list[list[Request]]:
    """A request for each turn, whose prompt lacks what was said before (`after`).

    Prompts of random ids, others for each seed; greedy, and each answer as long as it is to be.
    """
    rng = random.Random(f"ids {seed}")
    return [
        [
            Request(tuple(rng.choices(range(vocab), k=prompt)), SamplingParams(max_new_tokens=answer, ignore_eos=True))
            for prompt, answer in each.turns
        ]
        for each in due
    ]


def after(said: Sequence[int], request: Request) -> Request:
    """The request of the next turn, once these ids were said, prompts and answers."""
    return replace(request, ids=(*said, *request.ids)) if said else request


def at_length(turns: Sequence[Request]) -> list[Request]:
    """Requests of the lengths that a conversation's come to, of other ids."""
    found, said = [], 0
    for each in turns:
        found.append(after((0,) * said, each))
        said = found[-1].length(sys.maxsize)
    return found
