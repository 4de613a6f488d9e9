"""Logits that are not finite end the one request that has them; the error names all such requests at the end."""

from dataclasses import replace
from math import nan
from typing import Any
from unittest import mock

from fake_model import EOS, FakeCache, FakeModel, expected, logits_of, some_requests
from loading import rank_of

from epmoe.engine.config import EngineConfig
from epmoe.engine.diagnose import NotFinite
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, Result, SamplingParams

BAD = 7  # the logits of whatever has this token in it are no numbers


def run(requests: list[Request], stop: tuple[int, int] | None = None) -> tuple[NotFinite | None, dict[int, Result]]:
    """What is raised, and what came of each request; `stop` is the token at which a request is ended."""
    held: Any = FakeCache()
    model: Any = FakeModel()
    engine = Engine(model, held, rank_of(0, 1), EngineConfig(eos_ids=[EOS], max_batch=3))
    finished: dict[int, Result] = {}
    told = None
    with mock.patch("fake_model.logits_of", lambda tokens: logits_of(tokens) * (nan if BAD in tokens else 1)):
        try:
            engine.generate(requests, lambda index, token: (index, token) == stop, finished.__setitem__)
        except NotFinite as error:
            told = error
    assert not engine.busy and not held.pages.held and not engine.failed
    return told, finished


def test_a_request_that_fails_harms_no_other() -> None:
    """In its prompt or later, among others that wait and run."""
    requests = [
        replace(each, ids=(*each.ids, BAD)) if n in (1, 6) else each for n, each in enumerate(some_requests(40))
    ]
    wanted = [expected(each) for each in requests]
    bad = [n for n, each in enumerate(requests) if BAD in (*each.ids, *wanted[n][0][:-1])]
    assert any(BAD not in requests[n].ids for n in bad) and 2 < len(bad) < 20  # some fail while they decode
    told, finished = run(requests)
    assert told is not None and told.prompts == tuple(n + 1 for n in bad)
    for n, (ids, reason) in enumerate(wanted):
        if n in bad:
            until = 0 if BAD in requests[n].ids else ids.index(BAD) + 1
            assert (finished[n].ids, finished[n].finish_reason) == (ids[:until], "error")
        else:
            assert (finished[n].ids, finished[n].finish_reason) == (ids, reason)
    first = len(requests[bad[0]].ids) + len(finished[bad[0]].ids) - 1
    assert f"not finite at position {first} of prompt {bad[0] + 1} (nor are those of {bad[1] + 1}" in str(told)


def test_what_comes_after_a_stop_is_no_failure() -> None:
    """The step after it was launched before the host had seen the token."""
    request = next(each for each in some_requests(2000) if BAD in expected(each)[0][:-1] and BAD not in each.ids)
    ids = expected(request)[0]
    request = Request(request.ids, SamplingParams(max_new_tokens=ids.index(BAD) + 3))
    beside = next(each for each in some_requests(99) if len(expected(each)[0]) == 20 and BAD not in expected(each)[0])
    told, finished = run([request, beside])
    assert told is not None and finished[0].finish_reason == "error"
    told, finished = run([request, beside], (0, BAD))
    assert told is None and (finished[0].ids, finished[0].finish_reason) == (ids[: ids.index(BAD) + 1], "stop")


def test_many_prompts_are_one_line() -> None:
    told = NotFinite(range(1, 9), 4, "it is here")
    assert "position 4 of prompt 1 (nor are those of 2, 3, 4, 5, 6 and 2 more); it is here: the checkpoint" in str(told)
    assert "of prompt 11 (nor are those of 12)" in str(NotFinite([1, 2], 4, "x").numbered([11, 12]))
    assert "of prompt 3; x: " in str(NotFinite([3], 4, "x"))
