"""Judge: what ends by which faults, and when."""

from collections.abc import Sequence

import pytest

from epmoe.ranks.fault import SETTLE_S, Fault
from epmoe.ranks.judge import Judge

UNITS = (frozenset({2, 3}), frozenset({4}))


def fault(rank: int, kind: str = "lost") -> Fault:
    return Fault(kind, rank, "it says", 1)


# faults → the one by which all end, and the units that are lost by which
CASES: dict[str, tuple[list[Fault], Fault | None, list[tuple[set[int], Fault]]]] = {
    "a unit": ([fault(2)], None, [({2, 3}, fault(2))]),
    "its likeliest cause": ([fault(3, "error"), fault(2)], None, [({2, 3}, fault(2))]),
    "two units": ([fault(4, "mistake"), fault(2)], None, [({4}, fault(4, "mistake")), ({2, 3}, fault(2))]),
    "rank 0's": ([fault(1)], fault(1), []),
    "rank 0's and a unit": ([fault(4), fault(1, "error")], fault(4), []),
    "a unit that a person ends": ([fault(2, "interrupt")], fault(2, "interrupt"), []),
    "another run's ranks": ([fault(2, "port"), fault(2)], fault(2, "port"), []),
}


@pytest.mark.parametrize("case", CASES)
def test_what_ends(case: str) -> None:
    faults, end, lost = CASES[case]
    judge = Judge(0)
    judge.units = UNITS
    for each in faults:
        judge.add(each, 1.0)
    assert judge.verdict(draining=False) == (end, [(frozenset(unit), why) for unit, why in lost])
    assert not judge.faults and judge.verdict(draining=False) == (None, [])
    assert judge.lost == set().union(*(unit for unit, _ in lost))
    judge.add(fault(2), 2.0)
    assert (not judge.faults) == any(2 in unit for unit, _ in lost)  # what is lost has no faults any more


def test_without_units_all_end() -> None:
    judge = Judge(0)
    judge.add(fault(2, "error"), 1.0)
    judge.add(fault(2), 1.0)
    assert judge.verdict(draining=True) == (fault(2), [])


def test_a_unit_that_is_told_to_end_with_all_others_serves_up_to_then() -> None:
    judge = Judge(0)
    judge.units = UNITS
    for faults, ends in (([fault(2, "term")], []), ([fault(2, "term"), fault(4)], [{4}])):
        for each in faults:
            judge.add(each, 1.0)
        end, lost = judge.verdict(draining=True)
        assert end is None and [set(unit) for unit, _ in lost] == ends


@pytest.mark.parametrize(
    ("rank", "first", "early_s", "waits"),
    [
        (0, fault(2), 0.0, SETTLE_S),
        (0, fault(2, "mistake"), 10.0, 10.0),
        (0, fault(2, "lost"), 10.0, SETTLE_S),
        (1, fault(0), 0.0, SETTLE_S),
        (1, fault(1, "error"), 0.0, 6 * SETTLE_S),
    ],
)
def test_when(rank: int, first: Fault, early_s: float, waits: float) -> None:
    judge = Judge(rank)
    assert not judge.settled(1e9, early_s)
    judge.add(first, 100.0)
    judge.add(fault(1), 100.0 + waits)
    assert not judge.settled(100.0 + 0.99 * waits, early_s) and judge.settled(100.0 + 1.01 * waits, early_s)


LINES: list[tuple[Fault, Sequence[int], str]] = [
    (fault(2), (2, 3), "epmoe: rank 2 it says; the others go on without ranks 2, 3\n"),
    (fault(4, "error"), (4,), "epmoe: rank 4: it says; the others go on without rank 4\n"),
]


@pytest.mark.parametrize(("why", "unit", "line"), LINES)
def test_what_rank_0_says(why: Fault, unit: Sequence[int], line: str) -> None:
    assert why.loss(frozenset(unit)) == line
