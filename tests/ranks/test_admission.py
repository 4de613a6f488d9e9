"""Admission: who is of the run, who is refused, and when nobody can tell."""

import os
import time
from dataclasses import dataclass, replace

import pytest

from epmoe.ranks.admission import Admission, Hello, Judgement, age_s, origin

MET = 100.0  # when the last rank came
OWN = Hello(rank=0, size=3, run="", origin="A", age_s=4.0)


@dataclass(frozen=True)
class Case:
    """Who came after rank 0, in this order; then the last one `after_s` later."""

    name: str
    there: list[Hello]
    last: Hello
    refused: str  # part of what the last one is told; "": it is known
    mixed: bool = False
    after_s: float = 1.0


ONE, TWO = replace(OWN, rank=1), replace(OWN, rank=2)
CASES = [
    Case("the last of the run", [ONE], TWO, ""),
    Case("started with another command line", [ONE], replace(TWO, origin="B"), ""),
    Case("another size", [ONE], replace(TWO, size=4), "of WORLD_SIZE=3 and not 4"),
    Case("another size, and there already", [ONE, TWO], replace(TWO, size=2), "of WORLD_SIZE=3 and not 2"),
    Case("another name", [ONE], replace(TWO, run="y"), "x and not y to its launcher"),
    Case("one has no name", [ONE], replace(TWO, run=""), ""),
    Case("began after all had met", [ONE, TWO], replace(ONE, age_s=0.9), "whose rank 1 is there already"),
    Case("might be this run's", [ONE, TWO], replace(ONE, age_s=1.1), "whose rank 1 is there already", mixed=True),
    Case("before all have met", [ONE], replace(ONE, age_s=0.0), "whose rank 1 is there already", mixed=True),
    Case("another rank 0", [ONE, TWO], OWN, "whose rank 0 is there already", mixed=True),
    Case("alone of another origin", [ONE], replace(ONE, origin="B"), "whose rank 1 is there already"),
    Case("the one there is the stranger", [replace(ONE, origin="B")], ONE, "rank 1 is there already", mixed=True),
    Case("all strange", [replace(ONE, origin="B")], replace(ONE, origin="C"), "rank 1 is there already", mixed=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_judge(case: Case) -> None:
    own = replace(OWN, run="x") if "launcher" in case.refused or case.name == "one has no name" else OWN
    admission = Admission(own, 29500, shared=True)
    assert [admission.judge(each, MET) for each in case.there] == [Judgement()] * len(case.there)
    known = dict(admission.known)
    found = admission.judge(case.last, MET + case.after_s)
    assert case.refused in found.refused and bool(case.refused) == bool(found.refused)
    assert bool(found.mixed) == case.mixed
    for line in filter(None, (found.refused, found.mixed)):
        assert "MASTER_PORT 29500" in line and "give each run a port of its own" in line and "\n" not in line
    if case.refused:
        assert admission.known == known  # whoever was there keeps its place


def test_settled_when_a_slower_rank_would_have_come() -> None:
    """Half as long again as the slowest of those that came has taken; an agent's store has no strangers."""
    admission = Admission(OWN, 29500, shared=True)
    assert admission.settled_at == 0
    admission.judge(replace(ONE, age_s=6.0), MET - 1)
    assert admission.settled_at == 0
    admission.judge(replace(TWO, age_s=2.0), MET)
    assert admission.settled_at == MET + 3
    private = Admission(replace(OWN, size=2), 29500, shared=False)
    private.judge(replace(ONE, size=2), MET)
    assert private.settled_at == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system does not say when a process began")
def test_age_counts_from_the_process_start() -> None:
    """Not from the import of anything: a process that a server forks has imported all before it began."""
    reader, writer = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        time.sleep(0.3)
        os.write(writer, f"{age_s()} {time.monotonic()}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    age, now = map(float, os.read(reader, 100).split())
    assert 0.3 <= age <= now - begin + 0.02  # the system counts in hundredths


def test_origin_is_one_launchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one parent and one command line, or of one Slurm step, whose ranks have a parent on each node."""
    here, step = origin({}), origin({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})
    assert origin({}) == here and len({here, step, origin({"SLURM_JOB_ID": "8", "SLURM_STEP_ID": "0"})}) == 3
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert origin({}) != here and origin({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}) == step
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["other"])
    assert origin({}) != here
