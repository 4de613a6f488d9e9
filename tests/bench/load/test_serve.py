"""The service under load: every request is answered as `generate` answers it, whenever it comes; times are in order."""

import sys
from typing import Any

import pytest
from spawn import run_ranks

from epmoe.bench.lengths import read_lengths
from epmoe.bench.load.callers import Served
from epmoe.bench.load.schedule import Traffic, conversations_of, schedule
from epmoe.bench.load.serve import Timed, serve
from epmoe.config.compose import from_keys
from epmoe.config.schema import Serve
from epmoe.engine.request import Finished
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks

COUNT = 9
TRAFFIC = Traffic(COUNT, 1, read_lengths("a", "uniform:1:40"), read_lengths("b", "uniform:1:9"))
TURNS = Traffic(COUNT, 3, read_lengths("a", "uniform:9:25"), read_lengths("b", "uniform:1:9"))
BOUNDS = Serve(queue_requests=sys.maxsize, step_tokens=32)


def loaded(ranks: Ranks, **keys: Any) -> LLM:
    llm = LLM.opened(from_keys({"checkpoint": "", "runtime": {"device": "cpu", "max_batch": 5, **keys}}), ranks)
    llm.load()
    return llm


def served(ranks: Ranks, kind: str, traffic: Traffic) -> tuple[dict[int, Any], list[Served], float, int]:
    """By a request's id its prompt and answer; what its caller saw; a turn's cost; what is wrong."""
    llm = loaded(ranks)
    due = schedule(traffic, 40.0, 2)
    conversations = conversations_of(due, llm.architecture.vocab, 0)
    answers: dict[int, Any] = {}
    step, add = llm.engine.step, llm.engine.add

    def stepped() -> list[Any]:
        events = step()
        for event in events:
            if isinstance(event, Finished):
                answers[event.id] = (*answers[event.id], event.result.ids)
        return list(events)

    def added(request: Any) -> int:
        id = add(request)
        answers[id] = request.ids, request.params
        return id

    llm.engine.step, llm.engine.add = stepped, added  # type: ignore[method-assign]
    llm.control = control = Timed(ranks, 60)
    at_s = [each.at_s for each in due] if kind == "poisson" else None
    found = serve(llm, Service(llm.engine, BOUNDS), conversations, at_s, 3)
    llm.engine.step, llm.engine.add = step, add  # type: ignore[method-assign]
    assert not llm.engine.busy and llm.cache.pages.unused
    cost_us = control.cost_us()
    wrong = sum(llm.generate([list(ids)], params)[0].ids != said for ids, params, said in answers.values())
    return answers, found, cost_us, wrong


# Each of traffic, ranks and kind; all of them together where there is time.
LOADS = [(TRAFFIC, 1, "concurrent"), (TURNS, 2, "poisson")]
REST = [
    *((TRAFFIC, 1, "poisson"), (TRAFFIC, 2, "concurrent"), (TRAFFIC, 2, "poisson")),
    *((TURNS, 1, "concurrent"), (TURNS, 1, "poisson"), (TURNS, 2, "concurrent")),
]


@pytest.mark.parametrize(
    ("traffic", "ranks", "kind"),
    [*LOADS, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST)],
    ids=lambda value: f"{value.turns} turns" if isinstance(value, Traffic) else str(value),
)
def test_every_request_is_answered(traffic: Traffic, ranks: int, kind: str) -> None:
    by_rank = run_ranks(served, ranks, kind, traffic)
    lengths = sorted(length for each in schedule(traffic, 40.0, 2) for length in each.turns)
    for answers, found, cost_us, wrong in by_rank:
        assert answers == by_rank[0][0] and wrong == 0 and 0 < cost_us < 1e6
        assert bool(found) == (found is by_rank[0][1])  # rank 0 alone hears of it
    answers, found, *_ = by_rank[0]
    assert len(answers) == COUNT and sorted(len(each.token_s) for each in found) == sorted(each for _, each in lengths)
    assert sorted(each.prompt_tokens for each in found) == sorted(len(ids) for ids, *_ in answers.values())
    assert all(each.first_s > 0 and min(each.between_s, default=1) >= 0 for each in found)
    assert not any(each.cached_tokens for each in found if each.turn == 0)
    assert all(each.cached_tokens < each.prompt_tokens - 8 for each in found if each.turn)  # 9 are new at least
    assert (max(each.cached_tokens for each in found) >= 32) == (traffic is TURNS)


def test_numbers_that_are_none_are_told() -> None:
    """Of the request alone the service would say "error"; a benchmark has nothing to measure then."""
    with LLM("", runtime={"device": "cpu"}) as llm:
        conversations = conversations_of(schedule(TRAFFIC, None, 0), llm.architecture.vocab, 1)
        llm.model.get_parameter("norm.weight").fill_(float("nan"))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="logits of a request are not finite"):
            serve(llm, Service(llm.engine, BOUNDS), conversations, None, 2)
        assert not llm.engine.busy


def test_an_engine_that_fails_ends_the_callers() -> None:
    def broken() -> list[Any]:
        raise RuntimeError("the device is gone")

    with LLM("", runtime={"device": "cpu"}) as llm:
        llm.engine.step = broken  # type: ignore[method-assign]
        conversations = conversations_of(schedule(TRAFFIC, None, 0), llm.architecture.vocab, 1)
        with pytest.raises(RuntimeError, match="the device is gone"):
            serve(llm, Service(llm.engine, BOUNDS), conversations, None, 2)
