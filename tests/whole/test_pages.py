"""Caches that are too small, and prefixes that are there already: no bit of an answer follows from either.

On a fake model, whose cache checks what is read and written, and on a real one with a window and full attention.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fake_model import EOS, VOCAB, FakeCache, FakeModel, expected, outputs, some_requests
from loading import rank_of
from spawn import run_ranks

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import Finished, Request, Result, SamplingParams
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES, Choices
from epmoe.weights.load import load
from epmoe.weights.synthetic import make_checkpoint


def fake(cache: FakeCache, **limits: Any) -> Engine:
    held: Any = cache
    model: Any = FakeModel()
    return Engine(model, held, rank_of(0, 1), EngineConfig(eos_ids=[EOS], **limits))


def alike(count: int, seed: int, **params: Any) -> list[Request]:
    """Requests of which many begin alike; most become much longer than their prompts. None needs more than 60."""
    rng = random.Random(seed)
    begins = [tuple(rng.randrange(VOCAB - 1) for _ in range(length)) for length in (0, 3, 9, 16)]
    found = []
    for each in some_requests(count, seed):
        own = SamplingParams(
            max_new_tokens=rng.choice((1, 7, 41)), ignore_eos=rng.random() < 0.7, seed=each.params.seed, **params
        )
        found.append(Request((*rng.choice(begins), *each.ids)[:20], own))
    return found


SMALL: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {  # of the cache, of the engine; whether room is short
    "one at its longest": ({"tokens": 60}, {}, True),
    "one, in pieces": ({"tokens": 60}, {"prefill_chunk": 7}, True),
    "pages of one": ({"tokens": 70, "page": 1}, {"prefill_chunk": 5, "max_batch": 9}, True),
    "a few": ({"tokens": 130}, {"prefill_chunk": 16}, True),
    "few handles": ({"tokens": 400, "sequences": 6, "step": 8}, {"prefill_chunk": 8}, False),
    "an engine of larger steps": ({"tokens": 400, "sequences": 6, "step": 4}, {"prefill_chunk": 100}, False),
    "windows alone": ({"tokens": 60, "windows": (6, 3), "step": 8, "sequences": 9}, {"prefill_chunk": 8}, False),
    "no prefixes": ({"tokens": 80, "prefix_cache": False}, {"prefill_chunk": 16}, True),
}


@pytest.mark.parametrize("case", SMALL)
def test_a_small_cache_changes_no_token(case: str) -> None:
    """Put back, computed again, found: each answer is what the request has alone, and nothing is left held."""
    sizes, limits, short = SMALL[case]
    requests, cache = alike(60, 1), FakeCache(**sizes)
    tested = fake(cache, **limits)
    assert outputs(tested.generate(requests)) == [expected(request) for request in requests]
    assert cache.empty()
    assert (tested.scheduler.put_back > 3) == short
    results = tested.generate(requests)  # again, with what the first time has left
    assert outputs(results) == [expected(request) for request in requests] and cache.empty()
    assert any(each.cached_tokens for each in results) == (case != "no prefixes")


def test_what_is_drawn_and_told_is_the_same_after_a_put_back() -> None:
    """Sampling goes by position, penalties by prompt and output; log-probabilities that have come are kept."""
    params: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "logprobs": 3}
    kinds: list[dict[str, Any]] = [
        {},
        {"frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"logit_bias": ((3, 5.0), (EOS, 2.0)), "min_tokens": 1},
        {"allowed_token_ids": (1, 2, 50, EOS), "temperature": 0.0, "frequency_penalty": 0.3},
    ]
    small = FakeCache(tokens=70)
    requests = [
        replace(each, params=replace(each.params, **kinds[number % 4]))
        for number, each in enumerate(alike(40, 2, **params))
    ]
    wanted = fake(FakeCache(), max_batch=1).generate(requests)
    tested = fake(small, prefill_chunk=16)
    found = tested.generate(requests)
    assert tested.scheduler.put_back > 3 and small.empty()
    assert [(each.ids, each.finish_reason, each.logprobs) for each in found] == [
        (each.ids, each.finish_reason, each.logprobs) for each in wanted
    ]


@pytest.mark.parametrize("seed", range(4))
def test_requests_come_and_go_in_a_small_cache(seed: int) -> None:
    """Added and ended at random, in whatever state they are: nobody else notices, and each ends once."""
    rng, requests, cache = random.Random(seed), alike(120, seed), FakeCache(tokens=90)
    tested, found, added = fake(cache, prefill_chunk=12, max_batch=7), dict[int, Result](), 0
    while added < len(requests) or tested.busy:
        if added < len(requests) and rng.random() < 0.5:
            assert tested.add(requests[added]) == added
            added += 1
        if rng.random() < 0.05 and (id := rng.randrange(added + 1)) < added and (ended := tested.abort(id)):
            found[id] = ended
        for event in tested.step():
            if isinstance(event, Finished):
                assert event.id not in found
                found[event.id] = event.result
    assert tested.step() == [] and cache.empty() and tested.scheduler.put_back > 3
    for number, request in enumerate(requests):
        ids, reason = expected(request)
        assert found[number].ids == ids[: len(found[number].ids)]
        assert found[number].finish_reason == "abort" or (found[number].ids, found[number].finish_reason) == (
            ids,
            reason,
        )
    assert sum(each.finish_reason == "abort" for each in found.values()) > 3


def test_a_prefix_is_not_computed_twice() -> None:
    """A conversation's next turn computes what follows the common prefix, to the page; its answer is the same."""
    cache, first = FakeCache(), 0
    tested, ids = fake(cache), tuple(range(3))
    for turn in range(5):
        request = Request(ids, SamplingParams(max_new_tokens=9, ignore_eos=True))
        before = cache.fed
        (result,) = tested.generate([request])
        assert outputs([result]) == [expected(request)] and result.cached_tokens == first
        # The last token's keys and values are never needed; each of the steps but the first brings one token.
        assert cache.fed - before == len(ids) - first + 8
        ids = (*ids, *result.ids, turn, turn + 1)
        first = (len(ids) - 3) // 4 * 4  # whole pages, of all but the last id of the answer
    assert cache.empty() and first > 40


def test_a_prefix_that_was_not_finite_is_not_kept_from_anybody() -> None:
    """Its keys and values are what they are: the request that follows fails alike, others do not."""
    bad, cache = 7, FakeCache()

    class Broken(FakeModel):
        def logits(self, norm_O1: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
            odd_O1 = torch.tensor([bad in tokens for tokens in self.outputs])[norm_O1.long()]
            return super().logits(norm_O1, part).masked_fill(odd_O1, torch.nan)

    held: Any = cache
    made: Any = Broken()
    tested = Engine(made, held, rank_of(0, 1), EngineConfig(eos_ids=[EOS]))
    ids = (1, 2, 3, 4, 5, bad, 6, 8, 9, 10, 11)
    reasons = []
    for request in (ids, ids, (*ids[:5], 6, *ids[6:])):
        tested.add(Request(request, SamplingParams(max_new_tokens=3, ignore_eos=True)))
        while tested.busy:
            reasons += [event.result.finish_reason for event in tested.step() if isinstance(event, Finished)]
    assert reasons == ["error", "error", "length"] and cache.empty()


# A real model


@dataclass(frozen=True)
class Found:
    """What a run came to."""

    outputs: list[str]  # ids and log-probabilities of each request; a float's repr tells all its bits
    put_back: int
    cached: int  # tokens that were found
    left: bool  # whether anything is held afterwards
    late: int = 0  # kernels that were compiled after everything was prepared


def real_requests(count: int, vocab: int) -> list[Request]:
    """Prompts within and beyond the window and a piece, many of them begun alike; greedy and sampled ones."""
    rng = random.Random(5)
    begins = [tuple(rng.randrange(vocab) for _ in range(length)) for length in (0, 6, 21, 40)]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}]
    return [
        Request(
            (*rng.choice(begins), *(rng.randrange(vocab) for _ in range(rng.choice((1, 4, 18, 30))))),
            SamplingParams(
                max_new_tokens=rng.choice((1, 6, 50)), ignore_eos=True, seed=seed, logprobs=2, **rng.choice(kinds)
            ),
        )
        for seed in range(count)
    ]


COUNT = 40


def run(mine: Ranks, checkpoint: str, share: float, prefix_cache: bool, options: dict[str, Any]) -> Found:
    """COUNT requests in a cache of this share of what they could need together."""
    model, report = load(Checkpoint.open(checkpoint), mine, Choices(combine="slots"), progress=False)
    config, page = model.config, 4
    requests = real_requests(COUNT, config.vocab)
    needs = sum(-(-each.cached(config.max_positions) // page) * page for each in requests)
    kinds = {"step": 32, "prefix_cache": prefix_cache, "dtype": DTYPES[report.dtype]}
    shape: Any = {"windows": config.windows, "kv_heads": config.kv_heads, "head_dim": config.head_dim, **kinds}
    cache = Cache(CacheConfig(**shape, tokens=int(share * needs), sequences=64, page=page), mine.device)
    for layer in cache.layers:
        layer.fill_(torch.nan)  # what is read before it was written shows
    engine = Engine(model, cache, mine, EngineConfig(prefill_chunk=32, max_batch=64, **options))
    late: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if mine.device.type == "cuda":
            import triton

            engine.prepare_for(requests)
            patch.setattr(triton.knobs.compilation, "listener", lambda **what: late.append(what["src"].name))
        results = engine.generate(requests)
    engine.graphs.close()
    return Found(
        [repr((each.ids, each.logprobs)) for each in results],
        engine.scheduler.put_back,
        sum(each.cached_tokens for each in results),
        bool(cache.pages.held) or any(any(stock.users) for stock in cache.pages.stocks),
        len(late),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("pages"), experts=5, top_k=2))


Ways = list[tuple[int, bool]]  # ranks, and whether prefixes are found
WAYS: Ways = [(1, True), (1, False), (2, True), (2, False)]


def compare(checkpoint: str, device: str, ways: Ways, options: dict[str, Any]) -> None:
    (large,) = run_ranks(run, 1, checkpoint, 1.0, False, options, device=device, timeout=240)
    assert large.put_back == 0 and large.cached == 0 and not large.left and not large.late
    assert "nan" not in "".join(large.outputs) and len(set(large.outputs)) == COUNT
    for size, prefix_cache in ways:
        found = run_ranks(run, size, checkpoint, 0.1, prefix_cache, options, device=device, timeout=240)
        for each in found:
            assert each == found[0] and each.outputs == large.outputs
            assert each.put_back > 3 and (each.cached > 200) == prefix_cache and not each.left
            assert not each.late
    (found,) = run_ranks(run, 1, checkpoint, 1.0, True, options, device=device, timeout=240)
    assert found.outputs == large.outputs and found.put_back == 0 and found.cached > 200


@pytest.mark.parametrize("ways", [WAYS[1:3], pytest.param(WAYS, marks=pytest.mark.slow)], ids=len)
def test_a_tenth_of_the_cache_gives_the_same_bits(ways: Ways, checkpoint: str) -> None:
    """On 1 and 2 ranks, with prefixes and without; and a large cache with prefixes."""
    compare(checkpoint, "cpu", ways, {})


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_a_tenth_of_the_cache_gives_the_same_bits_on_a_gpu(checkpoint: str, graphs: bool) -> None:
    compare(checkpoint, "cuda", WAYS[:2], {"graphs": graphs})


@pytest.mark.multigpu
def test_a_tenth_of_the_cache_gives_the_same_bits_on_two_gpus(checkpoint: str) -> None:
    compare(checkpoint, "cuda", WAYS[2:], {"graphs": True})


def talk(device: str) -> None:
    """Turns of a conversation, the embedded model: found to the page, and the bits of an LLM that finds nothing."""
    runtime = {"device": device, "page": 8}
    with LLM(runtime={**runtime, "prefix_cache": False}, chat="off") as plain, LLM(runtime=runtime, chat="off") as llm:
        ids, there = tuple(range(100, 140)), 0
        for turn in range(3):
            params = SamplingParams(max_new_tokens=21, ignore_eos=True, logprobs=3, temperature=0.7, seed=turn)
            (wanted,), (found,) = plain.generate(list(ids), params), llm.generate(list(ids), params)
            assert (found.ids, found.logprobs) == (wanted.ids, wanted.logprobs)
            assert wanted.cached_tokens == 0 and found.cached_tokens == found.outputs[0].cached_tokens == there
            there = (len(ids) + 20) // 8 * 8  # all but the last id have keys and values
            ids = (*ids, *found.ids, 5, 6, 7)
        (branch,) = llm.generate([*ids[:43], 9, *range(30)], params)
        assert branch.cached_tokens == 40
        assert branch.ids == plain.generate([*ids[:43], 9, *range(30)], params)[0].ids


def test_a_conversation_is_not_computed_twice() -> None:
    talk("cpu")


@pytest.mark.gpu
def test_a_conversation_is_not_computed_twice_on_a_gpu() -> None:
    talk("cuda")


def test_other_weights_find_nothing(tmp_path: Any) -> None:
    """What lies in the cache comes from the weights before."""
    from loading import stored

    old, new = (make_checkpoint(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    keys: dict[str, Any] = {"runtime": {"device": "cpu"}, "chat": "off", "max_new_tokens": 6}
    prompt = list(range(50))
    with LLM(new, **keys) as llm:
        (wanted,) = llm.generate(prompt)
    with LLM(old, **keys) as llm:
        assert [llm.generate(prompt)[0].cached_tokens for _ in range(2)] == [0, 48]
        llm.update_weights(stored(new))
        (found,) = llm.generate(prompt)
        assert (found.ids, found.cached_tokens) == (wanted.ids, 0)
        assert llm.generate(prompt)[0].cached_tokens == 48
