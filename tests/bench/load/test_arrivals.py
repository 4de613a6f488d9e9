"""Arrivals: rank 0's clock decides for all, an idle wait is bounded, users have one request each."""

import time
from collections.abc import Callable

import pytest
import torch
from spawn import run_ranks

from epmoe.bench.load import arrivals
from epmoe.bench.load.arrivals import Concurrent, Poisson, Told
from epmoe.ranks.mesh import Ranks

ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def clock(now: float) -> Callable[[], float]:
    return lambda: now


def test_what_is_due_comes() -> None:
    poisson = Poisson([0.5, 1.0, 1.5, 9.0], Told(ONE, 60))
    assert poisson.come(1, clock(0.4)) == []
    assert poisson.come(1, clock(1.2)) == [0.5, 1.0]
    assert poisson.come(0, clock(7.0)) == [1.5]
    assert poisson.come(1, clock(10.0)) == [9.0] and poisson.come(0, clock(11.0)) == []


def test_an_idle_wait_ends_with_the_next_one_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(arrivals.time, "sleep", naps.append)
    poisson = Poisson([1.0, 100.0, 101.0], Told(ONE, 60))
    poisson.come(0, clock(0.9))
    poisson.come(0, clock(1.5))
    poisson.come(0, clock(2.0))
    poisson.come(3, clock(3.0))  # others run: no nap
    assert naps == pytest.approx([0.1, 0.0, 0.2])


def own_clock(ranks: Ranks) -> list[list[float]]:
    """Each rank's clock is another one, and the last rank's is far ahead."""
    told = Told(ranks, 60)
    poisson = Poisson([1.0, 2.0, 3.0, 4.0], told)
    found = [poisson.come(1, clock(now + 10 * ranks.rank)) for now in (0.0, 2.5, 3.0, 9.0)]
    assert len(told.taken_us) == 4 and 0 < told.cost_us() < 1e6
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_add_the_same(ranks: int) -> None:
    expected = [[], [1.0, 2.0], [3.0], [4.0]]
    assert run_ranks(own_clock, ranks) == [expected] * ranks


def test_a_message_is_the_number_of_rank_0() -> None:
    assert run_ranks(tell_rank, 3) == [[0, 0], [0, 0], [0, 0]] and Told(ONE, 60)(7) == 7


def tell_rank(ranks: Ranks) -> list[int]:
    told = Told(ranks, 60)
    return [told(ranks.rank), told(3 * ranks.rank)]


def test_each_user_has_one_under_way() -> None:
    concurrent = Concurrent(requests=6, users=4)
    assert concurrent.come(0, clock(0.0)) == [0.0] * 4 and concurrent.come(4, clock(1.0)) == []
    assert concurrent.come(3, clock(2.0)) == [2.0] and concurrent.come(2, clock(3.0)) == [3.0]  # none is left for one
    assert concurrent.come(0, clock(4.0)) == []


def test_time_is_real() -> None:
    begin = time.perf_counter()
    poisson = Poisson([0.05], Told(ONE, 60))
    assert poisson.come(0, lambda: time.perf_counter() - begin) == [0.05] and time.perf_counter() - begin >= 0.05
