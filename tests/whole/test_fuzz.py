"""Damaged input of every kind, with fixed seeds: one error line, or text that is right. `scripts/fuzz` runs more."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.fuzzing import cases
from scripts.fuzzing.cases import Case, Outcome, run
from scripts.fuzzing.damage import KINDS, Damage, do
from scripts.fuzzing.judge import fault, verdict


def outcomes(wanted: list[Case], jobs: int = 2) -> list[Outcome]:
    found: list[Outcome] = []
    run(iter(wanted), jobs, found.append)
    return found


@pytest.fixture(scope="module")
def clean() -> str:
    (outcome,) = outcomes([("nothing", 0)])
    assert outcome.code == 0 and len(outcome.stdout) > 5, outcome
    return outcome.stdout


def check(kind: str, seeds: range, clean: str) -> Counter[str]:
    found = outcomes([(kind, seed) for seed in seeds])
    wrong = [
        f"{o.case}: {fault(o, clean)}: {o.damage.words[:200]} → {o.stderr[-300:]}" for o in found if fault(o, clean)
    ]
    assert not wrong, "\n".join(wrong)
    assert len(found) == len(seeds)
    return Counter(verdict(outcome, clean) for outcome in found)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input(kind: str, clean: str) -> None:
    counts = check(kind, range(8), clean)
    assert counts["refused"] >= 4, counts  # the damage is real


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_damaged_input(kind: str, clean: str) -> None:
    check(kind, range(100, 600), clean)


RIGHT = Outcome(
    ("header", 0), Damage("", (), may_change=False), 2, "", "epmoe: error: x is wrong: mend it\n", 0.1, 1, ""
)
FAULTS = {
    "ran for 20 s": replace(RIGHT, stopped="ran for 20 s", code=-9),
    "died of signal 11": replace(RIGHT, code=-11),
    "a traceback": replace(RIGHT, stderr="Traceback (most recent call last):\n  x\nValueError: x\n"),
    "a panic": replace(RIGHT, stderr="thread '<unnamed>' panicked at src/x.rs:1:1:\n"),
    "a long line": replace(RIGHT, stderr="epmoe: error: " + "x" * 500),
    "a strange line": replace(RIGHT, stderr="epmoe: error: x\nWarning: y\n"),
    "an error without a line": replace(RIGHT, stderr="epmoe: device=cpu (auto)\n"),
    "several error lines": replace(RIGHT, stderr="epmoe: error: x\nepmoe: error: y\n"),
    "an error and exit 0": replace(RIGHT, code=0),
    "text beside an error": replace(RIGHT, stdout="He said"),
    "other text": replace(RIGHT, code=0, stderr="", stdout="She said"),
}


@pytest.mark.parametrize("words", FAULTS)
def test_the_judge_sees(words: str) -> None:
    assert fault(FAULTS[words], "He said") == words and verdict(FAULTS[words], "He said") == "fault"


def test_the_judge_lets_pass() -> None:
    said = replace(RIGHT, code=0, stderr="epmoe: 4 tokens\n", stdout="He said")
    other = replace(said, stdout="She said", damage=Damage("", (), may_change=True))
    assert [verdict(each, "He said") for each in (RIGHT, said, other)] == ["refused", "the same text", "other text"]


@pytest.mark.parametrize(
    ("limit", "value", "words"), [("LIMIT_S", 0.01, "ran for 0.01 s"), ("LIMIT_BYTES", 1 << 20, "took ")]
)
def test_a_case_beyond_its_limits_is_ended(
    limit: str, value: float, words: str, clean: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, limit, value)
    (outcome,) = outcomes([("nothing", 0)])
    assert outcome.code == -9 and fault(outcome, clean).startswith(words)


def test_a_seed_says_it_all(tmp_path: Path) -> None:
    """A case that went wrong can be run again."""
    first, second = (cases.prepared(tmp_path / name) for name in ("a", "b"))
    for kind in KINDS:
        done = [do(kind, 7, folder) for folder in (first, second)]
        assert done[0].words == done[1].words
        assert [file.read_bytes() for file in sorted(first.iterdir())] == [
            file.read_bytes() for file in sorted(second.iterdir())
        ]
