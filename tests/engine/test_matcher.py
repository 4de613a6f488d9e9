"""Masks of grammars: what may come next, bounds on what a grammar may cost, failures that are told."""

import json
import random
import threading
import time
from typing import Any, cast

import pytest
import torch
from fake_model import EOS, VOCAB
from fake_words import text, vocabulary
from llguidance import LLParserLimits

from epmoe.engine.adjust import words
from epmoe.engine.matcher import MOST_CHARACTERS, Grammars, Matcher, _waves, check_grammar
from epmoe.errors import UserError
from epmoe.layers.adjust import unpacked


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(vocabulary())


def masks(grammars: Grammars, matchers: list[Matcher], rows: int = 0) -> list[list[int]]:
    word_GW = torch.full((rows or len(matchers), words(VOCAB)), 7, dtype=torch.int32)
    grammars.fill([(each, ()) for each in matchers], word_GW)
    assert (word_GW[len(matchers) :] == 7).all()
    return [mask.nonzero()[:, 0].tolist() for mask in unpacked(word_GW[: len(matchers)], VOCAB)]


def test_masks_follow_what_has_come(grammars: Grammars) -> None:
    """Several at a time, each by its own tokens; at the end the end of the text alone, and for ever."""
    matchers = [grammars.matcher('start: "ab" | "ac"'), grammars.matcher("start: /[0-9]{1,2}/")]
    a, b, c, digits = 65, 66, 67, list(range(16, 26))
    assert masks(grammars, matchers, rows=5) == [[a], digits]
    matchers[0].take(a)
    matchers[1].take(16)
    assert masks(grammars, matchers) == [[b, c], [*digits, EOS]]
    assert masks(grammars, matchers[1:]) == [[*digits, EOS]]  # the row is another one, the mask the same
    for token in (c, EOS, EOS):
        matchers[0].take(token)
        assert masks(grammars, matchers[:1]) == [[EOS]] and not matchers[0].failure
    assert masks(grammars, [grammars.matcher('start: "ab" | "ac"')]) == [[a]]  # a copy of its own


@pytest.mark.parametrize("grammar", ['start: "ab" | "ac"', "start: <[65]> <[66-67]>", "start: /a(b|c)/"])
def test_masks_along_a_draft(grammar: str, grammars: Grammars) -> None:
    """Those of each token after the one before; behind a refused one they mean nothing; the matcher stays."""
    a, b, c, other = 65, 66, 67, 68
    matchers = [grammars.matcher(grammar), grammars.matcher("start: /[0-9]{1,2}/")]
    word_GW = torch.zeros(9, words(VOCAB), dtype=torch.int32)
    for _ in range(2):
        drafts = [(a, b, EOS, EOS), (16, other, 17)]
        assert grammars.fill(list(zip(matchers, drafts, strict=True)), word_GW) == 9
        found = [mask.nonzero()[:, 0].tolist() for mask in unpacked(word_GW, VOCAB)]
        digits = list(range(16, 26))
        assert found[:7] == [[a], [b, c], [EOS], [EOS], [EOS], digits, [*digits, EOS]]
    assert masks(grammars, matchers) == [[a], digits]
    for token in (a, c, EOS):
        matchers[0].take(token)
        assert not matchers[0].failure


LARGE = "start: /(A|B)*A(A|B){40}/"  # each token more makes a new state of its lexer


def until_it_fails(grammars: Grammars, matcher: Matcher) -> int:
    """Tokens until then, of letters as dice fall."""
    dice = random.Random(0)
    for count in range(2000):
        masks(grammars, [matcher])
        if matcher.failure:
            return count
        matcher.take(33 + dice.randrange(2))
    raise AssertionError("it never fails")


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> Grammars:
    limits = LLParserLimits(max_lexer_states=400, step_lexer_fuel=100_000, verbose_errors=False)
    monkeypatch.setattr("epmoe.engine.matcher.LIMITS", limits)
    return Grammars(vocabulary())


@pytest.mark.parametrize("held", [False, True])
def test_one_that_has_failed_harms_nobody_who_begins_after_it(held: bool, tight: Grammars) -> None:
    """All copies of a compiled grammar have one lexer, whose states are bounded."""
    if held:
        tight.hold(LARGE, lambda reason: None)
    first, beside = tight.matcher(LARGE), tight.matcher(LARGE)
    count = until_it_fails(tight, first)
    assert until_it_fails(tight, beside) < count // 2  # nothing is left for it
    tight.spoil(LARGE)
    assert until_it_fails(tight, tight.matcher(LARGE)) == count > 10


def test_masks_of_one_lexer_are_made_in_their_order() -> None:
    """So that it does not follow from threads which of them finds the bound."""
    one, two, other = (cast(Any, name) for name in "abc")
    states = [(one, 0, 7), (other, 1, 8), (two, 2, 7), (one, 3, 8), (two, 4, 7)]
    assert _waves(states) == [[(one, 0), (other, 1)], [(two, 2), (one, 3)], [(two, 4)]]
    assert _waves([]) == []


WRONG = {
    "start: (": r"^the grammar is refused \(.*Expected token '\)'.*\): mend it$",
    "": "refused",
    "{}": "missing field `grammars`",
    json.dumps({"grammars": [{"json_schema": {"type": "array", "uniqueItems": True}}]}): "uniqueItems",
    json.dumps({"grammars": [{"json_schema": {"$ref": "http://127.0.0.1:1/x.json"}}]}): "is not present in a registry",
    json.dumps({"grammars": [{"json_schema": {"$ref": "file:///etc/hostname"}}]}): "is not present in a registry",
    'start: "\u00e9"': "refused",  # no id spells it
    "start: /"
    + "a" * MOST_CHARACTERS
    + "/": rf"has {MOST_CHARACTERS + 9} characters, and may have {MOST_CHARACTERS}: ",
}


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_no_grammar_is_refused(grammars: Grammars, number: int) -> None:
    grammar, message = [*WRONG.items()][number]
    for _ in range(2):  # a refusal is not remembered as a success
        with pytest.raises(UserError, match=message):
            grammars.matcher(grammar)


def test_most_of_it_shows_without_a_vocabulary() -> None:
    for grammar, message in WRONG.items():
        if "\u00e9" in grammar:
            check_grammar(grammar)
        else:
            with pytest.raises(UserError, match=message):
                check_grammar(grammar)
    check_grammar('start: "ab" | "ac"')


def doubled(keyword: str, times: int) -> Any:
    """Each definition has the next one twice."""
    refs = {f"a{n}": {keyword: [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(times)}
    return {"$ref": "#/$defs/a0", "$defs": {**refs, f"a{times}": {"type": "integer"}}}


COSTLY: dict[str, Any] = {
    "many properties": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}},
    "a large enum": {"enum": [f"value {n}" for n in range(6000)]},
    "nested repeats": {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
    "an expensive intersection": {"type": "string", "allOf": [{"pattern": f".*{c}.*"} for c in "abcdefghijklmn"]},
    "allOf that doubles": doubled("allOf", 25),
    "anyOf that doubles": doubled("anyOf", 25),
    "cases that multiply": {
        "allOf": [{"anyOf": [{"properties": {f"p{n}": {"const": v}}} for v in (1, 2)]} for n in range(14)]
    },
    "deep": json.loads('{"type":"array","items":' * 100 + "{}" + "}" * 100),
}


@pytest.mark.parametrize("case", COSTLY)
def test_what_a_grammar_may_cost_is_bounded(grammars: Grammars, case: str) -> None:
    """Refused or not, it takes no ten seconds of a processor; unbounded, these would take hours, or all memory."""
    begin = time.process_time()
    try:
        matcher = grammars.matcher(json.dumps({"grammars": [{"json_schema": COSTLY[case]}]}))
        for _ in range(5):
            (allowed,) = masks(grammars, [matcher])
            if not matcher.failure:
                matcher.take(allowed[0])
    except UserError as error:
        assert "refused" in str(error)
    assert time.process_time() - begin < 10


def test_a_failure_without_words_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = Grammars(vocabulary()), list[str]()

    def fails(grammar: str) -> None:
        raise MemoryError

    monkeypatch.setattr(found, "_compile", fails)
    found.hold("start: /a/", told.append)
    found.compilers.shutdown(wait=True)
    assert told == ["MemoryError"]


def test_a_failure_later_is_told(grammars: Grammars) -> None:
    """Nothing can follow: no id spells what has to come."""
    matcher = grammars.matcher('start: "ab" "\u00e9"')
    for token in (65, 66):
        masks(grammars, [matcher])
        assert not matcher.failure
        matcher.take(token)
    masks(grammars, [matcher])
    assert matcher.failure and "\n" not in matcher.failure and len(matcher.failure) <= 200


@pytest.mark.parametrize("draft", [(65, 66, EOS), (65, 67), (65, 66, 20)])
def test_a_draft_that_comes_brings_its_masks_failure(grammars: Grammars, draft: tuple[int, ...]) -> None:
    """The mask after the last token fails as it does without a draft: no sooner, and not for another draft."""
    matcher, word_GW = grammars.matcher('start: "ab" "\u00e9"'), torch.zeros(4, words(VOCAB), dtype=torch.int32)
    grammars.fill([(matcher, draft)], word_GW)
    assert not matcher.failure
    matcher.take(65)
    assert not matcher.failure
    matcher.take(66)
    assert bool(matcher.failure) == (draft[1] == 66)
    masks(grammars, [matcher])
    assert matcher.failure


def test_threads_may_ask_at_the_same_time(grammars: Grammars) -> None:
    """The one that serves fills masks while others submit requests with the same grammar, and with new ones."""
    wanted, found, stop = "start: /[a-f]{1,30}/", list[str](), threading.Event()

    def submit() -> None:
        number = 0
        while not stop.is_set():
            grammars.matcher(wanted)
            grammars.matcher(f"start: /[a-f]{{1,{number % 50 + 1}}}/")
            number += 1

    threads = [threading.Thread(target=submit) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        matcher, ids = grammars.matcher(wanted), list[int]()
        for _ in range(10):
            ids.append(masks(grammars, [matcher])[0][0])
            matcher.take(ids[-1])
        found.append(text(ids))
    stop.set()
    for thread in threads:
        thread.join(20)
    assert set(found) == {"a" * 10}
