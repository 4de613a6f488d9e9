"""The engine with drafts on the fake model: the tokens of plain decoding in fewer steps, whatever is drafted.

A fake model that remembers few tokens repeats itself, as a copy or a table does. `corrupted` makes drafts that are
right or wrong anywhere, so that every way in which a draft can end comes up.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafting import draft_wrongly, try_some
from fake_model import EOS, VOCAB, FakeCache, FakeModel, outputs, some_requests
from loading import rank_of

from epmoe.cache.pages import Pages
from epmoe.engine.config import EngineConfig
from epmoe.engine.diagnose import NotFinite
from epmoe.engine.drafts import MOST_DRAFT, Costs, Drafting, History, Modelled, most_rows
from epmoe.engine.engine import Engine
from epmoe.engine.request import Finished, Request, Result, SamplingParams, Token
from epmoe.engine.sequence import Sequence as Running
from epmoe.engine.sequence import Work
from epmoe.engine.speculation import Speculation

COSTS = Costs.of(num_experts=32, top_k=4)


def engine(model: FakeModel, cache: Any = None, drafts: Costs | None = COSTS, **limits: Any) -> Engine:
    config = EngineConfig(eos_ids=[EOS], drafts=drafts, **limits)
    held: Any = cache or FakeCache()
    tested: Any = model
    return Engine(tested, held, rank_of(0, 1), config)


def looping(count: int, **params: Any) -> list[Request]:
    """Requests whose answers come to repeat themselves."""
    asked = some_requests(count, **params)
    long = SamplingParams(max_new_tokens=80, ignore_eos=True, **params)
    return [*asked, *(Request(each.ids, long) for each in asked[: count // 2])]


@pytest.fixture
def corrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sequence drafts, any number of tokens, each of them wrong now and then."""
    dice = random.Random(3)
    try_some(monkeypatch, dice)
    draft_wrongly(monkeypatch, dice, VOCAB, 0.8)


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.1},
    "top_p, penalties": {"temperature": 0.2, "top_p": 0.5, "repetition_penalty": 1.02, "frequency_penalty": 0.02},
    "bias, allowed": {"logit_bias": {3: 2.0}, "allowed_token_ids": tuple(range(0, 60))},
    "log-probabilities": {"temperature": 0.1, "logprobs": 3, "prompt_logprobs": 2},
}


def plain(model: Callable[[], FakeModel], requests: list[Request]) -> list[Result]:
    return engine(model(), drafts=None).generate(requests)


def same(found: list[Result], wanted: list[Result]) -> None:
    assert outputs(found) == outputs(wanted)
    assert [each.logprobs for each in found] == [each.logprobs for each in wanted]
    assert [each.prompt_logprobs for each in found] == [each.prompt_logprobs for each in wanted]


@pytest.mark.parametrize("case", CASES)
def test_fewer_steps_and_the_same_answers(case: str) -> None:
    requests = looping(12, **CASES[case])
    model, without = FakeModel(memory=1), FakeModel(memory=1)
    held = FakeCache()
    tested = engine(model, held)
    same(tested.generate(requests), engine(without, drafts=None).generate(requests))
    assert len(model.steps) < len(without.steps)
    speculation = tested.scheduler.speculation
    assert speculation
    drafting = speculation.drafting
    assert drafting.accepted > 100
    assert held.empty()


@pytest.mark.usefixtures("corrupted")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({}, id="all"),
        pytest.param({"max_batch": 1}, id="one", marks=pytest.mark.slow),
        pytest.param({"max_batch": 5, "prefill_chunk": 7}, id="few in chunks"),
        pytest.param({"prefill_chunk": 3}, id="chunks", marks=pytest.mark.slow),
    ],
)
def test_wrong_drafts_change_nothing(case: str, limits: dict[str, Any]) -> None:
    requests = looping(10, **CASES[case])
    tested = engine(FakeModel(memory=1), **limits)
    same(tested.generate(requests), plain(lambda: FakeModel(memory=1), requests))
    speculation = tested.scheduler.speculation
    assert speculation
    drafting = speculation.drafting
    assert drafting.drafted - 100 > drafting.accepted > 0


@pytest.mark.usefixtures("corrupted")
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_who_is_put_back_and_who_finds_a_prefix(prefix_cache: bool) -> None:
    """A cache of few pages: nobody is put back for a draft's sake, and what a draft has written is nobody's prefix."""
    requests = looping(10) * 2
    cache = FakeCache(tokens=160, prefix_cache=prefix_cache)
    tested = engine(FakeModel(memory=2), cache)
    same(tested.generate(requests), plain(lambda: FakeModel(memory=2), requests))
    assert tested.scheduler.put_back and cache.empty()


@pytest.mark.usefixtures("corrupted")
def test_a_listener_ends_an_answer_within_a_draft() -> None:
    """What came behind the token is nobody's: as without drafts, where it has not come."""
    requests = looping(8, logprobs=2)

    def ended(tested: Engine) -> list[Result]:
        seen: dict[int, int] = {}

        def on_token(request: int, token: int) -> bool:
            seen[request] = seen.get(request, 0) + 1
            return seen[request] == 3 + request % 7

        results = tested.generate(requests, on_token)
        assert all(count <= 3 + request % 7 for request, count in seen.items())
        return results

    found = ended(engine(FakeModel(memory=1)))
    same(found, ended(engine(FakeModel(memory=1), drafts=None)))
    assert "stop" in {each.finish_reason for each in found}


class Broken(FakeModel):
    """Its logits are not finite behind a token."""

    token = -1

    def logits(self, norm_O1: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
        logits_OV = super().logits(norm_O1, part)
        broken_O = [self.outputs[int(number)][-1] == self.token for number in norm_O1[:, 0]]
        return logits_OV.masked_fill(torch.tensor(broken_O)[:, None], torch.nan)


def test_what_is_not_finite_behind_a_listeners_end_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came with the token that ended the answer, by a draft; without one it would not have come."""
    asked = [Request((1, 2), SamplingParams(max_new_tokens=12, ignore_eos=True))]
    ((ids, _),) = outputs(plain(FakeModel, asked))
    monkeypatch.setattr(Drafting, "allot", lambda self, drafters, rows, room: [most for _, most in drafters])
    monkeypatch.setattr(History, "draft", lambda self, most: list(ids[self.count - 2 :][:most]))

    def ended(drafts: Costs | None, at: int) -> list[tuple[tuple[int, ...], str]]:
        model = Broken()
        model.token = ids[5]
        return outputs(engine(model, drafts=drafts).generate(asked, lambda request, token: token == ids[at]))

    assert ids.index(ids[5]) == 5
    assert ended(COSTS, 4) == ended(None, 4) == [(ids[:5], "stop")]
    for drafts in (None, COSTS):
        with pytest.raises(NotFinite):
            ended(drafts, 6)


@pytest.mark.usefixtures("corrupted")
@torch.inference_mode()
def test_requests_that_come_and_go() -> None:
    """Added and aborted between steps; the tokens of those that stay are those of each alone."""
    requests, chance = looping(12), random.Random(1)
    tested = engine(FakeModel(memory=2), max_batch=6)
    wanted = outputs(plain(lambda: FakeModel(memory=2), requests))
    told: dict[int, list[int]] = {}
    ended: dict[int, Result] = {}
    waiting, gone = list(enumerate(requests)), set()
    while waiting or tested.busy:
        if waiting and chance.random() < 0.4:
            number, request = waiting.pop(0)
            assert tested.add(request) == number
        for event in tested.step():
            if isinstance(event, Token):
                told.setdefault(event.id, []).append(event.token)
            if isinstance(event, Finished):
                ended[event.id] = event.result
        if told and chance.random() < 0.05:
            number = chance.choice(list(told))
            if tested.abort(number):
                gone.add(number)
    assert gone and len(ended) + len(gone) == len(requests)
    for number, result in ended.items():
        assert (result.ids, result.finish_reason) == wanted[number]
        assert [*told.get(number, []), *result.ids[len(told.get(number, [])) :]] == list(result.ids)


def test_drafts_end_where_an_answer_must() -> None:
    """Neither beyond max_new_tokens nor beyond the model's positions; each step's rows have room."""
    model = FakeModel(memory=1, max_positions=50)
    tested = engine(model)
    asked = [Request((1, 2, 3), SamplingParams(max_new_tokens=count, ignore_eos=True)) for count in (1, 2, 9, 300)]
    found = tested.generate(asked)
    assert [len(each.ids) for each in found] == [1, 2, 9, 47]
    assert all(len(step.sequence_B) <= (1 + MOST_DRAFT) * 4 for step in model.steps)
    assert max(int(step.position_T.max()) for step in model.steps) == 48


@torch.inference_mode()
def test_nobody_waits_for_drafts_that_have_no_room() -> None:
    """Beside a prompt in a full batch there are none: the next step is launched before the last one's ids are read."""
    tested = engine(FakeModel(memory=1), max_batch=2, prefill_chunk=4)
    long = SamplingParams(max_new_tokens=200, ignore_eos=True)
    tested.add(Request((1, 2, 3), long))
    speculation = tested.scheduler.speculation
    assert speculation
    waits: dict[bool, list[bool]] = {True: [], False: []}  # by whether a prompt is there
    while tested.busy:
        running = tested.scheduler.running
        waits[any(each.pending for each in running)].append(speculation.soon(running))
        if len(waits[False]) == 40:
            tested.add(Request(tuple(range(90)), replace(long, max_new_tokens=1)))
        tested.step()
    assert len(waits[True]) > 15 and not any(waits[True]) and sum(waits[False][40:]) > 5


def test_a_draft_model_is_not_asked_where_no_draft_pays() -> None:
    """It goes over the step all the same, since fewer may run later; the next step waits for none of its words."""
    for rows in (64, 256):
        pages = Pages({None: 600}, 16, rows, most=160)
        speculation = Speculation(pages, Drafting(COSTS, most_rows(rows), Modelled, depth=4), rows)
        running = [Running(n, Request((1, 2, 3), SamplingParams()), 100, 0.0, pages.admit()[0]) for n in range(rows)]
        for each in running:
            each.cached = pages.grow(each.handle, 0, 3)
        work = Work(running, [], [])
        speculation.add_to(work)
        assert work.modelled and len(work.told) == (rows if rows == 64 else 0)


@pytest.mark.usefixtures("corrupted")
def test_more_rows_with_drafts_than_a_graph_of_prompts_has_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many may run at a time, few do, and all of these draft as much as they may."""
    monkeypatch.setattr(Drafting, "allot", lambda self, drafters, rows, room: [most for _, most in drafters])
    requests = [Request((n % 90, 5), SamplingParams(max_new_tokens=18, ignore_eos=True)) for n in range(150)]
    model = FakeModel(memory=1)
    tested = engine(model, FakeCache(sequences=2400), max_batch=2400)
    same(tested.generate(requests), plain(lambda: FakeModel(memory=1), requests))
    assert max(len(step.sequence_B) for step in model.steps) > tested.preparation.most.tokens == 2048


def test_nothing_to_draft_is_plain_decoding() -> None:
    """Answers that never repeat themselves: the same steps, launched before the last one's ids are read."""
    requests = [Request((n, n + 1), SamplingParams(max_new_tokens=60, ignore_eos=True)) for n in range(4)]
    model, without = FakeModel(), FakeModel()
    tested = engine(model)
    same(tested.generate(requests), engine(without, drafts=None).generate(requests))
    speculation = tested.scheduler.speculation
    assert speculation
    drafting = speculation.drafting
    assert drafting.drafted == 0 and model.batches() == without.batches()
