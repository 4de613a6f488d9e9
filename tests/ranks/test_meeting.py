"""Meeting: what a line says of ranks that come with something else."""

from dataclasses import dataclass
from typing import Any

import pytest

from epmoe.ranks.meeting import Meeting, Meetings, difference


@dataclass(frozen=True)
class Case:
    name: str
    arrived: list[dict[str, Any]]  # by rank
    says: str  # what rank 0 prints; "": nothing


SAME = {"a": "1", "b": "2"}
CASES = [
    Case("the same", [{"brings": SAME}, {"brings": {"b": "2", "a": "1"}}], ""),
    Case("a value", [{"brings": SAME}] * 2 + [{"brings": SAME | {"b": "3"}}], "rank 2 has b=3, rank 0 b=2: mend it"),
    Case("several", [{"brings": SAME}, {"brings": {"b": "x"}}], "rank 1 has no a, rank 0 a=1 (1 more differ): mend it"),
    Case("one more", [{"brings": {}}, {"brings": {"c": ""}}], "rank 1 has c=, rank 0 no c: mend it"),
    Case("the call", [{"purpose": "f"}, {}], "rank 1: it comes to start, rank 0 to f: every rank's program must make"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_difference(case: Case) -> None:
    fault = difference({rank: Meeting(alike="mend it", **each) for rank, each in enumerate(case.arrived)})
    if not case.says:
        assert fault is None
        return
    assert fault is not None and (fault.kind, fault.code) == ("mistake", 2)
    assert fault.line(0).startswith(f"epmoe: error: {case.says}")
    assert fault.line(1) == ""


def test_meetings_of_some_ranks_are_apart() -> None:
    """Two of them, and one of all, may be under way at once; who is lost is waited for no more."""
    book = Meetings(4)
    few, more, whole = Meeting(among=(0, 1)), Meeting(1.0, among=(2, 3)), Meeting(9.0, purpose="end")
    book.arrive(2, more, 0.0)
    book.arrive(0, few, 0.5)
    assert book.decide(settled=True) == ([], None)
    book.arrive(1, few, 1.0)
    assert book.complete
    assert book.decide(settled=True) == ([({0, 1}, few)], None)
    for rank in (0, 1):
        book.arrive(rank, whole, 2.0)
    assert book.late(2.5) == [(3, "was not ready within 1 s of the others")]
    book.lose([2, 3])
    assert book.late(2.5) == [] and book.decide(settled=True) == ([({0, 1}, whole)], None)


def test_a_meeting_that_settles_waits_for_it() -> None:
    book = Meetings(1)
    for meeting in (Meeting(settled=True), Meeting(brings={"a": "1"})):
        book.arrive(0, meeting, 0.0)
        assert (book.decide(settled=False)[0] == []) == meeting.settled
        assert book.decide(settled=True)[1] is None and not book.complete
    book = Meetings(2)
    for rank in (0, 1):
        book.arrive(rank, Meeting(brings={"a": str(rank)}), 0.0)
    assert book.decide(settled=False) == ([], None)
    fault = book.decide(settled=True)[1]
    assert fault is not None and "rank 1 has a=1" in fault.text
