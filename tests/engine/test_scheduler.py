"""Who waits, and what a step has of prompts where its tokens are bounded."""

import random

from epmoe.cache.pages import Pages
from epmoe.engine.request import Request, SamplingParams
from epmoe.engine.scheduler import Scheduler, Sequence, shares


def prompts(*lengths: int) -> list[Sequence]:
    return [Sequence(id, Request((0,) * each, SamplingParams()), 10**6, 0.0) for id, each in enumerate(lengths)]


def shared(most: int, *lengths: int) -> dict[int, int]:
    return {sequence.id: count for sequence, count in shares(prompts(*lengths), most)}


def test_nobody_waits_for_the_whole_of_a_long_prompt() -> None:
    assert shared(100, 16000) == {0: 100}
    assert shared(100, 16000, 20) == {0: 80, 1: 20}
    assert shared(100, 16000, 600) == {0: 75, 1: 25}
    assert shared(100, 16000, 16000, 600) == {0: 62, 1: 25, 2: 13}
    assert shared(100, 16000, *[10] * 9) == {0: 10, **dict.fromkeys(range(1, 10), 10)}
    assert shared(2, 5, 5, 5) == {0: 1, 1: 1}
    assert shared(1, 5, 5) == {0: 1} and shared(7) == {}


def test_all_of_a_step_is_given_and_no_more() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths, most = [rng.randrange(1, 200) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 300)
        found = shared(most, *lengths)
        assert sum(found.values()) == min(most, sum(lengths))
        assert all(0 < count <= lengths[id] for id, count in found.items())


def test_equal_prompts_end_one_after_the_other() -> None:
    """Their first tokens come about when they would with one prompt at a time: 40 of 1000, in steps of 500."""
    waiting, ends, step = prompts(*[1000] * 40), [], 0
    while waiting:
        step += 1
        for sequence, count in shares(waiting, 500):
            sequence.cached += count
        ends += [step for sequence in waiting if not sequence.pending]
        waiting = [sequence for sequence in waiting if sequence.pending]
    assert step == 80 and sum(ends) / 40 < 1.1 * sum(range(2, 81, 2)) / 40


def test_the_lower_priority_goes_first_and_equal_ones_by_arrival() -> None:
    scheduler = Scheduler(Pages(100, 4, 8), 400, [], max_batch=8, prefill_chunk=50)
    for priority in (5, 0, 5, -1, 0, 7):
        scheduler.add(Request((1,) * 10, SamplingParams(max_new_tokens=3), priority=priority), 0.0)
    assert [each.id for each in scheduler.waiting] == [3, 1, 4, 0, 2, 5]
    scheduler.admit()
    late = scheduler.add(Request((1,) * 10, SamplingParams(max_new_tokens=3), priority=-2), 0.0)
    scheduler.admit()
    scheduler.step_tokens = 30
    assert scheduler.prefill()[0][0].id == late
