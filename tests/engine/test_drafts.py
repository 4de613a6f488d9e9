"""Drafts: what is found in what was said, what is learnt of its worth, and when it is tried; on the host alone."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmoe.engine.drafts import (
    FRESH,
    MODEL_TRIALS,
    MOST_DRAFT,
    MOST_MATCH,
    PATIENCE,
    RARE,
    SEARCHED,
    Costs,
    Drafting,
    History,
    Modelled,
    least_share,
)

COSTS = Costs.of(num_experts=32, top_k=4)
FREE = Costs(0, 0, row=0, wait=0, wait_row=0)


def said(ids: list[int], more: list[int] | None = None) -> History:
    found = History(ids)
    for each in more or []:
        found.take(each)
    return found


def test_what_stood_there_before_comes_again() -> None:
    assert said([1, 2, 3, 4, 9, 1, 2]).draft(3) == [3, 4, 9]
    assert said([1, 2, 3, 7, 1, 2, 4, 8, 1, 2]).draft(2) == [4, 8]  # of equal matches the latest
    assert said([5, 1, 2, 3, 7, 1, 2, 4, 5, 1, 2]).draft(2) == [3, 7]  # before it the longest
    assert said([1, 2, 3, 4, 9, 2]).draft(3) == [3, 4, 9]  # one token is a match where it is rare
    assert said([*[2, 5, 2, 6] * RARE, 7, 2]).draft(3) == []
    assert said([]).draft(3) == said([1]).draft(3) == said([1, 2, 3]).draft(3) == []


def test_a_text_that_runs_into_its_own_end_goes_on_as_it_did() -> None:
    assert said([8, 1, 2, 3, 1, 2, 3, 1, 2]).draft(7) == [3, 1, 2, 3, 1, 2, 3]
    assert said([4, 4, 4]).draft(4) == [4] * 4


def test_of_very_many_places_the_latest_are_looked_at() -> None:
    rare = [7, 8, 9, 1, 5]
    assert said([*rare, *[1] * 300, 7, 8, 9, 1]).draft(1) == [5]
    assert said([*rare, *[2, 1] * (2 * SEARCHED), 7, 8, 9, 1]).draft(1) == []


def test_it_follows_what_comes() -> None:
    history = said([1, 2, 3, 4, 5, 6, 7, 1, 2], [3, 4])
    assert history.draft(2) == [5, 6]
    history.take(9)  # replaced: the text goes on behind it, perhaps
    assert history.draft(2) == [6, 7]
    history.take(6)
    assert history.draft(1) == [7]
    history.take(80)
    history.take(81)
    assert history.draft(1) == []  # twice in vain


def test_what_was_said_otherwise_is_expected_so_again() -> None:
    """A text whose 7 becomes 70, and goes on as it did; a row whose end, 8, becomes 80 and a text of its own."""
    line = [1, 2, 3, 4, 7, 5, 6, 9]
    renamed = said([*line, *line, 99], [1, 2, 3, 4, 70, 5, 6, 9, 1, 2, 3])
    assert renamed.replaced[7].stays and renamed.draft(5) == [4, 70, 5, 6, 9]
    rows = [[10 * n + m for m in range(1, 6)] for n in range(100, 103)]
    ended = said([token for row in rows for token in (*row, 8)], [*rows[0], 80, 81, 82, *rows[1][:3]])
    assert not ended.replaced[8].stays and ended.draft(5) == [*rows[1][3:], 80, 81, 82]
    for token in (*rows[1][3:], 8):
        ended.take(token)
    assert not ended.replaced  # it is back


def test_a_token_replaced_twice_is_the_latest() -> None:
    line = [1, 2, 3, 4, 7, 5, 6, 9]
    history = said([*line, 99], [1, 2, 3, 4, 70, 5, 6, 9, 98, 1, 2, 3, 4, 71, 5, 6, 9, 97, 1, 2, 3])
    assert history.draft(3)[1:] == [71, 5]


def test_more_tokens_than_were_expected() -> None:
    ids = [random.Random(5).randrange(9) for _ in range(3000)]
    grown = said(ids[:1], ids[1:])
    assert grown.ids[: grown.count].tolist() == ids
    assert grown.count == 3000


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_a_draft_is_what_followed_a_match(ids: list[int], most: int) -> None:
    history = said(ids)
    draft = history.draft(most)
    assert len(draft) in (0, most)
    if draft:
        place, known = history.next, ids + draft
        assert known[place : place + most] == draft
        matched = next(n for n in range(place + 1) if n == place or ids[place - 1 - n] != ids[-1 - n])
        assert min(matched, MOST_MATCH) == history.matched >= (1 if ids[:-1].count(ids[-1]) <= RARE else 2)


def test_who_finds_nothing_looks_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    search = History._search

    def counted(self: History) -> None:
        searches.append(self.count)
        search(self)

    monkeypatch.setattr(History, "_search", counted)
    history = said(list(range(100)), list(range(100, 400)))
    assert 300 / (PATIENCE + 1) < len(searches) < 300 / PATIENCE + 12
    for token in (*range(50, 90),):  # a copy begins, and is found in time
        history.take(token)
    assert history.draft(2) == [90, 91]
    history.take(90)
    assert (history.vain, history.pause) == (0, 0)


def test_who_was_right_lately_looks_each_time() -> None:
    history = said([1, 2, 3, 4, 1, 2], [3])
    for token in range(100, 100 + FRESH - 1):
        history.take(token)
        assert history.pause == 0
    history.take(99)
    assert history.pause == PATIENCE


def test_what_is_right_is_learnt_by_how_much_matched() -> None:
    wrong = said([1, 2, 3] * 4)
    before = wrong.chance(0)
    for token in (3, 3, 3):
        wrong.take(token)
    right = said([1, 2, 3] * 4, [1, 2, 3] * 5)
    assert right.chance(0) > 0.9 > before > wrong.right[2] / wrong.tried[2]


def test_costs_are_those_of_the_fit() -> None:
    """gpt-oss-20b on one H200, in ms; the unit is what a row takes without experts' weights."""
    steps = COSTS.steps(256)
    for rows, measured in ((1, 1.65), (64, 4.77), (256, 8.16)):
        assert abs(1.35 * steps[rows] - measured) < 0.1 * measured
    assert steps == sorted(steps) and len(steps) == 257


def test_a_draft_of_one_sequence_is_as_long_as_it_is_probable() -> None:
    drafting = Drafting(COSTS, 16)
    sure, unsure = said([1, 2, 3] * 30, [1, 2, 3] * 20), said([1, 2, 3, 4, 9, 2])
    assert drafting.allot([(sure, MOST_DRAFT)], 1, 15) == [15]
    assert drafting.allot([(sure, 4)], 1, 15) == [4] and drafting.allot([(sure, 15)], 1, 3) == [3]
    assert drafting.allot([(unsure, MOST_DRAFT)], 1, 15) == [0]  # one token matched: the wait is dearer
    assert drafting.allot([(said([1, 2, 3]), 15)], 1, 15) == [0]


def test_one_that_is_sure_does_not_make_all_others_wait() -> None:
    """Among 64 rows a draft brings little, and each waits; where half of them are sure it is worth it."""
    sure, nothing = said([1, 2, 3] * 30, [1, 2, 3] * 20), said([1, 2, 3])
    drafting = Drafting(COSTS, 256)
    assert sum(drafting.allot([(sure, 3), *[(nothing, 3)] * 63], 64, 192)) == 0
    half = drafting.allot([*[(sure, 15)] * 32, *[(nothing, 15)] * 32], 64, 192)
    assert 48 < sum(half) < 96 and not any(half[32:])


def test_a_dear_draft_model_has_to_be_right_more_often() -> None:
    shares = [least_share(COSTS, cost, 4) for cost in (0.0, 0.3, 1.0, 2.0, 9.0)]
    assert shares == sorted(set(shares)) and shares[0] > 0.3 and shares[-1] == 1.0
    guesses = Modelled([1, 2], least=0.5)
    for number in range(MODEL_TRIALS + 1):
        assert guesses.modelled == (number < MODEL_TRIALS)
        guesses.told([7, 8])
        assert guesses.longest == 2 * guesses.modelled
        guesses.take(7 if number % 4 == 0 else 100 + number)
    assert guesses.draft(2) == []


def test_what_a_draft_model_says_is_drafted_where_it_is_likelier() -> None:
    guesses = Modelled([1, 2, 3] * 9)
    guesses.told([5, 6, 7])
    assert guesses.draft(3) == [1, 2, 3]  # a long match
    for new in range(100, 160, 3):
        guesses.told([new, new + 1, 7])
        for token in (new, new + 1, new + 2):
            guesses.take(token)
    guesses.told([8, 9, 7])
    assert guesses.draft(3) == [8, 9, 7] and guesses.chance(0) > 0.9 > 0.5 > guesses.chance(2)
    guesses.take(8)
    assert guesses.draft(3) == []  # what it said is of the token before


def test_among_many_rows_no_draft_pays() -> None:
    """Where the surest draft would not be tried, a draft model need not be asked."""
    sure, drafting = said([1, 2, 3] * 30, [1, 2, 3] * 90), Drafting(COSTS, 256)
    assert sure.chance(0) > 0.98
    for rows in (1, 16, 64, 90, 128, 200, 255, 256):
        tried = sum(drafting.allot([(sure, 15)] * rows, rows, 256 - rows)) > 0
        assert drafting.pays(rows) or not tried
        assert drafting.pays(rows) == (rows < 100)
    assert Drafting(FREE, 512).pays(500) and not Drafting(FREE, 512).pays(512)


def test_drafts_go_to_who_is_surer() -> None:
    sure, likely = said([1, 2, 3] * 30, [1, 2, 3] * 20), said([1, 2, 3, 4] * 2)
    assert Drafting(FREE, 64).allot([(likely, 15), (sure, 15)], 2, 12) == [0, 12]
    assert Drafting(FREE, 64).allot([(likely, 15), (sure, 15)], 2, 20) == [5, 15]
    assert Drafting(FREE, 64).allot([], 2, 12) == []
