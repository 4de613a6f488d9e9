"""Replicas: how requests are shared out; every rank gets what one rank gives, to the last bit, mistakes included."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import rewrite_tensors
from spawn import run_ranks

from epmoe.config.compose import from_keys
from epmoe.engine.replicas import shares
from epmoe.engine.request import Request, SamplingParams
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks
from epmoe.weights.synthetic import make_checkpoint

KEYS: dict[str, Any] = {"runtime": {"device": "cpu", "dtype": "float32", "max_batch": 4}, "max_new_tokens": 9}
WARM = SamplingParams(temperature=1.0, seed=3, logprobs=2)


def asked(*lengths: int) -> list[Request]:
    return [Request((1,) * each, SamplingParams(max_new_tokens=1)) for each in lengths]


def test_shares_have_about_as_many_tokens() -> None:
    assert shares(asked(7, 1, 1, 1, 1), 2, 100) == [[0], [1, 2, 3, 4]]
    assert shares(asked(5, 5, 5, 5), 3, 100) == [[0, 3], [1], [2]]
    assert shares(asked(7), 2, 100) == [[0], []]
    assert shares([], 2, 100) == [[], []]
    assert shares(asked(1, 50, 30), 2, 20) == [[0, 1], [2]]  # no longer than the model's positions
    many = asked(*(random.Random(3).randrange(1, 200) for _ in range(300)))
    found = shares(many, 4, 10_000)
    assert sorted(index for each in found for index in each) == list(range(300))
    tokens = [sum(len(many[index].ids) + 1 for index in each) for each in found]
    assert max(tokens) - min(tokens) < 200


def prompts() -> tuple[list[Any], list[SamplingParams]]:
    """Of all lengths and kinds, with stop strings, several answers, a grammar and scores of the prompt."""
    rng = random.Random(5)
    found = [[rng.randrange(3, 250) for _ in range(rng.choice((1, 3, 9, 40)))] for _ in range(7)]
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 1.0, "seed": 7, "n": 3}, {"stop": ("a", "e")}, {"prompt_logprobs": 1}, {"logprobs": 3},
        {"grammar": 'start: /[a-z ]+/'}, {"temperature": 0.7, "top_k": 9, "seed": 2, "repetition_penalty": 1.3},
    ]  # fmt: skip
    return found, [SamplingParams(**each) for each in kinds]


def told(llm: LLM) -> list[Any]:
    """All that is said of each answer but its times and what the cache had of it; several calls, and a stream."""
    calls: list[tuple[Any, Any]] = [prompts(), ([[5, 6, 7]], WARM), ([], None)]
    timeless = [
        {name: value for name, value in asdict(each).items() if not name.endswith(("_s", "cached_tokens"))}
        for call in calls
        for completion in llm.generate(*call)
        for each in completion.outputs
    ]
    return [*timeless, [*llm.stream([9, 8, 7], WARM)]]


def told_of_ranks(ranks: Ranks, attention: str = "replicate") -> list[Any]:
    llm = LLM.opened(from_keys({**KEYS, "mesh": {"attention": attention}}), ranks)
    llm.load()
    return told(llm)


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    with LLM(**KEYS) as llm:
        return told(llm)


@pytest.mark.parametrize(
    ("size", "replica"), [(4, 2), *(pytest.param(each, each, marks=pytest.mark.slow) for each in (2, 4))]
)
def test_every_rank_gets_what_one_rank_says(size: int, replica: int, alone: list[Any]) -> None:
    for found in run_ranks(told_of_ranks, size, replica=replica, timeout=120):
        assert found == alone


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["data", "tensor"])
def test_attention_over_a_replicas_ranks(attention: str, alone: list[Any]) -> None:
    for found in run_ranks(told_of_ranks, 4, attention, replica=2, timeout=120):
        assert found == alone


@pytest.mark.slow  # tests/whole/test_served.py has new weights for both
def test_ranks_of_its_own(alone: list[Any]) -> None:
    """LLM(ranks=2) may be two replicas, too; new weights come to both."""
    with LLM(ranks=2, mesh={"replica": 2}, **KEYS) as llm, LLM(**KEYS) as one:
        assert told(llm) == alone
        change = {"model.norm.weight": dict(one.model.named_parameters())["norm.weight"] * 1.5}
        tensors = {name: value.to(torch.bfloat16) for name, value in change.items()}
        for each in (llm, one):
            each.update_weights(tensors)
        assert told(llm) == told(one) != alone


def mistakes(ranks: Ranks, checkpoint: str) -> list[str]:
    """What each call raises; the calls after it run."""
    keys = {**KEYS, "checkpoint": checkpoint, "chat": "off", "runtime": {**KEYS["runtime"], "cache_tokens": 64}}
    llm = LLM.opened(from_keys(keys), ranks)
    llm.load()
    found = []
    for ids, params in (
        ([[1, 2], [3, 5], [4, 4, 4], [1, 5], [2, 5]], None),
        ([[1] * 40, [2]], None),
        ([[1] * 9, [2], [3] * 80], None),
        ([[1] * 9, [2]], [SamplingParams(), SamplingParams(grammar="none")]),
        ([[1, 2], [2, 3]], None),
    ):
        try:
            found.append(str([each.ids for each in llm.generate(ids, params)]))
        except UserError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_a_mistake_is_told_alike_on_all_ranks(tmp_path: Path) -> None:
    """Logits that are not finite name all prompts of all replicas; what one replica would refuse, all refuse."""
    path = make_checkpoint(tmp_path / "spoilt", vocab=300, experts=4, max_position=128)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][5] = torch.nan

    rewrite_tensors(path, spoil)
    (expected,) = run_ranks(mistakes, 1, str(path))
    assert expected[0].startswith("NotFinite") and "prompt 2 (nor are those of 4, 5)" in expected[0]
    assert "can never fit a cache" in expected[2] and "prompt 2: " in expected[3] and expected[4].startswith("[(")
    assert run_ranks(mistakes, 2, str(path), replica=2) == [expected] * 2
