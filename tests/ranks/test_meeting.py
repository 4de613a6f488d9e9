"""Meeting: what a line says of ranks that come with something else."""

from dataclasses import dataclass
from typing import Any

import pytest

from epmoe.ranks.meeting import Meeting, difference


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
