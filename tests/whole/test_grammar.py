"""Answers that obey grammars: on a fake model, whatever happens around them; on real ones, JSON schemas and tools."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch
from fake_model import EOS, FakeCache, FakeModel, expected, outputs, some_requests
from fake_words import text, vocabulary
from llguidance import LLParserLimits
from loading import rank_of
from schemas import schema
from scripted import rambling
from spawn import run_ranks

from epmoe.config.compose import from_keys
from epmoe.engine.config import EngineConfig
from epmoe.engine.drafts import Costs, Drafting, History
from epmoe.engine.engine import Engine
from epmoe.engine.matcher import Grammars
from epmoe.engine.request import Finished, Request, Result, SamplingParams
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks
from epmoe.text.completion import Completion
from epmoe.text.grammar import Tool, answer, of_schema
from epmoe.text.tokenizer import Tokenizer

PATTERNS = (
    "([a-f]{3} ){5,9}",
    "(yes|no)!",
    "[A-Z][a-z]{3}( [A-Z][a-z]{3}){2}",
    "[0-9]{4}-[0-9]{2}",
    '\\{("[a-z]{1,4}": [0-9]{1,2}, ){1,3}\\}',
)
UNSPELLED = 'start: /[a-c]{3}/ "\u00e9"'  # its last letter has no id


def engine(cache: FakeCache | None = None, mine: Ranks | None = None, **limits: Any) -> Engine:
    held: Any = cache or FakeCache()
    model: Any = FakeModel()
    return Engine(model, held, mine or rank_of(0, 1), EngineConfig(eos_ids=[EOS], vocabulary=vocabulary, **limits))


def mixed(count: int = 36) -> list[Request]:
    """Three of four have a grammar, greedy or not, some with what adjusts logits besides; and prompts in common."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
        {"frequency_penalty": 1.0, "logit_bias": {70: 3.0}},
    ]
    found = []
    for number, each in enumerate(some_requests(count, 3)):
        params = replace(each.params, max_new_tokens=26, **kinds[number % 3]) if number % 4 else each.params
        if number % 4:
            params = replace(params, grammar=f"start: /{PATTERNS[number % len(PATTERNS)]}/")
        found.append(Request((*range(8), *each.ids), params))
    return found


def told(results: Sequence[Result]) -> list[Any]:
    return [(each.ids, each.finish_reason, each.logprobs) for each in results]


LIMITS: dict[str, dict[str, Any]] = {
    "one at a time": {"max_batch": 1},
    "chunks of one token": {"prefill_chunk": 1},
    "all at once": {"prefill_chunk": 4096},
    "a few": {"prefill_chunk": 7, "max_batch": 5},
}


@pytest.fixture(scope="module")
def known() -> list[Any]:
    """The answers, each alone."""
    return [told(engine().generate([each]))[0] for each in mixed()]


def test_each_answer_obeys_its_grammar(known: list[Any]) -> None:
    cut = 0
    for number, (ids, reason, _) in enumerate(known):
        if number % 4 == 0:
            assert (ids, reason) == expected(mixed()[number])
            continue
        pattern = PATTERNS[number % len(PATTERNS)]
        if reason == "length":
            cut += 1
            matcher = Grammars(vocabulary()).matcher(f"start: /{pattern}/")
            assert matcher.matcher.try_consume_tokens(list(ids)) == len(ids)
        else:
            assert reason == "eos" and re.fullmatch(pattern, text(ids)), (pattern, text(ids))
    assert 0 < cut < len(known) / 4


@pytest.mark.parametrize("case", LIMITS)
def test_batches_and_chunks_change_nothing(known: list[Any], case: str) -> None:
    assert told(engine(**LIMITS[case]).generate(mixed())) == known


@pytest.mark.parametrize("tokens", [80, 120])
def test_nor_do_put_backs_and_prefixes_that_are_found(known: list[Any], tokens: int) -> None:
    cache = FakeCache(tokens=tokens)
    tested = engine(cache, prefill_chunk=16)
    for _ in range(2):
        assert told(tested.generate(mixed())) == known and cache.empty()
    assert tested.scheduler.put_back > 3


def by_rank(mine: Ranks) -> list[Any]:
    return told(engine(mine=mine, max_batch=7).generate(mixed()))


def test_nor_do_ranks(known: list[Any]) -> None:
    assert run_ranks(by_rank, 2) == [known, known]


def test_aborts_and_failures_are_one_requests_own(known: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Some end from outside at any moment; one's grammar comes to where nothing can follow."""
    requests = mixed()
    tested, results = engine(prefill_chunk=9, max_batch=6), dict[int, Result]()
    tested.prepare_for(requests)
    failing = Request((3, 4), SamplingParams(max_new_tokens=9, grammar=UNSPELLED))
    for each in (*requests, failing):
        tested.add(each)
    for step in range(400):
        if step % 5 == 4 and (ended := tested.abort(step % 36)):
            results[step % 36] = ended
        for event in tested.step():
            if isinstance(event, Finished):
                results[event.id] = event.result
        if not tested.busy:
            break
    assert not tested.busy and sorted(results) == list(range(len(requests) + 1))
    failed = results.pop(len(requests))
    assert failed.finish_reason == "error" and failed.failure and re.fullmatch("[a-c]{3}", text(failed.ids))
    assert "epmoe: warning: request 37 cannot go on: its grammar has failed (" in capsys.readouterr().err
    for number, result in results.items():
        assert result.ids == known[number][0][: len(result.ids)]
        assert result.finish_reason == "abort" or told([result]) == [known[number]]
    assert 3 < sum(each.finish_reason == "abort" for each in results.values()) < 30
    tested.check_finite()  # a grammar's failure is not the model's


def test_a_failure_within_a_draft_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind where nothing can follow no drafted token counts, whatever its mask held."""
    asked = [Request((3, 4), SamplingParams(max_new_tokens=9, grammar=UNSPELLED))]
    ((ids, *_),) = known = told(engine().generate(asked))

    def right(self: History, most: int) -> list[int]:
        return [*ids[self.count - 2 :], *[5] * most][:most]

    monkeypatch.setattr(Drafting, "allot", lambda self, drafters, rows, room: [min(most, 5) for _, most in drafters])
    monkeypatch.setattr(History, "draft", right)
    assert told(engine(drafts=Costs.of(32, 4)).generate(asked)) == known and known[0][1] == "error"


class Spy:
    """What an engine does, in its order; a step's parts by what they launch."""

    def __init__(self, tested: Engine, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("decode", "rows", "ragged", "head"):
            self.watch(patch, tested.graphs, name)
        self.watch(patch, tested, "_land")
        self.watch(patch, tested.runner, "mask")

    def watch(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any) -> Any:
            self.calls.append(name.strip("_"))
            return real(*args)

        patch.setattr(owner, name, call)

    def take(self, tested: Engine) -> list[str]:
        tested.step()
        found, self.calls = self.calls, []
        return found


@torch.inference_mode()
def test_the_head_waits_and_the_body_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step begins before the last one's ids are read; its masks need these, and so does its head. Others wait not."""
    tested = engine(prefill_chunk=64)
    bound = SamplingParams(max_new_tokens=4, grammar="start: /[a-f]{9}/")
    free, penalised = SamplingParams(max_new_tokens=9, ignore_eos=True), SamplingParams(presence_penalty=1.0)
    requests = [Request((1, 2), bound), Request((3,), free)]
    tested.prepare_for([*requests, Request((1,), penalised)])
    spy = Spy(tested, monkeypatch)
    for each in requests:
        tested.add(each)
    assert spy.take(tested) == ["ragged", "mask", "head"]
    for _ in range(3):
        assert spy.take(tested) == ["rows", "land", "mask", "head"]
    assert spy.take(tested) == ["decode", "land"]  # the one with the grammar has all its tokens under way
    assert [spy.take(tested) for _ in range(3)] == [["decode", "land"]] * 3
    tested.add(Request((7,), replace(penalised, max_new_tokens=3, ignore_eos=True)))
    assert spy.take(tested) == ["ragged", "head", "land"]  # nothing to wait for
    assert spy.take(tested) == ["rows", "head", "land"]


def test_what_is_refused() -> None:
    tested = engine()
    for params, message in (
        ({"grammar": "start: ("}, r"^prompt 1: the grammar is refused \(.*\): mend it$"),
        ({"grammar": "start: /a/", "min_tokens": 2}, r"^prompt 1 has min_tokens=2 and a grammar, "),
        ({"grammar": "start: /a/", "allowed_token_ids": (3,)}, r"^prompt 1 has allowed_token_ids=\(3,\) and a grammar"),
    ):
        with pytest.raises(UserError, match=message):
            tested.generate([Request((1,), SamplingParams(**params))])
    held: Any = FakeCache()
    model: Any = FakeModel()
    for config, what in (
        (EngineConfig(eos_ids=[EOS]), "tokenizer"),
        (EngineConfig(vocabulary=vocabulary), r"end-of-text id \(eos_token_id\)"),
    ):
        with pytest.raises(UserError, match=f"^prompt 1: a grammar needs the checkpoint's {what}, which it lacks"):
            Engine(model, held, rank_of(0, 1), config).generate([Request((1,), SamplingParams(grammar="start: /a/"))])
    assert outputs(tested.generate(some_requests(3))) == [expected(each) for each in some_requests(3)]


# On real models

PROMPT = "The answer is "


def schemas_on(mine: Ranks, numbers: Sequence[int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The embedded model's answers to some schemas, half of them sampled, with two free ones among them."""
    with LLM.opened(from_keys({"runtime": {"device": "cpu", "max_batch": 32}}), mine) as llm:
        llm.load()
        params = [
            SamplingParams(grammar=obeying(llm.tokenizer, number), temperature=number % 2, seed=number, max_tokens=250)
            for number in numbers
        ]
        free = [SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, temperature=1.0, seed=5, logprobs=1)]
        found = llm.generate([PROMPT] * (len(params) + 2), [free[0], *params, free[1]])
        alone = llm.generate([PROMPT] * 2, free)
        assert [same(found[0]), same(found[-1])] == list(map(same, alone))
    return [(each.text, each.finish_reason, each.ids) for each in found[1:-1]]


def same(each: Completion) -> Any:
    return each.ids, each.logprobs


def obeying(tokenizer: Tokenizer, number: int) -> str:
    grammar = answer(tokenizer, (), of_schema(schema(number)))
    assert grammar is not None
    return grammar


@pytest.mark.parametrize("numbers", [range(11, 17), pytest.param(range(40), marks=pytest.mark.slow)], ids=len)
def test_json_schemas(numbers: range) -> None:
    """Every answer that was not cut is valid; a cut one says so, and is a valid beginning."""
    (found,) = run_ranks(schemas_on, 1, numbers, timeout=200)
    cut = 0
    for number, (answered, reason, _) in zip(numbers, found, strict=True):
        if reason == "length":
            cut += 1
            continue
        assert reason == "eos"
        jsonschema.Draft202012Validator(schema(number)).validate(json.loads(answered))
    assert cut <= len(numbers) / 20
    known = dict(zip(numbers, found, strict=True))
    some = [number for number, (_, reason, ids) in known.items() if len(ids) < 60 or reason == "length"][:3]
    on_two = run_ranks(schemas_on, 2, some, timeout=200)
    assert on_two[0] == on_two[1] == [known[number] for number in some]


TOWN = {"type": "string", "pattern": "^[A-Z][a-z]{2,6}$"}
RAIN = {"type": "object", "properties": {"town": TOWN}, "required": ["town"], "additionalProperties": False}
TOOLS = [Tool("rain", RAIN), Tool("now", {"type": "object", "properties": {}, "additionalProperties": False})]
TURNS: dict[str, tuple[dict[str, Any], set[str | None]]] = {
    "a schema": ({"body": of_schema(RAIN)}, {None}),
    "a schema or a call": ({"body": of_schema(RAIN), "tools": TOOLS}, {None, "functions.rain", "functions.now"}),
    "a call": ({"tools": TOOLS, "choice": "required"}, {"functions.rain", "functions.now"}),
    "one call": ({"tools": TOOLS, "choice": "rain"}, {"functions.rain"}),
}


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(rambling(tmp_path_factory.mktemp("harmony") / "checkpoint"))


def turns(mine: Ranks, checkpoint: str, count: int) -> list[Any]:
    """So many answers of each kind in one batch; what is thought is short, since its end has a bias."""
    keys = {"checkpoint": checkpoint, "runtime": {"device": "cpu", "max_batch": 16}}
    with LLM.opened(from_keys(keys), mine) as llm:
        llm.load()
        messages = [{"role": "user", "content": "Rain?"}]
        prompt = llm.tokenizer.encode("<|start|>user<|message|>Rain?<|end|><|start|>assistant", special=False)
        end = llm.tokenizer.tokenizer.token_to_id("<|end|>")
        params = [
            SamplingParams(
                grammar=answer(llm.tokenizer, prompt, **asked),
                temperature=float(seed > 0),
                seed=seed,
                max_tokens=200,
                logit_bias=((end or 0, 5.0),),
            )
            for asked, _ in TURNS.values()
            for seed in range(count)
        ]
        found = llm.chat([messages] * len(params), params)
        assert found[0].prompt_ids == tuple(prompt)
    return [(each.finish_reason, each.messages, each.ids) for each in found]


def test_harmony_answers_and_calls(harmony: str) -> None:
    """Whatever a model with random weights thinks, it ends in a message or a call that obeys; the same on two ranks."""
    (found,) = run_ranks(turns, 1, harmony, 6)
    some = [each for number, each in enumerate(found) if number % 6 < 2]
    assert run_ranks(turns, 2, harmony, 2) == [some, some]
    ended, thought, asked = 0, 0, [each for each in TURNS.values() for _ in range(6)]
    recipients: dict[int, set[str | None]] = {}
    for number, (reason, messages, _) in enumerate(found):
        if reason == "length":
            continue
        ended += 1
        thought += len(messages) > 1
        last = messages[-1]
        assert reason == "eos" and last.complete and last.channel == ("commentary" if last.recipient else "final")
        assert {(each.channel, each.recipient) for each in messages[:-1]} <= {("analysis", None), ("commentary", None)}
        jsonschema.validate(json.loads(last.text), TOOLS[1].parameters if last.recipient == "functions.now" else RAIN)
        recipients.setdefault(number // 6, set()).add(last.recipient)
        assert last.recipient in asked[number][1]
    assert ended > 15 and thought > 2
    assert set().union(*recipients.values()) == {None, "functions.rain", "functions.now"}


def test_one_that_fails_in_the_step_of_its_prompt_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has given its pages back before the step that read its prompt has ended."""
    limits = LLParserLimits(max_lexer_states=100, step_lexer_fuel=100_000, verbose_errors=False)
    monkeypatch.setattr("epmoe.engine.matcher.LIMITS", limits)
    grammar = "start: /([A-Z]|[a-z])*[A-Z]([a-z]|[A-Z]){40}/"
    kinds: list[dict[str, Any]] = [{"grammar": grammar, "temperature": 1.0, "seed": seed} for seed in range(3)]
    requests = [
        Request(tuple(range(9)), SamplingParams(max_new_tokens=200, ignore_eos=True, **kind)) for kind in [*kinds, {}]
    ]
    results = engine(max_batch=1).generate(requests)
    assert [each.finish_reason for each in results] == [*["error"] * 3, "length"]
    assert "lexer" in results[0].failure
