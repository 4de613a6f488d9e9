"""Requests at random times for tests of AsyncLLM: few kinds of them, many of each, so that each is soon known alone.

python tests/helpers/storm.py alone FILE      what each kind is alone on one rank, into a file

EPMOE_STORM says where, if not the embedded model on a CPU: {"checkpoint": …, "device": …, "cache_tokens": …}
"""

import asyncio
import json
import os
import pickle
import random
import sys
import time
from pathlib import Path
from typing import Any

from epmoe import LLM, AsyncLLM, SamplingParams
from epmoe.text.completion import Completion

PREFIX = "It was a fine morning, and the king said to his men: "
WHERE = {"checkpoint": "", "device": "cpu", "cache_tokens": 120, **json.loads(os.environ.get("EPMOE_STORM", "{}"))}
PLACE: dict[str, Any] = {"device": WHERE["device"], "max_batch": 12}
TIGHT = {**PLACE, "cache_tokens": WHERE["cache_tokens"], "page": 4}  # twelve at a time want several times as much
SERVE = {"step_tokens": 64}


def kinds() -> list[tuple[str, SamplingParams]]:
    rng = random.Random(7)
    return [
        (
            PREFIX[: rng.choice([5, 30, len(PREFIX)])] + rng.choice(["", "we", "let us go", "no"]),
            SamplingParams(
                max_tokens=rng.choice([1, 4, 9, 20, 60]),
                temperature=(temperature := rng.choice([0.0, 1.0])),
                n=2 if temperature and number % 4 == 0 else 1,
                seed=number,
                logprobs=number % 3,
                top_p=rng.choice([1.0, 0.8]),
                stop=("e",) if number % 5 == 0 else (),
                repetition_penalty=1.2 if number % 7 == 0 else 1.0,
                frequency_penalty=0.6 if number % 6 == 5 else 0.0,
                presence_penalty=0.4 if number % 4 == 3 else 0.0,
                logit_bias=((number, 4.0), (66, -100.0)) if number % 5 == 2 else (),
                allowed_token_ids=tuple(range(3, 1500)) if number % 5 == 4 else None,
                min_tokens=1 if number % 8 == 3 else 0,
                grammar={6: "start: /[a-z ]{3,20}[.!]/", 13: "start: /([A-Z][a-z]+, ){1,4}/"}.get(number),
            ),
        )
        for number in range(16)
    ]


def said(answer: Completion) -> list[Any]:
    return [(each.text, each.messages, each.ids, each.finish_reason, each.logprobs) for each in answer.outputs]


def alone(file: str) -> None:
    with LLM(WHERE["checkpoint"], runtime=PLACE) as llm:
        found = [said(llm.generate(*each)[0]) for each in kinds()]
    Path(file).write_bytes(pickle.dumps(found))


async def one(llm: AsyncLLM, known: list[Any], rng: random.Random, seconds: float) -> bool:
    """Whether it came to its end, as known; some leave before."""
    number = rng.randrange(len(known))
    await asyncio.sleep(rng.uniform(0, seconds))
    return await ask(llm, known, number, rng, rng.choice([None, None, None, 1, 2, 5]))


async def ask(llm: AsyncLLM, known: list[Any], number: int, rng: random.Random, leaves_after: int | None) -> bool:
    pieces = 0
    async for event in llm.generate(*kinds()[number], priority=rng.choice([0, 0, 0, -1, 2])):
        if isinstance(event, Completion):
            assert said(event) == known[number], (said(event), known[number])
            return True
        pieces += 1
        if pieces == leaves_after:
            break
    return False


async def storm(llm: AsyncLLM, file: str, count: int, seconds: float = 3.0, seed: int = 0) -> int:
    """So many requests within so many seconds; how many came to their end. Nothing of them is left afterwards.

    Up to half of them, and as many as run at a time, are the longest ones and come at once: a tight cache cannot hold
    them, on any machine.
    """
    known = pickle.loads(Path(file).read_bytes())
    longest = sorted(range(len(known)), key=lambda number: -len(known[number][0][2]))[:3]
    rngs = [random.Random(f"{seed} {i}") for i in range(count)]
    crowd = [ask(llm, known, longest[i % 3], rngs[i], None) for i in range(min(PLACE["max_batch"], count // 2))]
    done = await asyncio.gather(*crowd, *(one(llm, known, rng, seconds) for rng in rngs[len(crowd) :]))
    pages, until = llm.llm.cache.pages, time.monotonic() + 60
    while not pages.unused or any(each.queued + each.waiting + each.running for each in llm.service.figures()):
        assert time.monotonic() < until, "pages are lost"
        await asyncio.sleep(0.01)
    assert count / 5 < sum(done) < count
    return sum(done)


if __name__ == "__main__":
    alone(sys.argv[2])
