"""The schedule is a function of its arguments, and its times are a Poisson process's."""

import statistics
from itertools import pairwise

import pytest

from epmoe.bench.lengths import read_lengths
from epmoe.bench.load.schedule import Due, requests_of, schedule

PROMPTS, ANSWERS = read_lengths("a", "uniform:5:50"), read_lengths("b", "lognormal:20:0.5:90")


def test_the_seed_decides_and_nothing_else() -> None:
    one = schedule(50, 3.0, PROMPTS, ANSWERS, 7)
    assert one == schedule(50, 3.0, PROMPTS, ANSWERS, 7) != schedule(50, 3.0, PROMPTS, ANSWERS, 8)
    assert one[:20] == schedule(20, 3.0, PROMPTS, ANSWERS, 7)  # more of them change none before
    assert one[0] == Due(pytest.approx(0.3935046213179794), 17, 69)  # type: ignore[arg-type]  # on every machine


def test_lengths_follow_no_rate() -> None:
    def lengths(rate: float | None) -> list[tuple[int, int]]:
        return [(due.prompt_tokens, due.answer_tokens) for due in schedule(30, rate, PROMPTS, ANSWERS, 1)]

    assert lengths(1.0) == lengths(9.0) == lengths(None)
    assert {due.at_s for due in schedule(30, None, PROMPTS, ANSWERS, 1)} == {0.0}


def test_times_between_are_exponential() -> None:
    """Mean and deviation are both 1 / rate; in a unit of time the count's variance is its mean: 4 standard errors."""
    at_s = [due.at_s for due in schedule(20_000, 5.0, PROMPTS, ANSWERS, 3)]
    gaps = [after - before for before, after in pairwise([0.0, *at_s])]
    assert min(gaps) > 0 and statistics.mean(gaps) == pytest.approx(0.2, rel=4 / 141)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=4 * 1.5 / 141)
    counts = [sum(second <= at < second + 1 for at in at_s[:5000]) for second in range(900)]
    assert statistics.variance(counts) / statistics.mean(counts) == pytest.approx(1, abs=4 * (2 / 900) ** 0.5)


def test_requests_are_as_long_as_they_are_due() -> None:
    due = schedule(9, 1.0, PROMPTS, ANSWERS, 0)
    requests = requests_of(due, 320, 5)
    assert [len(each.ids) for each in requests] == [each.prompt_tokens for each in due]
    assert [each.params.max_new_tokens for each in requests] == [each.answer_tokens for each in due]
    assert all(each.params.ignore_eos and max(each.ids) < 320 for each in requests)
    assert requests == requests_of(due, 320, 5) and requests[0].ids != requests_of(due, 320, 6)[0].ids
