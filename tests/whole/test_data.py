"""mesh.attention=data on real models: each rank has requests of its own, and each answer the bits of one rank.

The embedded model, and a small one with five experts.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from drafting import draft_wrongly, try_some
from spawn import run_ranks

from epmoe.config.compose import from_keys
from epmoe.engine.drafts import Costs
from epmoe.engine.engine import Engine
from epmoe.engine.graphs import Kind
from epmoe.engine.request import Request, Result, SamplingParams
from epmoe.llm import LLM
from epmoe.moe.exchange.all_to_all import AllToAll, Limits
from epmoe.ranks.mesh import Ranks
from epmoe.weights.synthetic import make_checkpoint

SLOW = pytest.mark.slow
GRAMMAR = "start: /[a-z ]{3,30}[.!]/"


def requests(vocab: int) -> list[Request]:
    """Prompts of one token and of more than a step has, greedy and sampled, with what adjusts logits and without."""
    rng = random.Random(8)
    kinds: list[dict[str, Any]] = [
        {"logprobs": 2},
        {"temperature": 1.0, "logprobs": 1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
        {"prompt_logprobs": 1, "logprobs": 1},
        {"grammar": GRAMMAR, "temperature": 1.0, "logprobs": 1},
        {"frequency_penalty": 0.4, "logit_bias": ((7, 2.0), (11, -100.0)), "min_tokens": 1},
    ]
    return [
        Request(
            tuple(rng.randrange(vocab) for _ in range(length)),
            SamplingParams(max_new_tokens=new, seed=number, ignore_eos=number % 2 == 0, **kinds[number % len(kinds)]),
        )
        for number, (length, new) in enumerate([(90, 3), (1, 25), (5, 9), (33, 12), (12, 30), (3, 1), (60, 8), (2, 16)])
    ]


Outcome = list[tuple[tuple[int, ...], str, str]]


def told(results: Sequence[Result]) -> Outcome:
    return [(each.ids, each.finish_reason, repr((each.logprobs, each.prompt_logprobs))) for each in results]


def opened(ranks: Ranks, keys: dict[str, Any]) -> LLM:
    """As `LLM(**keys)`; large steps begin at few tokens."""
    config = from_keys({"runtime.device": "cpu", "runtime.progress": False, "runtime.page": 4, **keys})
    llm = LLM.opened(config, ranks)
    llm.load()
    for layer in llm.model.moe_layers():
        if isinstance(layer.exchange, AllToAll):
            layer.exchange.limits = Limits(parted_from=8)
    return llm


ENGINES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "one at a time": {"max_batch": 1, "prefill_chunk": 7},
    "put back": {"max_batch": 5, "prefill_chunk": 32},
    "drafts": {"drafts": Costs.of(32, 4)},
    "bodies": {"max_batch": 5, "prefill_chunk": 32, "drafts": Costs.of(32, 4)},
}
BODIES = {"prompts": [16, 32], "mixed": [16, 64]}  # as graphs have them, whose sizes the device alone knows


def counted(run: Callable[[Kind], None], parts: Counter[str]) -> Callable[[Kind], None]:
    """The same; which parts of steps ran."""

    def running(kind: Kind) -> None:
        parts[kind.part] += 1
        run(kind)

    return running


def outcomes(ranks: Ranks, checkpoint: str, keys: dict[str, Any], ways: list[str]) -> dict[str, tuple[Any, ...]]:
    """By way: all requests, the same in another order with what is found, two of them alone; what was put back, and
    in which lanes."""
    small = {"runtime.cache_tokens": 100} if ways == ["put back"] else {"runtime.cache_tokens": 3000}
    llm = opened(ranks, {"checkpoint": checkpoint, **small, **keys})
    asked, found = requests(llm.architecture.vocab), {}
    for way in ways:
        parts = Counter[str]()
        with pytest.MonkeyPatch.context() as patch:
            if "drafts" in ENGINES[way]:
                dice = random.Random(3)
                try_some(patch, dice)
                draft_wrongly(patch, dice, llm.architecture.vocab, 0.8)
            tested = Engine(llm.model, llm.cache, ranks, replace(llm.engine.config, **ENGINES[way]))
            if way == "bodies":
                tested.prepare_for(asked)
                tested.graphs.bodies = {part: list(sizes) for part, sizes in BODIES.items()}
                patch.setattr(tested.graphs, "_run", counted(tested.graphs._run, parts))
            first = told(tested.generate(asked))
            again = tested.generate(asked[::-1])
            few = told(tested.generate(asked[1:3]))
            assert way != "bodies" or min(parts[part] for part in ("prompts", "mixed", "drafts")) > 0, parts
        lanes = tested.scheduler.lanes
        assert all(lane.pages.unused for lane in lanes)
        cached = sum(each.cached_tokens for each in again)
        found[way] = first, told(again), few, cached, [lane.put_back for lane in lanes]
    return found


def alone(checkpoint: str) -> Outcome:
    (found,) = run_ranks(outcomes, 1, checkpoint, {}, ["as it comes"])
    answers: Outcome = found["as it comes"][0]
    return answers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five experts: no number of ranks but 1 divides them."""
    return str(make_checkpoint(tmp_path_factory.mktemp("data"), experts=5, top_k=2))


@pytest.fixture(scope="module")
def small(checkpoint: str) -> Outcome:
    """What one rank that has everything says."""
    return alone(checkpoint)


@pytest.fixture(scope="module")
def embedded() -> Outcome:
    return alone("")


def same(checkpoint: str, size: int, combine: str, ways: list[str], wanted: Outcome) -> list[tuple[int, list[int]]]:
    """Every rank says that; what was found, and what was put back by each, by way."""
    keys = {"mesh.attention": "data", "combine": combine}
    results = run_ranks(outcomes, size, checkpoint, keys, ways, timeout=500)
    assert all(each == results[0] for each in results)
    for way in ways:
        first, again, few, *_ = results[0][way]
        assert first == wanted, way
        assert again == wanted[::-1] and few == wanted[1:3], way
    return [results[0][way][3:] for way in ways]


EXCHANGES = ["slots", "all_to_all"]


@pytest.mark.parametrize(
    ("size", "combine", "ways"),
    [
        (1, "all_to_all", ["as it comes"]),
        (1, "local", ["as it comes"]),
        (2, "all_to_all", ["as it comes", "bodies"]),
        (3, "slots", ["as it comes"]),
    ],
)
def test_the_bits_of_one_rank(size: int, combine: str, ways: list[str], checkpoint: str, small: Outcome) -> None:
    """Tokens and log-probabilities, of prompts of very different lengths; fewer requests than ranks, too."""
    for cached, _ in same(checkpoint, size, combine, ways, small):
        assert cached > 50  # a request comes where its prompt is


@pytest.mark.parametrize("combine", [pytest.param("slots", marks=SLOW), "all_to_all"])
def test_caches_that_are_too_small(combine: str, checkpoint: str, small: Outcome) -> None:
    """A rank puts a request back while the other goes on; nobody's bits change."""
    ((_, put_back),) = same(checkpoint, 2, combine, ["put back"], small)
    assert sum(put_back) > 0


@pytest.mark.parametrize(
    ("size", "combine", "ways"),
    [
        # tests/whole/test_attention_modes.py has it
        pytest.param(2, "all_to_all", ["as it comes"], marks=SLOW),
        *(pytest.param(size, each, [*ENGINES][:2], marks=SLOW) for size in (1, 2, 3, 4, 8) for each in EXCHANGES),
        *(pytest.param(size, each, ["drafts", "bodies"], marks=SLOW) for size in (2, 3, 4, 8) for each in EXCHANGES),
        *(pytest.param(size, each, ["put back"], marks=SLOW) for size in (1, 2, 3) for each in EXCHANGES),
    ],
)
def test_the_embedded_model(size: int, combine: str, ways: list[str], embedded: Outcome) -> None:
    same("", size, combine, ways, embedded)


def test_all_reduce_says_much_the_same(checkpoint: str, small: Outcome) -> None:
    """Other bits, but the same numbers, nearly: the first token of a greedy answer."""
    keys = {"mesh.attention": "data", "combine": "all_reduce"}
    results = run_ranks(outcomes, 2, checkpoint, keys, ["as it comes"])
    assert results[0] == results[1]
    assert results[0]["as it comes"][0][0][0] == small[0][0]
