"""Log-probabilities of prompts on a real model: torch's log softmax of all logits, and the same bits in any company."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from spawn import run_ranks
from steps import make_step

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, SamplingParams
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES, Choices
from epmoe.weights.load import load
from epmoe.weights.synthetic import make_checkpoint

PAGE = 4
TOP = 3
Found = tuple[list[str], list[list[Any]], int]  # results, log-probabilities, times that one was put back


def requests(vocab: int) -> list[Request]:
    """Within and beyond the window and a piece, many begun alike, one of a token; some with an answer, one without."""
    rng = random.Random(3)
    begins = [tuple(rng.randrange(vocab) for _ in range(length)) for length in (0, 9, 33)]
    found = [Request((5,), SamplingParams(max_new_tokens=3, prompt_logprobs=TOP))]
    for number in range(15):
        ids = (*rng.choice(begins), *(rng.randrange(vocab) for _ in range(rng.choice((1, 4, 30, 70)))))
        params = SamplingParams(
            max_new_tokens=rng.choice((0, 20, 60)), ignore_eos=True, temperature=float(number % 2), seed=number,
            prompt_logprobs=TOP, logprobs=2,
        )  # fmt: skip
        found.append(Request(ids, params))
    return found


def run(mine: Ranks, checkpoint: str, tokens: int, options: dict[str, Any]) -> Found:
    """The engine's, `options` being its own; in a cache of so many positions."""
    company = options.pop("company", True)
    model, report = load(Checkpoint.open(checkpoint), mine, Choices(combine="slots"), progress=False)
    model.limits = replace(model.limits, vocab_chunk=64)  # type: ignore[attr-defined]  # all ranks have a part
    config = model.config
    shape: Any = {"windows": config.windows, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    kinds: Any = {"step": options.get("prefill_chunk", 2048), "dtype": DTYPES[report.dtype]}
    cache = Cache(CacheConfig(**shape, **kinds, tokens=tokens, sequences=16, page=PAGE), mine.device)
    for layer in cache.layers:
        layer.fill_(torch.nan)  # what is read before it was written shows
    engine = Engine(model, cache, mine, EngineConfig(max_batch=16, **options))
    asked = requests(config.vocab)
    if company:
        others = [replace(each, params=replace(each.params, prompt_logprobs=None, max_new_tokens=9)) for each in asked]
        results = engine.generate([*asked, *others])[: len(asked)]
    else:
        results = [engine.generate([request])[0] for request in asked]
    engine.graphs.close()
    told = [[each and (each.chosen, each.top) for each in result.prompt_logprobs] for result in results]
    return [repr((each.ids, each.logprobs)) for each in results], told, engine.scheduler.put_back


def full(mine: Ranks, checkpoint: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each request's tokens but the first: the log-probability, and the most likely ones'; all logits at once."""
    model, report = load(Checkpoint.open(checkpoint), mine, Choices(), progress=False)
    config = model.config
    shape: Any = {"windows": config.windows, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    cache = Cache(CacheConfig(**shape, dtype=DTYPES[report.dtype], tokens=200, sequences=1, page=PAGE), mine.device)
    found = []
    for request in requests(config.vocab):
        handle, _ = cache.pages.admit()
        with torch.inference_mode():
            assert cache.grow(handle, 0, len(request.ids)) == len(request.ids)
            logits_TV = model(make_step([(handle, request.ids, 0)]), cache)
        cache.release(handle)
        logprob_TV = logits_TV.double().log_softmax(1)[:-1]
        found.append(
            (logprob_TV.gather(1, torch.tensor(request.ids[1:]).view(-1, 1))[:, 0], logprob_TV.topk(TOP).values)
        )
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("scores"), experts=5, top_k=2))


def alone(checkpoint: str, device: str, **options: Any) -> Found:
    (found,) = run_ranks(run, 1, checkpoint, 4000, {"company": False, **options}, device=device, timeout=240)
    return found


@pytest.fixture(scope="module")
def wanted(checkpoint: str) -> Found:
    return alone(checkpoint, "cpu")


def test_they_are_those_of_all_logits_at_once(checkpoint: str, wanted: Found) -> None:
    """The same logits; the sampler's normaliser is a sum in units of 2^-40 of the largest probability."""
    (whole,) = run_ranks(full, 1, checkpoint)
    for (own_T, top_TQ), told in zip(whole, wanted[1], strict=True):
        assert told[0] is None and len(told) == len(own_T) + 1
        for (chosen, top), own, most_Q in zip(told[1:], own_T.tolist(), top_TQ.tolist(), strict=True):
            assert chosen == pytest.approx(own, abs=1e-8)
            assert [value for _, value in top] == pytest.approx(most_Q, abs=1e-8)


COMPANY: dict[str, tuple[int, int, dict[str, Any]]] = {  # ranks, positions of the cache, the engine's
    "together": (1, 4000, {}),
    "in pieces": (1, 4000, {"prefill_chunk": 7}),
    "few rows at a time": (1, 4000, {"score_rows": 3}),
    "put back": (1, 180, {"prefill_chunk": 32}),
    "two ranks": (2, 4000, {"prefill_chunk": 50}),
    "two ranks, put back": (2, 180, {"prefill_chunk": 32, "score_rows": 5}),
}


# Both at once is what the last one has.
SLOW = ("two ranks", "put back")


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in COMPANY]
)
def test_the_same_bits_in_any_company(checkpoint: str, wanted: Found, case: str) -> None:
    ranks, tokens, options = COMPANY[case]
    for outputs, told, put_back in run_ranks(run, ranks, checkpoint, tokens, options, timeout=240):
        assert outputs == wanted[0] and repr(told) == repr(wanted[1])
        assert (put_back > 3) == ("put back" in case)


@pytest.mark.gpu
def test_the_same_bits_in_any_company_on_a_gpu(checkpoint: str) -> None:
    wanted = alone(checkpoint, "cuda")
    for tokens, options in ((4000, {}), (4000, {"graphs": True}), (180, {"prefill_chunk": 32, "graphs": True})):
        (found,) = run_ranks(run, 1, checkpoint, tokens, options, device="cuda", timeout=240)
        assert found[0] == wanted[0] and repr(found[1]) == repr(wanted[1])


@pytest.mark.multigpu
def test_the_same_bits_on_two_gpus(checkpoint: str) -> None:
    wanted = alone(checkpoint, "cuda")
    for found in run_ranks(run, 2, checkpoint, 4000, {"graphs": True}, device="cuda", timeout=240):
        assert found[0] == wanted[0] and repr(found[1]) == repr(wanted[1])
