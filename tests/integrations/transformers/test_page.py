"""The examples of docs/transformers.md run as they are; that for several ranks also on two, in test_parallel.py."""

import pytest
from moe_families import examples, printed

FIRST, RANKS = examples()


def test_the_first_example() -> None:
    out = printed(FIRST)
    assert out.startswith("In those days there was") and len(out.split()) > 10


def test_the_example_of_several_ranks_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert " on 1 ranks, token " in printed(RANKS)
