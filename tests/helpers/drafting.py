"""Drafts that are tried and wrong as dice fall, by the same dice on every rank: no answer may follow from them."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

import pytest

from epmoe.engine.drafts import MOST_DRAFT, Drafter, Drafting, History


def try_some(patch: pytest.MonkeyPatch, dice: Random, most: int = MOST_DRAFT, *, found: bool = False) -> None:
    """Each sequence drafts any number of tokens up to `most`, whatever it costs: of those it has `found`, or of any."""

    def some(self: Drafting, drafters: Sequence[Drafter], rows: int, room: int) -> list[int]:
        counts: list[int] = []
        for history, longest in drafters:
            here = min(longest, most, room - sum(counts), history.longest if found else most)
            counts.append(dice.randint(0, max(0, here)))
        return counts

    patch.setattr(Drafting, "allot", some)


def draft_known(patch: pytest.MonkeyPatch, answers: Sequence[Sequence[int]]) -> None:
    """What is drafted goes on as one of these answers does behind a sequence's last two tokens, where one has them."""
    behind = {pair: ids[at + 2 :] for ids in answers for at, pair in enumerate(pairwise(ids))}

    def known(self: History, most: int) -> list[int]:
        return list(behind.get(tuple(self.ids[self.count - 2 : self.count].tolist()), ()))[:most]

    patch.setattr(History, "draft", known)


def draft_wrongly(patch: pytest.MonkeyPatch, dice: Random, ids: int, right: float) -> None:
    """A drafted token is what was found with probability `right`, else any of so many ids; all are, where none was."""
    draft = History.draft

    def wrong(self: History, most: int) -> list[int]:
        found = draft(self, most) or [dice.randrange(ids) for _ in range(most)]
        return [token if dice.random() < right else dice.randrange(ids) for token in found]

    patch.setattr(History, "draft", wrong)
