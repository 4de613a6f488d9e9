"""Early: rank 0 has each replica's answers as they are made, and knows when there are no more."""

import time

from spawn import run_ranks

from epmoe.engine.early import Answered, Early
from epmoe.engine.request import Result, TokenLogprobs
from epmoe.ranks.mesh import Ranks

WITHIN_S = 60


def answered(index: int) -> Answered:
    logprobs = tuple(TokenLogprobs(-1.5 / 7, ((number, -0.1),)) for number in range(index))
    return Answered(index, [*range(index)], Result((*range(index), 9), "eos", 0.5, 1.5, logprobs, 3, (None, *logprobs)))


def said(ranks: Ranks) -> tuple[list[Answered], list[Answered]]:
    """On rank 0 what has come before the others end, and after."""
    early = Early(ranks)
    before: list[Answered] = []
    for index in (0, 1, 2):
        early.tell(answered(100 * ranks.replica + index))
    if ranks.is_main:
        assert early.open == ranks.replicas - 1
        deadline = time.monotonic() + WITHIN_S
        while len(before) < 3 * (ranks.replicas - 1):
            assert time.monotonic() < deadline
            before += early.come(all_of_them=False)
        assert early.open == ranks.replicas - 1
    ranks.meet()
    early.tell(answered(100 * ranks.replica + 50))
    if not ranks.is_main:
        early.close()
    after = [*early.come(all_of_them=True)]
    if ranks.is_main:
        early.close()
    return before, after


def test_rank_0_hears_of_each_at_once() -> None:
    first, *others = run_ranks(said, 6, replica=3)
    before, after = (sorted(each, key=lambda answered: answered.index) for each in first)
    for found, indices in ((before, (0, 1, 2)), (after, (50,))):
        wanted = [answered(100 * replica + index) for replica in (1, 2) for index in indices]
        assert [each.index for each in found] == [each.index for each in wanted]
        assert [each.told for each in found] == [each.told for each in wanted]
        assert [each.result.logprobs for each in found] == [each.result.logprobs for each in wanted]
    assert others == [([], [])] * 5


def test_without_replicas_nobody_hears() -> None:
    assert run_ranks(said, 2) == [([], [])] * 2
