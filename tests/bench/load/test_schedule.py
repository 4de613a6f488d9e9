"""The schedule is a function of its arguments, and its times are a Poisson process's."""

import statistics
from itertools import chain, pairwise

import pytest

from epmoe.bench.lengths import read_lengths
from epmoe.bench.load.schedule import Due, Traffic, after, at_length, conversations_of, schedule
from epmoe.engine.request import Request, SamplingParams

PROMPTS, ANSWERS = read_lengths("a", "uniform:5:50"), read_lengths("b", "lognormal:20:0.5:90")


def due(requests: int, rate: float | None, seed: int, turns: int = 1) -> list[Due]:
    return schedule(Traffic(requests, turns, PROMPTS, ANSWERS), rate, seed)


def test_the_seed_decides_and_nothing_else() -> None:
    one = due(50, 3.0, 7)
    assert one == due(50, 3.0, 7) != due(50, 3.0, 8)
    assert one[:20] == due(20, 3.0, 7)  # more of them change none before
    assert one[0] == Due(pytest.approx(0.3935046213179794), ((17, 69),))  # type: ignore[arg-type]  # on every machine


def test_lengths_follow_neither_rate_nor_turns() -> None:
    def lengths(rate: float | None, turns: int = 1) -> list[tuple[int, int]]:
        return list(chain.from_iterable(each.turns for each in due(30, rate, 1, turns)))

    assert lengths(1.0) == lengths(9.0) == lengths(None) == lengths(2.0, turns=4)
    assert {each.at_s for each in due(30, None, 1)} == {0.0}


def test_turns_are_counted_as_requests() -> None:
    assert [len(each.turns) for each in due(10, 1.0, 0, turns=4)] == [4, 4, 2]
    rate = 20_000 / due(20_000, 5.0, 3, turns=4)[-1].at_s
    assert rate == pytest.approx(5, rel=4 / 5000**0.5)  # requests a second: 4 standard errors of 5,000 times


def test_times_between_are_exponential() -> None:
    """Mean and deviation are both 1 / rate; in a unit of time the count's variance is its mean: 4 standard errors."""
    at_s = [each.at_s for each in due(20_000, 5.0, 3)]
    gaps = [later - before for before, later in pairwise([0.0, *at_s])]
    assert min(gaps) > 0 and statistics.mean(gaps) == pytest.approx(0.2, rel=4 / 141)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=4 * 1.5 / 141)
    counts = [sum(second <= at < second + 1 for at in at_s[:5000]) for second in range(900)]
    assert statistics.variance(counts) / statistics.mean(counts) == pytest.approx(1, abs=4 * (2 / 900) ** 0.5)


def test_requests_are_as_long_as_they_are_due() -> None:
    plan = due(9, 1.0, 0, turns=2)
    found = conversations_of(plan, 320, 5)
    for each, turns in zip(plan, found, strict=True):
        assert [(len(one.ids), one.params.max_new_tokens) for one in turns] == list(each.turns)
        assert all(one.params.ignore_eos and max(one.ids) < 320 for one in turns)
    assert found == conversations_of(plan, 320, 5) and found[0][0].ids != conversations_of(plan, 320, 6)[0][0].ids


def test_a_turn_follows_what_was_said() -> None:
    turns = [Request((1, 2), SamplingParams(max_new_tokens=5)), Request((3,), SamplingParams(max_new_tokens=4))] * 2
    assert after((), turns[0]) is turns[0] and after((7, 8), turns[1]).ids == (7, 8, 3)
    assert [len(each.ids) for each in at_length(turns)] == [2, 2 + 5 + 1, 8 + 4 + 2, 14 + 5 + 1]
    assert [each.params for each in at_length(turns)] == [each.params for each in turns]
