"""Log-probabilities of prompts' tokens: those of the whole sequence's logits, once each, in bounded memory.

On the fake model, whose logits are a function of all tokens so far; tests/whole/test_prompt_logprobs.py has a real one.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_model import EOS, FakeCache, FakeModel, expected, logits_of, outputs, some_requests
from loading import rank_of

from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.graphs import Kind
from epmoe.engine.ragged import Ragged
from epmoe.engine.request import Finished, Request, SamplingParams, Token, TokenLogprobs, Workload, choices
from epmoe.engine.sequence import Sequence
from epmoe.errors import UserError


class Counted(FakeModel):
    """Keeps how many rows of logits were asked for at a time, and fails where it is to."""

    def __init__(self, broken: int = -1) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.broken = broken

    def logits(self, norm_O1: torch.Tensor, part: Any) -> torch.Tensor:
        self.rows.append(len(norm_O1))
        logits_OV = super().logits(norm_O1, part)
        for row, number in enumerate(norm_O1[:, 0].tolist()):
            if len(self.outputs[int(number)]) == self.broken:
                logits_OV[row] = torch.nan
        return logits_OV


def engine(cache: FakeCache | None = None, model: FakeModel | None = None, **limits: Any) -> Engine:
    held: Any = cache or FakeCache()
    made: Any = model or FakeModel()
    return Engine(made, held, rank_of(0, 1), EngineConfig(eos_ids=[EOS], **limits))


def asked(count: int, seed: int = 0, **params: Any) -> list[Request]:
    """Every fourth does not ask; the others for 0, 1 and 2 likely tokens. Many begin alike."""
    return [
        replace(
            each,
            ids=(*range(9), *each.ids)[number % 2 * 9 :],
            params=replace(each.params, prompt_logprobs=(None, 0, 1, 2)[number % 4], **params),
        )
        for number, each in enumerate(some_requests(count, seed))
    ]


def reference(request: Request) -> tuple[TokenLogprobs | None, ...]:
    """By hand: log softmax in float64 of each beginning's logits."""
    count = request.params.prompt_logprobs
    if count is None:
        return ()
    found: list[TokenLogprobs | None] = [None]
    for place in range(1, len(request.ids)):
        raw_V = logits_of(list(request.ids[:place])).double().log_softmax(0)
        value, id = raw_V.sort(descending=True, stable=True)
        top = tuple(zip(id[:count].tolist(), value[:count].tolist(), strict=True))
        found.append(TokenLogprobs(raw_V[request.ids[place]].item(), top))
    return tuple(found)


def close(found: Any, wanted: Any) -> bool:
    """The sampler's normaliser is a sum of integers, in units of 2^-40."""
    if None in (found, wanted):
        return found is wanted
    return (
        [id for id, _ in found.top] == [id for id, _ in wanted.top]
        and found.chosen == pytest.approx(wanted.chosen, abs=1e-9)
        and [value for _, value in found.top] == pytest.approx([value for _, value in wanted.top], abs=1e-9)
    )


LIMITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the cache, of the engine
    "one at a time": ({}, {"max_batch": 1}),
    "chunks of one token": ({}, {"prefill_chunk": 1}),
    "chunks that cut prompts": ({}, {"prefill_chunk": 7, "max_batch": 5}),
    "a row of logits at a time": ({}, {"score_rows": 1}),
    "put back": ({"tokens": 90}, {"prefill_chunk": 7}),
    "put back, nothing found": ({"tokens": 90, "prefix_cache": False}, {"prefill_chunk": 16}),
    "pages of one": ({"tokens": 90, "page": 1}, {"prefill_chunk": 5, "max_batch": 9}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=pytest.mark.slow) if each == "chunks of one token" else each for each in LIMITS]
)
def test_the_bits_follow_from_the_prompt_alone(case: str) -> None:
    requests, (sizes, limits) = asked(40, max_new_tokens=30), LIMITS[case]
    tested = engine(FakeCache(**sizes), **limits)
    (lane,) = tested.scheduler.lanes
    put_back, half_way = lane._put_back, []

    def counted(sequence: Sequence) -> None:
        half_way.append(sequence.scored > 0 and sequence.unscored > 0)
        put_back(sequence)

    lane._put_back = counted  # type: ignore[method-assign]
    plain = engine(max_batch=64, prefill_chunk=4096).generate(requests)
    for _ in range(2):  # again, with what the first time has left in the cache
        results = tested.generate(requests)
        assert outputs(results) == [expected(request) for request in requests]
        assert [each.prompt_logprobs for each in results] == [each.prompt_logprobs for each in plain]
    assert (len(half_way) > 3) == ("put back" in case or "pages" in case)
    assert any(half_way) == (case == "pages of one")  # while its prompt was being scored
    for request, result in zip(requests, plain, strict=True):
        wanted = reference(request)
        assert len(result.prompt_logprobs) == len(wanted)
        assert all(map(close, result.prompt_logprobs, wanted))


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("chunk", [16, 4096])
def test_logits_are_made_of_few_rows_at_a_time(rows: int, chunk: int) -> None:
    """However long the prompts are, and the step; of the next tokens there are as many rows as sequences."""
    model = Counted()
    params = SamplingParams(max_new_tokens=2, prompt_logprobs=1)
    requests = [Request(tuple(range(90)) * 4, params), Request(tuple(range(70)), params)]
    engine(model=model, prefill_chunk=chunk, score_rows=rows).generate(requests)
    limit = min(rows, chunk, 359 + 69)
    assert limit <= max(model.rows) <= max(limit, 2) and sum(model.rows) >= 359 + 69


@torch.inference_mode()
def test_steps_of_others_have_the_same_outputs() -> None:
    """Who does not ask makes no rows more, and a step without one who does is a graph's."""
    params = SamplingParams(max_new_tokens=3)
    plain, scored = Request((5, 6, 7), params), Request((5, 6, 8, 9), replace(params, prompt_logprobs=0))
    pieces = []
    for number, request in enumerate((plain, scored)):
        sequence = Sequence(number, request, 9, 0.0, handle=number, cached=1)
        sequence.scored = 1
        pieces.append((sequence, len(request.ids) - 1))
    (one, _), (other, _) = pieces
    ragged = Ragged.of([], pieces)
    assert ragged.outputs == [1, 4] and ragged.scored == [2, 3] and ragged.scores == [(other, range(2, 4))]
    assert Ragged.of([], [(one, 2)]).scores == [] == Ragged.of([], [(one, 2)]).scored
    launcher: Any = engine().graphs
    ran: list[Any] = []
    launcher.graphs[kind := Kind("prompts", 16, None)] = None
    launcher.bodies["prompts"].append(16)
    launcher._run, launcher.static.run = ran.append, lambda *_: ran.append("run")
    launcher.ragged(Ragged.of([], [(one, 2)]))
    launcher.ragged(ragged)
    assert ran == [kind, "run"]


def test_a_step_that_ends_no_prompt_may_be_scored() -> None:
    """They come with the last piece at the latest, before the first token, which brings them."""
    request = Request(tuple(range(30)), SamplingParams(max_new_tokens=3, ignore_eos=True, prompt_logprobs=0))
    tested = engine(prefill_chunk=4)
    id = tested.add(request)
    found: list[Any] = []
    while tested.busy:
        sequence = tested.scheduler.find(id)
        found += tested.step()
        assert sequence is None or len(sequence.prompt_logprobs) <= sequence.scored <= sequence.cached
    first, *rest, last = found
    assert isinstance(first, Token) and isinstance(last, Finished)
    assert first.prompt_logprobs == last.result.prompt_logprobs and len(first.prompt_logprobs) == 30
    assert [each.prompt_logprobs for each in rest] == [(), ()]


def test_pages_are_left_for_others_and_not_taken() -> None:
    cache, ids = FakeCache(), tuple(range(40))
    scored = Request(ids, SamplingParams(max_new_tokens=1, prompt_logprobs=1))
    tested = engine(cache)
    assert [tested.scheduler.found(each) for each in (scored, Request(ids, SamplingParams()))] == [0, 0]
    for _ in range(2):
        before = cache.fed
        assert tested.generate([scored])[0].cached_tokens == 0 and cache.fed - before == 40
    assert [tested.scheduler.found(each) for each in (scored, Request(ids, SamplingParams()))] == [0, 36]
    assert tested.generate([Request(ids, SamplingParams(max_new_tokens=1))])[0].cached_tokens == 36


def test_an_abort_has_what_has_come() -> None:
    request = Request(tuple(range(30)), SamplingParams(max_new_tokens=3, prompt_logprobs=0))
    tested = engine(prefill_chunk=8)
    id = tested.add(request)
    for _ in range(3):
        tested.step()
    result = tested.abort(id)
    assert result is not None and 1 < len(result.prompt_logprobs) < 30
    assert all(map(close, result.prompt_logprobs, reference(request)))
    assert not tested.busy and tested.step() == []


def test_the_shortest_prompt_and_no_answer() -> None:
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
    requests = [Request(ids, params) for ids in ((3,), (3, 4), tuple(range(50)))]
    for result, request in zip(engine(prefill_chunk=7).generate(requests), requests, strict=True):
        assert (result.ids, result.finish_reason, result.first_token_s) == ((), "length", 0)
        assert len(result.prompt_logprobs) == len(request.ids) and result.prompt_logprobs[0] is None
        assert all(map(close, result.prompt_logprobs, reference(request)))
    (longest,) = engine().generate([Request((1,) * 399, params)])
    assert len(longest.prompt_logprobs) == 399


def test_numbers_that_are_none_end_the_request() -> None:
    """Also where only a prompt's logits are none: the others go on, and what came before is told."""
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, prompt_logprobs=1)
    tested = engine(model=Counted(broken=12), prefill_chunk=5)
    ids = [tested.add(Request(tuple(range(count)), params)) for count in (4, 30)]
    found: dict[int, Any] = {}
    while tested.busy:
        found |= {event.id: event.result for event in tested.step() if isinstance(event, Finished)}
    assert [found[id].finish_reason for id in ids] == ["length", "error"]
    assert [len(found[id].prompt_logprobs) for id in ids] == [4, 12]


def test_of_several_answers_the_first_has_them() -> None:
    params = SamplingParams(n=3, temperature=1.0, prompt_logprobs=2, seed=4)
    assert [each.params.prompt_logprobs for each in choices([Request((1, 2), params)])] == [2, None, None]


def test_a_workload_knows_of_them() -> None:
    plain, scored = Request((1,), SamplingParams()), Request((1,), SamplingParams(prompt_logprobs=0))
    assert not Workload.of([plain], 4).prompt_logprobs and Workload.of([plain, scored], 4).prompt_logprobs
    model = Counted()
    tested = engine(model=model, prefill_chunk=64)
    load = Workload.of([Request((1,) * 50, scored.params)], 4)
    with torch.inference_mode():
        tested.warm.run(load, tested.warm.missing(load, 4, 0), 60)
    assert max(model.rows) == 49  # of its prompts all tokens are scored but the last


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt_logprobs": -1}, "prompt_logprobs=-1 is out of range: it takes a whole number from 0 to 100"),
    ({"prompt_logprobs": 101}, "prompt_logprobs=101 is out of range: it takes a whole number from 0 to 100"),
    ({"prompt_logprobs": 1.0}, "prompt_logprobs=1.0 is not a whole number"),
    ({"prompt_logprobs": True}, "prompt_logprobs=True is not a whole number"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range"),
    ({"max_tokens": -1, "prompt_logprobs": 1}, "max_new_tokens=-1 is out of range"),
    ({"max_tokens": False, "prompt_logprobs": 1}, "max_new_tokens=False is not a whole number"),
]


@pytest.mark.parametrize(("params", "message"), REFUSED)
def test_mistakes(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**params)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_values_travel_and_settle() -> None:
    for params in (SamplingParams(max_tokens=0, prompt_logprobs=0), SamplingParams(prompt_logprobs=3)):
        request = Request((1, 2), params)
        assert Request.of_json(request.to_json()) == request
        assert request.params.prompt_logprobs == params.prompt_logprobs and request.params.top_p == 1.0
    assert SamplingParams().over(SamplingParams(prompt_logprobs=2)).prompt_logprobs == 2
    settled = SamplingParams().settled()
    assert settled.settled() is settled and settled.prompt_logprobs is None
