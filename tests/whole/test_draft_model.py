"""A draft model beside a real one: what it says is what it says of the whole text at once, and it changes no bit."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drafting import try_some
from heads import RandomHead, write_head
from spawn import run_ranks
from steps import make_step

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.config.compose import from_keys
from epmoe.engine.diagnose import NotFinite
from epmoe.engine.graphs import Kind
from epmoe.engine.proposer import DEPTH
from epmoe.engine.request import Request, Result, SamplingParams, Workload
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.models.decoder import Decoder
from epmoe.ranks.mesh import Ranks

PROMPTS = [
    "And the king said",
    "one cup, two cups, three cups; one cup, two",
    "b",
    "In the days of old there was a man",
]
KINDS: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"temperature": 0.7, "seed": 5, "frequency_penalty": 0.3, "logprobs": 1},
    {"stop": ("e",), "prompt_logprobs": 1},
    {"grammar": "start: /([a-z]{2,7}, ){3,30}/"},
]
# For the embedded model, whose layers are 0 to 5.
HEAD = RandomHead(hidden=256, heads=8, head_dim=32, vocab=3072, draft_vocab=512, layers=(0, 2, 5))
Said = list[tuple[tuple[int, ...], list[int]]]  # tokens so far, and what the draft model says of the next ones


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("head")
    write_head(folder, HEAD)
    return str(folder)


def answers(
    mine: Ranks, head: str, runtime: dict[str, Any], attention: str = "replicate"
) -> tuple[list[Any], Said, int]:
    """All answers, what the draft model said on the way, and how many tokens were tried."""
    keys = {"chat": "off", "mesh.attention": attention, "runtime": {"device": mine.device.type, **runtime}}
    keys |= {"draft_model": head, "speculate": "auto"} if head else {}
    with LLM.opened(from_keys(keys), mine) as llm, pytest.MonkeyPatch.context() as patch:
        llm.load()
        said: Said = []
        speculation, drafted = llm.engine.scheduler.speculation, 0
        if speculation:
            tell = speculation.tell

            def told(sequence: Any, ids: list[int]) -> None:
                if not sequence.finished:
                    said.append((sequence.tokens(0, sequence.length), ids))
                tell(sequence, ids)

            try_some(patch, random.Random(2), found=True)
            patch.setattr(speculation, "tell", told)
        params = [SamplingParams(max_tokens=24, ignore_eos=True, **kind) for kind in KINDS]
        found = llm.generate(PROMPTS, params)
        if speculation:
            drafted = speculation.drafting.drafted
            check_said(llm, said[::3] if runtime.get("prefix_cache") is False else [])
        texts = [(each.text, each.ids, each.finish_reason, each.logprobs) for one in found for each in one.outputs]
        return [*texts, tuple(one.prompt_logprobs for one in found)], said, drafted


def check_said(llm: LLM, said: Said) -> None:
    """The same of the whole text, fed at once."""
    model, drafter = llm.model, llm.engine.config.draft_model
    assert isinstance(model, Decoder) and drafter is not None
    config = llm.cache.config
    for tokens, ids in said:
        cache = Cache(
            CacheConfig(config.windows, config.kv_heads, config.head_dim, 200, 2, 4, config.dtype, draft=config.draft),
            llm.ranks.device,
        )
        with torch.inference_mode():
            assert list(whole(model, drafter, cache, tokens)) == ids, (tokens, ids)


def whole(model: Decoder, drafter: Any, cache: Cache, tokens: tuple[int, ...]) -> list[int]:
    handle = cache.admit(len(tokens) + DEPTH)
    step = make_step([(handle, tokens[:-1], 0)], device=cache.device)
    model.hidden(step, cache)
    assert model.feature_TX is not None
    behind_T = torch.tensor(tokens[1:], device=cache.device)
    plan = cache.plan(step)[None]
    hidden_TH = drafter(behind_T, drafter.fuse(model.feature_TX), step.position_T, cache.draft, plan)
    hidden_1H, found = hidden_TH[-1:], []
    for position in range(len(tokens) - 1, len(tokens) - 1 + DEPTH):
        token_1 = drafter.propose(hidden_1H)
        found.append(int(token_1))
        at = torch.tensor([position], device=cache.device)
        row = Step(token_1, at, torch.tensor([handle], device=cache.device))
        hidden_1H = drafter(token_1, hidden_1H, at, cache.draft, cache.plan(row)[None])
    cache.release(handle)
    return found


@pytest.fixture(scope="module")
def known() -> list[Any]:
    return run_ranks(answers, 1, "", {})[0][0]


WHOLE = {"prefix_cache": False}
SMALL = {"max_batch": 2, "prefill_chunk": 8, "cache_tokens": 120, "page": 4}


@pytest.mark.parametrize(
    ("size", "runtime", "attention"),
    [
        pytest.param(1, WHOLE, "replicate", marks=pytest.mark.slow),  # two ranks have it, in pieces
        (1, SMALL, "replicate"),
        (2, {**WHOLE, "prefill_chunk": 5}, "replicate"),
        pytest.param(2, {**WHOLE, "prefill_chunk": 5}, "data", marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_whatever_it_says(
    size: int, runtime: dict[str, Any], attention: str, head: str, known: list[Any]
) -> None:
    found = run_ranks(answers, size, head, runtime, attention, timeout=200)
    for texts, said, drafted in found:
        assert texts == known and drafted > 30
        assert said == found[0][1] and len({token for _, ids in said for token in ids}) > 10


def prepared(mine: Ranks, head: str) -> Counter[str]:
    """Run what would be captured on a GPU, in that order, before anything else has run; then answer."""
    keys = {"draft_model": head, "speculate": "auto", "runtime": {"device": "cpu", "max_batch": 3, "prefill_chunk": 40}}
    with LLM.opened(from_keys(keys), mine) as llm, torch.inference_mode():
        llm.load()
        engine, load = llm.engine, Workload.unknown(3, 40, 40, 512)
        engine.runner.state.keep(load.kept)
        engine.runner.static.keep_logits()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.graphs, "capture", object())
            kinds = engine.graphs.missing(load.variants(), (3, 48), engine.preparation.bodies(load, 3, None))
        engine.graphs._forget()
        for kind in kinds:
            engine.graphs._part(kind)()
        assert llm.generate("And the king said", SamplingParams(max_tokens=9))[0].text
        return Counter(kind.part for kind in kinds)


def test_every_part_runs_by_itself(head: str) -> None:
    (counts,) = run_ranks(prepared, 1, head, timeout=120)
    assert {"drafts", "extend drafts", "extend mixed", "extend prompts", "propose", "head", "decode"} < set(counts)
    assert counts["extend drafts"] == counts["drafts"] == 9 and counts["propose"] == 3


def test_logits_that_are_not_finite_end_one_request(head: str) -> None:
    """What stands for its next token is no id, and the draft model takes another one."""
    with LLM(draft_model=head, speculate="auto", chat="off", runtime={"device": "cpu"}) as llm, torch.no_grad():
        asked = [Request((3, last, 5), SamplingParams(max_new_tokens=6, ignore_eos=True)) for last in (77, 78)]
        (_, known) = llm.engine.generate(asked)
        dict(llm.model.named_parameters())["embedding.weight"][77] = torch.nan
        found: dict[int, Result] = {}
        with pytest.raises(NotFinite, match="of prompt 1;"):
            llm.engine.generate(asked, on_finish=lambda request, result: found.update({request: result}))
    assert (found[0].ids, found[0].finish_reason) == ((), "error") and found[1].ids == known.ids


def test_what_is_prepared_beside_answers_leaves_theirs_alone(
    head: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts that run before they are captured draft for nobody: all that they write is the spare sequence's."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    with LLM(draft_model=head, speculate="auto", chat="off", runtime={"device": "cpu"}) as llm, torch.inference_mode():
        engine, cache = llm.engine, llm.cache
        asked = [Request((3, 4, last), SamplingParams(max_new_tokens=40, ignore_eos=True)) for last in (77, 78)]
        engine.prepare_for(asked)
        for each in asked:
            engine.add(each)
        for _ in range(3):
            engine.step()
        before = cache.draft_layer.clone()
        for kind in (Kind("extend drafts", 2, None), Kind("propose", 2, None)):  # for one load, then for another
            engine.graphs.prepare([kind])
        page, changed = cache.pages.size, (cache.draft_layer != before).any(dim=(0, 1, 3))
        assert not changed[:-page].any() and changed[-page:].any() and before[:, :, :-page].any()
        engine.clear()
    assert "1 kinds of step warmed up" in capsys.readouterr().err


def test_without_drafts_it_does_nothing(head: str) -> None:
    with pytest.raises(UserError, match=r"^draft_model='x' drafts nothing with speculate=off: take speculate=auto$"):
        from_keys({"draft_model": "x"})


def test_one_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^draft_model=/nowhere/x is no directory"):
        LLM(draft_model="/nowhere/x", speculate="auto", runtime={"device": "cpu"})
    write_head(tmp_path, replace(HEAD, hidden=128))
    with pytest.raises(UserError, match="take a head that was trained for this model"):
        LLM(draft_model=str(tmp_path), speculate="auto", runtime={"device": "cpu"})


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", [{}, {"graphs": "false"}, SMALL], ids=["graphs", "no graphs", "small"])
def test_the_same_bits_on_a_gpu(runtime: dict[str, Any], head: str) -> None:
    known = run_ranks(answers, 1, "", {}, timeout=200, device="cuda")[0][0]
    ((texts, _, drafted),) = run_ranks(answers, 1, head, runtime, timeout=200, device="cuda")
    assert texts == known and drafted > 30
