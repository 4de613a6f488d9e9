"""The engine on a fake model: scheduling, ends of requests, admission; tokens never depend on a request's neighbours.

The fake model keeps, for each cache handle, the tokens it was fed, and computes logits from all of them. So a chunk
that is dropped, fed twice or fed to another sequence changes the output.
"""

import io
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_model import EOS, VOCAB, FakeCache, FakeModel, expected, logits_of, outputs, some_requests
from loading import rank_of
from spawn import run_ranks

from epmoe.engine.config import EngineConfig, resolve_chunk
from epmoe.engine.engine import Engine
from epmoe.engine.request import Finished, Request, Result, SamplingParams, Token, Workload
from epmoe.errors import UserError
from epmoe.ranks.mesh import Ranks

ONE = rank_of(0, 1)


def engine(model: FakeModel | None = None, cache: Any = None, **limits: Any) -> Engine:
    held: Any = cache or FakeCache()
    made: Any = model or FakeModel()
    return Engine(made, held, ONE, EngineConfig(eos_ids=[EOS], **limits))


LIMITS = {
    "one at a time": {"max_batch": 1},
    "chunks of one token": {"prefill_chunk": 1},
    "chunks that cut prompts": {"prefill_chunk": 7, "max_batch": 5},
    "all at once": {"prefill_chunk": 4096, "max_batch": 64},
}


@pytest.mark.parametrize("case", LIMITS)
def test_batches_and_chunks_do_not_change_the_tokens(case: str) -> None:
    requests = some_requests(24)
    model = FakeModel()
    results = engine(model, None, **LIMITS[case]).generate(requests)
    assert outputs(results) == [expected(request) for request in requests]
    assert {reason for _, reason in outputs(results)} == {"eos", "length"}  # the cases cover both
    for step in model.prefills():
        assert step.spans and sum(end - begin for begin, end, *_ in step.spans) <= LIMITS[case].get(
            "prefill_chunk", 2048
        )
        assert len(step.sequence_B) + len(step.spans) <= LIMITS[case].get("max_batch", 64)
    assert max(model.batches()) <= LIMITS[case].get("max_batch", 64)


def test_a_chunk_follows_the_kind_of_device() -> None:
    assert [resolve_chunk(0, torch.device(name)) for name in ("cpu", "cuda", "cuda:1")] == [2048, 16384, 16384]
    assert resolve_chunk(5, torch.device("cpu")) == resolve_chunk(5, torch.device("cuda")) == 5
    assert engine().prefill_chunk == 2048


def test_sampled_tokens_do_not_depend_on_the_batch() -> None:
    requests = some_requests(16, temperature=1.0, top_p=0.9, repetition_penalty=1.2)
    together = outputs(engine().generate(requests))
    assert together == outputs(engine(max_batch=1).generate(requests))
    assert together == outputs(engine(cache=FakeCache(tokens=80), prefill_chunk=3).generate(requests))
    backwards = outputs(engine().generate(requests[::-1]))
    assert together == backwards[::-1]


def test_sequences_join_a_running_batch() -> None:
    """Continuous: a short request's place is taken while a long one still runs."""
    model = FakeModel()
    lengths = [40, 2, 2, 2, 2]
    requests = [Request((1, 2, n), SamplingParams(max_new_tokens=k, ignore_eos=True)) for n, k in enumerate(lengths)]
    engine(model, max_batch=2).generate(requests)
    # A place is free one step after its sequence's last one was launched, when the host has read its token.
    assert model.batches() == [2, 1, 1] * 4 + [1] * 27
    assert len(model.prefills()) == 4  # the first two share one


def test_a_step_has_decodes_and_a_piece_of_a_prompt() -> None:
    """A long prompt does not stop those that decode, nor they it."""
    model = FakeModel()
    short = Request((5,), SamplingParams(max_new_tokens=12, ignore_eos=True))
    long = Request(tuple(range(60)), SamplingParams(max_new_tokens=1))
    engine(model, prefill_chunk=10).generate([short, long])
    kinds = [(len(step.sequence_B), sum(end - begin for begin, end, *_ in step.spans or ())) for step in model.steps]
    assert kinds == [(0, 10), *[(1, 10)] * 5, (1, 1), *[(1, 0)] * 5]


def warm_up(tested: Engine, load: Workload) -> None:
    tested.warm.run(load, tested.warm.missing(load, tested.max_batch, 0), 60)


@pytest.mark.parametrize("order", [1, -1])
@torch.inference_mode()
def test_every_kind_of_prefill_is_run_beforehand(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tokens and by prompts of several tokens, up to the most that a step can have in any order of the requests: as
    many tokens of prompts as one may have, and those of all who decode beside them."""
    model = FakeModel()
    short, long = Request((7,), SamplingParams()), Request(tuple(range(60)), SamplingParams())
    requests = ([short] * 50 + [Request((3, 4, 5), SamplingParams())] * 40 + [long] * 2)[::order]
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    tested = engine(model, max_batch=20, prefill_chunk=100, progress=True)
    warm_up(tested, Workload.of(requests, 20))
    steps = model.prefills()
    assert {1, 2, 4, 8, 16, 32, 64, 120} | {3, 7, 15, 31, 63, 119} <= {len(step.token_T) for step in steps}
    assert max(len(step.token_T) for step in steps) == len(steps[0].token_T) == 120  # the most memory first
    several = {sum(end - begin > 1 for begin, end, *_ in step.spans or ()) for step in steps}
    assert {1, 2, 4, 8, 16, 20} <= several and max(several) == 20
    assert not tested.cache.pages.held
    assert "epmoe: prefills: " in terminal.getvalue() and f"/{len(steps)} " in terminal.getvalue()
    warm_up(tested, Workload.of(requests[::-1], 20))
    assert len(model.prefills()) == len(steps)  # once is enough


def test_steps_that_are_captured() -> None:
    """By what a load can lead to: all buckets up to the most; of requests that come at once the one that they need."""
    tested = engine(max_batch=20, prefill_chunk=100)
    assert tested.preparation.most.tokens == 128
    assert tested.preparation.totals(40, 3, at_once=True) == [64] and tested.preparation.totals(
        40, 3, at_once=False
    ) == [16, 32, 64]
    assert tested.preparation.totals(20, 20, at_once=True) == [128]  # room for twenty prompts
    assert tested.preparation.totals(500, 3, at_once=True) == []  # runs as it is
    assert tested.preparation.totals(500, 3, at_once=False) == [16, 32, 64, 128]


@torch.inference_mode()
def test_prefills_run_beforehand_are_as_large_as_any_later() -> None:
    """A cache that holds few requests with their new tokens may hold many prompts of others."""
    model = FakeModel()
    short = [Request(tuple(range(30)), SamplingParams(max_new_tokens=2, ignore_eos=True))] * 3
    long = Request(tuple(range(32)), SamplingParams(max_new_tokens=69, ignore_eos=True))
    tested = engine(model, cache=FakeCache(tokens=100), prefill_chunk=200)
    warm_up(tested, Workload.of([*short, long], 64))
    warm = max(len(step.token_T) for step in model.prefills())
    count = len(model.prefills())
    tested.generate([*short, long])
    later = [len(step.token_T) for step in model.prefills()[count:]]
    assert max(later) == 90 <= warm


def test_the_next_step_is_launched_before_the_last_ids_are_read() -> None:
    """The step after an end-of-text has been launched when it is read; its token is neither shown nor counted."""
    model = FakeModel()
    request = next(each for each in some_requests(40) if expected(each)[1] == "eos" and len(expected(each)[0]) > 4)
    shown: list[tuple[int, int]] = []  # token, steps that had been launched

    def on_token(index: int, token: int) -> bool:
        shown.append((token, len(model.steps)))
        return False

    (result,) = engine(model).generate([request], on_token)
    ids = expected(request)[0]
    assert result.ids == ids and shown == [(token, number + 2) for number, token in enumerate(ids[:-1])]
    assert len(model.steps) == len(ids) + 1


def test_no_step_is_launched_beyond_the_length() -> None:
    """It would need a position for which there may be no page; FakeCache.feed holds every step to that."""
    model = FakeModel()
    engine(model).generate([Request((1, 2), SamplingParams(max_new_tokens=7, ignore_eos=True))])
    assert len(model.steps) == 7


def test_full_cache_lets_requests_wait_in_order() -> None:
    cache = FakeCache(tokens=48)
    requests = [replace(r, params=replace(r.params, max_new_tokens=5)) for r in some_requests(20)]
    finished: list[int] = []
    results = engine(cache=cache).generate(requests, on_finish=lambda index, result: finished.append(index))
    assert outputs(results) == [expected(request) for request in requests]
    assert sorted(finished) == list(range(20))
    assert not cache.pages.held  # everything was given back


def test_pages_are_given_back_when_a_run_fails() -> None:
    cache = FakeCache()

    def fail(index: int, token: int) -> bool:
        raise OSError("standard output is gone")

    with pytest.raises(OSError, match="gone"):
        engine(cache=cache).generate(some_requests(3), on_token=fail)
    assert not cache.pages.held


def test_callbacks_see_every_token_in_order_and_can_stop() -> None:
    requests = [replace(r, params=replace(r.params, max_new_tokens=20)) for r in some_requests(8, seed=3)]
    seen: dict[int, list[int]] = {index: [] for index in range(8)}

    def on_token(index: int, token: int) -> bool:
        seen[index].append(token)
        return index == 2 and len(seen[index]) == 4

    results = engine().generate(requests, on_token)
    assert results[2].finish_reason == "stop" and len(results[2].ids) == 4
    for index, result in enumerate(results):
        ids = result.ids[:-1] if result.finish_reason == "eos" else result.ids
        assert tuple(seen[index]) == ids


def test_stop_at_the_last_allowed_token_is_a_stop() -> None:
    request = Request((1,), SamplingParams(max_new_tokens=1, ignore_eos=True))
    (result,) = engine().generate([request], lambda index, token: True)
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ids_end_a_request_as_the_end_of_text_does(ignore_eos: bool) -> None:
    """The id is the last one and no event of its own; other requests of the batch know nothing of it."""
    requests = some_requests(12, seed=4, ignore_eos=ignore_eos)
    plain = [expected(request) for request in requests]
    asked, ended = [], []
    for number, (request, (ids, reason)) in enumerate(zip(requests, plain, strict=True)):
        stop = () if number % 3 == 2 else (ids[len(ids) // 2], *range(50, 55), EOS)
        asked.append(replace(request, params=replace(request.params, stop_token_ids=stop)))
        end = next((place for place, id in enumerate(ids) if id in stop), None)
        known = end is None or (ids[end] == EOS and not ignore_eos)
        ended.append((ids, reason) if known else (ids[: (end or 0) + 1], "stop"))
    seen: dict[int, list[int]] = {index: [] for index in range(12)}

    def on_token(index: int, token: int) -> bool:
        seen[index].append(token)
        return False

    results = engine(max_batch=5).generate(asked, on_token)
    assert outputs(results) == ended and {reason for _, reason in ended} >= {"stop", "length"}
    for index, result in enumerate(results):
        assert tuple(seen[index]) == (result.ids if result.finish_reason == "length" else result.ids[:-1])


def test_a_stop_id_at_the_last_allowed_token_is_a_stop() -> None:
    ids, _ = expected(Request((1,), SamplingParams(max_new_tokens=1, ignore_eos=True)))
    params = SamplingParams(max_new_tokens=1, ignore_eos=True, stop_token_ids=ids)
    (result,) = engine().generate([Request((1,), params)])
    assert (result.ids, result.finish_reason) == (ids, "stop")


def test_output_ends_where_the_models_positions_end() -> None:
    request = Request(tuple(range(10)), SamplingParams(max_new_tokens=50, ignore_eos=True))
    (result,) = engine(FakeModel(max_positions=16)).generate([request])
    assert len(result.ids) == 6 and result.finish_reason == "length"


def test_repetition_penalty_knows_prompt_and_output() -> None:
    """So large a penalty forbids every token that was there before, also one that was just chosen."""
    prompt = tuple(range(10))
    params = SamplingParams(max_new_tokens=50, repetition_penalty=1e6, ignore_eos=True)
    for result in engine().generate([Request(prompt, params), Request(prompt[:1], params)]):
        assert len({*result.ids, 0}) == 51
    assert not set(engine().generate([Request(prompt, params)])[0].ids) & set(prompt)


def test_times_are_ordered() -> None:
    for result in engine(max_batch=2).generate(some_requests(6)):
        assert 0 < result.first_token_s <= result.total_s


def test_log_probabilities_come_with_each_token() -> None:
    asked = [replace(r, params=replace(r.params, logprobs=n)) for n, r in enumerate(some_requests(4))]
    for count, (request, result) in enumerate(zip(asked, engine().generate(asked), strict=True)):
        assert len(result.logprobs) == (len(result.ids) if count else 0)
        tokens = list(request.ids)
        for token, found in zip(result.ids, result.logprobs, strict=False):
            raw = logits_of(tokens).double().log_softmax(0)
            assert found.chosen == pytest.approx(raw[token].item(), abs=1e-9)
            assert len(found.top) == count and found.top[0][0] == int(raw.argmax())
            tokens.append(token)


# Requests that come and go: add, step, abort


def run(tested: Engine, found: dict[int, Result], tokens: dict[int, list[int]]) -> None:
    """Steps until nothing waits or runs."""
    while tested.busy:
        for event in tested.step():
            if isinstance(event, Finished):
                assert event.id not in found
                found[event.id] = event.result
            else:
                assert isinstance(event, Token) and event.id not in found
                tokens.setdefault(event.id, []).append(event.token)


def test_requests_come_and_go_while_others_run() -> None:
    """Added one after the other between steps: each has the tokens that it has alone, and events tell all of them."""
    requests, tested = some_requests(12), engine(max_batch=3)
    found: dict[int, Result] = {}
    tokens: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        assert tested.add(request) == number
        for event in tested.step():
            if isinstance(event, Finished):
                found[event.id] = event.result
            else:
                tokens.setdefault(event.id, []).append(event.token)
    run(tested, found, tokens)
    assert outputs([found[number] for number in range(12)]) == [expected(request) for request in requests]
    for number, result in found.items():
        shown = result.ids[:-1] if result.finish_reason == "eos" else result.ids
        assert tuple(tokens.get(number, ())) == shown
    assert not tested.cache.pages.held and tested.step() == []


def test_an_abort_ends_one_request_and_no_other() -> None:
    """Of one that runs, of one that waits, of one that has ended; its pages and its turn are free at once."""
    long = SamplingParams(max_new_tokens=30, ignore_eos=True)
    requests = [Request((n, n + 1), long) for n in range(4)]
    tested = engine(max_batch=2)
    ids = [tested.add(request) for request in requests]
    for _ in range(5):
        tested.step()
    running = tested.abort(ids[0])
    assert running is not None and running.finish_reason == "abort"
    assert running.ids == expected(requests[0])[0][: len(running.ids)] and len(running.ids) == 4
    waiting = tested.abort(ids[3])
    assert waiting is not None and waiting.ids == () and waiting.finish_reason == "abort"
    assert tested.abort(ids[0]) is None and len(tested.cache.pages.held) == 1
    found: dict[int, Result] = {}
    run(tested, found, {})
    assert sorted(found) == ids[1:3] and tested.abort(ids[1]) is None
    assert outputs([found[1], found[2]]) == [expected(request) for request in requests[1:3]]
    assert not tested.cache.pages.held


def test_a_request_that_never_fits_is_refused_when_it_is_added() -> None:
    tested = engine(cache=FakeCache(tokens=48))
    tested.add(Request((1, 2), SamplingParams(max_new_tokens=3)))
    with pytest.raises(UserError, match="a sequence of 90 tokens can never fit a cache of 48"):
        tested.add(Request(tuple(range(80)), SamplingParams(max_new_tokens=11)))
    with pytest.raises(UserError, match="prompt 2 is empty"):
        tested.add(Request((), SamplingParams()))
    found: dict[int, Result] = {}
    run(tested, found, {})
    assert list(found) == [0]  # the other request was not harmed


BAD = {
    "is empty": Request((), SamplingParams()),
    "400 positions": Request(tuple([1] * 400), SamplingParams()),
    "vocab_size is 97": Request((97,), SamplingParams()),
    "stop_token_ids=97 and the model's vocab_size is 97": Request((1,), SamplingParams(stop_token_ids=(3, 97, 5))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_prompts_are_named(message: str) -> None:
    with pytest.raises(UserError, match=f"prompt 2 .*{message}"):
        engine().generate([Request((1,), SamplingParams()), BAD[message]])


def disagreeing_rank(ranks: Ranks, chunk: int) -> list[tuple[tuple[int, ...], str]]:
    """The model of rank 1 would choose other tokens than that of rank 0."""

    class Own(FakeModel):
        def logits(self, norm_O1: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
            return super().logits(norm_O1, part).roll(ranks.rank, 1)

    held: Any = FakeCache()
    model: Any = Own()
    model.vocab_chunk = chunk
    return outputs(Engine(model, held, ranks, EngineConfig(eos_ids=[EOS], max_batch=3)).generate(some_requests(6)))


def test_all_ranks_take_rank_zeros_tokens() -> None:
    """Ranks that chose for themselves would soon call the model with different steps, and hang."""
    zero, one = run_ranks(disagreeing_rank, 2, VOCAB)
    assert zero == one == [expected(request) for request in some_requests(6)]
    zero, one = run_ranks(disagreeing_rank, 2, 10)  # here each has a part of the vocabulary
    assert zero == one


@pytest.mark.parametrize("good", [0, 1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(good: int, bad: float) -> None:
    """At the position that had them, though another step was launched meanwhile; with log-probabilities asked for."""

    class Broken(FakeModel):
        def logits(self, norm_O1: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
            return super().logits(norm_O1, part) * (bad if len(self.steps) > good else 1)

    with pytest.raises(UserError, match=f"not finite at position {2 + good} of prompt 1"):
        engine(Broken()).generate([Request((1, 2, 3), SamplingParams(ignore_eos=True, logprobs=2))])
