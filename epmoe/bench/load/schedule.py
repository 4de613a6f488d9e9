"""Which requests come, and when: a function of its arguments alone, the same on every rank and every machine."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from epmoe.bench.lengths import Lengths
from epmoe.engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Due:
    """A request to come."""

    at_s: float  # since the beginning
    prompt_tokens: int
    answer_tokens: int


def schedule(requests: int, rate: float | None, prompts: Lengths, answers: Lengths, seed: int) -> list[Due]:
    """Requests in the order of their times.

    Args:
        rate: requests a second of a Poisson process, so the times between two are exponential and know nothing of each
            other; None: all are due at once. The lengths are the same for any rate.
    """
    lengths, times = random.Random(f"lengths {seed}"), random.Random(f"times {seed}")
    found, at_s = [], 0.0
    for _ in range(requests):
        at_s += times.expovariate(rate) if rate else 0.0
        found.append(Due(at_s, prompts.draw(lengths), answers.draw(lengths)))
    return found


def requests_of(due: Sequence[Due], vocab: int, seed: int) -> list[Request]:
    """Prompts of random ids, others for each seed; greedy, and each answer as long as it is to be."""
    rng = random.Random(f"ids {seed}")
    return [
        Request(
            tuple(rng.choices(range(vocab), k=each.prompt_tokens)),
            SamplingParams(max_new_tokens=each.answer_tokens, ignore_eos=True),
        )
        for each in due
    ]
