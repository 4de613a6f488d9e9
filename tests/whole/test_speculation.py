"""Drafts on real models: the tokens and log-probabilities of plain decoding, bit for bit, on any number of ranks."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from drafting import draft_wrongly, try_some
from kinds import KINDS, PROMPTS
from spawn import run_ranks

from epmoe.config.compose import from_keys
from epmoe.engine.request import SamplingParams
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks

Answers = list[tuple[Any, ...]]


def hold_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row drafts any number of tokens, one of seven wrong; by a generator, so the same on every rank."""
    dice = random.Random(1)
    try_some(monkeypatch, dice, 7)
    draft_wrongly(monkeypatch, dice, 300, 6 / 7)


def answers(mine: Ranks, speculate: str, wrong: bool, runtime: dict[str, Any]) -> tuple[Answers, tuple[int, int]]:
    """All answers, and how many tokens were drafted and right."""
    keys = {"speculate": speculate, "chat": "off", "runtime": {"device": mine.device.type, **runtime}}
    with LLM.opened(from_keys(keys), mine) as llm, pytest.MonkeyPatch.context() as monkeypatch:
        llm.load()
        if wrong:
            hold_some(monkeypatch)
        params = [SamplingParams(max_tokens=28, ignore_eos=True, **kind) for kind in KINDS]
        found = llm.generate(PROMPTS, params)
        speculation = llm.engine.scheduler.speculation
        counts = (speculation.drafting.drafted, speculation.drafting.accepted) if speculation else (0, 0)
        said = [(each.text, each.ids, each.finish_reason, each.logprobs) for one in found for each in one.outputs]
        return [*said, tuple(one.prompt_logprobs for one in found)], counts


SMALL = {"max_batch": 3, "prefill_chunk": 8, "cache_tokens": 240, "page": 4}  # put back now and then
RUNS = [
    (2, True, SMALL),
    *(
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (
            (1, False, {}),
            (1, True, SMALL),
            (2, True, {}),
            (3, False, {"max_batch": 5}),
            (4, True, SMALL),
            (8, True, {}),
        )
    ),
]


@pytest.fixture(scope="module")
def known() -> Answers:
    return run_ranks(answers, 1, "off", False, {})[0][0]


@pytest.mark.parametrize(("size", "wrong", "runtime"), RUNS)
def test_the_same_bits(size: int, wrong: bool, runtime: dict[str, Any], known: Answers) -> None:
    check(run_ranks(answers, size, "ngram", wrong, runtime, timeout=200), known)


def check(found: Sequence[tuple[Answers, tuple[int, int]]], known: Answers) -> None:
    for said, (drafted, accepted) in found:
        assert said == known
        assert drafted > accepted > 20 and (drafted, accepted) == found[0][1]


@pytest.fixture(scope="module")
def known_on_a_gpu() -> Answers:
    return run_ranks(answers, 1, "off", False, {}, timeout=200, device="cuda")[0][0]


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("runtime", [{}, {"graphs": "false"}, SMALL], ids=["graphs", "no graphs", "small"])
def test_the_same_bits_on_a_gpu(runtime: dict[str, Any], wrong: bool, known_on_a_gpu: Answers) -> None:
    check(run_ranks(answers, 1, "ngram", wrong, runtime, timeout=200, device="cuda"), known_on_a_gpu)


@pytest.mark.multigpu
def test_the_same_bits_on_two_gpus(known_on_a_gpu: Answers) -> None:
    check(run_ranks(answers, 2, "ngram", True, {}, timeout=200, device="cuda"), known_on_a_gpu)
