"""Adjustments against float64 and transformers; each row by its own needs, the same in any batch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_model import EOS, FakeCache, FakeModel, expected, outputs, some_requests
from loading import rank_of
from sampling import adjustments
from transformers import RepetitionPenaltyLogitsProcessor

from epmoe.engine.adjust import check_adjustments, packed, words
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import ALL_KEPT, MOST_LISTED, Request, SamplingParams
from epmoe.engine.sampler import kind
from epmoe.errors import UserError
from epmoe.layers.adjust import adjust, unpacked

VOCAB, END = 333, 5  # no multiple of 32
PARAMS = [
    SamplingParams(),
    SamplingParams(frequency_penalty=0.7),
    SamplingParams(presence_penalty=-1.3),
    SamplingParams(frequency_penalty=-0.3, presence_penalty=2.0, repetition_penalty=1.3),
    SamplingParams(logit_bias={3: -100.0, 17: 100, 332: 0.125}),  # type: ignore[arg-type]
    SamplingParams(allowed_token_ids=(0, 31, 32, 332)),
    SamplingParams(min_tokens=9, stop_token_ids=(11,)),
    SamplingParams(
        repetition_penalty=0.8, frequency_penalty=1.9, logit_bias=((5, 3.5),), min_tokens=7, allowed_token_ids=(5, 6, 7)
    ),
]
SAID: list[list[int]] = [[1, 2, 1], [1, 1, 1, 8], [3], [9] * 40, [3, 3], [0], [1, 2], [6, 6, 5]]
PROMPT = [4, 9, 6, 332]


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 5


def by_hand(row: list[float], params: SamplingParams, said: Sequence[int], position: int) -> list[float]:
    """The definition, token by token, in Python's float64."""
    params, found = params.settled(), []
    ends = {END, *params.stop_token_ids}
    repetition, frequency, presence = params.penalties()
    for id, logit in enumerate(row):
        if id in PROMPT or id in said:
            logit = logit / repetition if logit >= 0 else logit * repetition
        logit -= said.count(id) * frequency + (presence if id in said else 0)
        logit += dict(params.logit_bias).get(id, 0)
        early = id in ends and position < params.min_tokens
        if early or (params.allowed_token_ids is not None and id not in params.allowed_token_ids):
            logit = -math.inf
        found.append(logit)
    return found


def adjusted(rows: Sequence[int], raw_BV: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
    """Of these rows of PARAMS in one call."""
    params, said = [PARAMS[row].settled() for row in rows], [SAID[row] for row in rows]
    seen_BV = torch.zeros(len(rows), VOCAB, dtype=torch.bool)
    for row, ids in enumerate(said):
        seen_BV[row, [*PROMPT, *ids]] = True
    ends = [[END, *each.stop_token_ids] for each in params]
    together = adjustments(params, raw_BV, seen_BV, said, ends)
    kind_B = torch.tensor([kind(each) for each in params])
    return adjust(raw_BV[list(rows)], together, kind_B, torch.tensor(positions))


@pytest.mark.parametrize("positions", [3, 7, 9])
def test_the_definition_in_float64(positions: int) -> None:
    """Four roundings of float32 lie between the two."""
    raw = logits(len(PARAMS))
    before = raw.clone()
    found = adjusted(range(len(PARAMS)), raw, [positions] * len(PARAMS))
    assert torch.equal(raw, before)
    for row, params in enumerate(PARAMS):
        wanted = torch.tensor(by_hand(raw[row].double().tolist(), params, SAID[row], positions), dtype=torch.float64)
        assert torch.equal(found[row].isfinite(), wanted.isfinite())
        kept = wanted.isfinite()
        torch.testing.assert_close(found[row][kept].double(), wanted[kept], rtol=1e-6, atol=1e-5)
        assert int(found[row].argmax()) == int(wanted.argmax())


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    raw, positions = logits(len(PARAMS)), list(range(4, 4 + len(PARAMS)))
    together = adjusted(range(len(PARAMS)), raw, positions)
    assert torch.equal(together[0], raw[0])  # it asks for nothing
    order = [6, 2, 0, 7, 5, 1, 4, 3]
    assert torch.equal(adjusted(order, raw, [positions[row] for row in order]), together[order])
    for row in range(len(PARAMS)):
        assert torch.equal(adjusted([row], raw, [positions[row]])[0], together[row])


def test_repetition_as_transformers() -> None:
    raw = logits(3)
    ids = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(5))
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter_(1, ids, True)
    params = [SamplingParams(repetition_penalty=1.7).settled()] * 3
    found = adjust(raw, adjustments(params, raw, seen), torch.ones(3).int(), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.7)(ids, raw))


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 3112])
def test_bits_and_back(vocab: int) -> None:
    ids = [id for id in range(vocab) if id % 3 == 0 or id == vocab - 1]
    word_W = torch.from_numpy(packed(ids, vocab))
    assert word_W.dtype == torch.int32 and len(word_W) == words(vocab)
    assert unpacked(word_W[None], vocab)[0].nonzero()[:, 0].tolist() == ids


def test_who_needs_what() -> None:
    kept = [sorted(params.kept) for params in PARAMS]
    assert kept == [[], ["count"], ["count"], ["count", "seen"], ["listed"], ["allowed"], ["listed"], sorted(ALL_KEPT)]
    assert not SamplingParams(temperature=1.0, top_p=0.5, repetition_penalty=1.0, logprobs=3).kept


def test_what_cannot_be_is_refused() -> None:
    many = tuple((id, 1.0) for id in range(MOST_LISTED))
    check_adjustments(SamplingParams(logit_bias=many), [END], 3)
    with pytest.raises(UserError, match=rf"^prompt 3: .* name {MOST_LISTED + 1} token ids.*may name {MOST_LISTED}: "):
        check_adjustments(SamplingParams(logit_bias=many, min_tokens=1), [END], 3)
    none = SamplingParams(min_tokens=1, allowed_token_ids=(END, 6))
    check_adjustments(none, [END], 1)
    with pytest.raises(UserError, match=r"^prompt 1: min_tokens=1 leaves none of allowed_token_ids=\[5, 6\], which "):
        check_adjustments(none, [END, 6], 1)


def engine(**limits: Any) -> Engine:
    model: Any = FakeModel()
    cache: Any = FakeCache()
    return Engine(model, cache, rank_of(0, 1), EngineConfig(eos_ids=[EOS], **limits))


def test_adjusted_rows_and_their_neighbours() -> None:
    """What each asks for is seen in its answer, whose ids are as alone; who asks for nothing has the greedy model's."""
    asked = some_requests(12)
    kinds: list[dict[str, Any]] = [
        {},
        {"allowed_token_ids": (7, 9, EOS)},
        {"logit_bias": {20: 100.0}, "ignore_eos": True},
        {"min_tokens": 3, "stop_token_ids": (5,), "logit_bias": {5: 90.0}},
        {"frequency_penalty": 2.0, "logit_bias": {i: 90.0 for i in (1, 2, 3)}, "ignore_eos": True},
        {"presence_penalty": -2.0},
    ]
    asked = [
        replace(each, params=replace(each.params, max_new_tokens=8, **kinds[number % 6]))
        for number, each in enumerate(asked)
    ]
    found = outputs(engine(prefill_chunk=9).generate(asked))
    assert found == outputs(engine(max_batch=1).generate(asked))
    for number, (ids, _) in enumerate(found):
        kind = number % 6
        if kind == 0:
            assert found[number] == expected(asked[number])
        assert kind != 1 or set(ids) <= {7, 9, EOS}
        assert kind != 2 or set(ids) == {20}
        assert kind != 3 or (len(ids) == 4 and not {5, EOS} & set(ids[:3]) and ids[3] == 5)
        assert kind != 4 or set(ids) == {1, 2, 3}


def test_a_handle_forgets_what_its_sequence_asked_for() -> None:
    """One place, taken in turns by requests that want masks and biases, and by others that do not."""
    tested = engine(max_batch=1)
    bare = some_requests(4)
    masked = [
        Request(each.ids, SamplingParams(max_new_tokens=4, allowed_token_ids=(1, 2), logit_bias={1: 50}, min_tokens=2))  # type: ignore[arg-type]
        for each in bare
    ]
    turns = [each for pair in zip(masked, bare, strict=True) for each in pair]
    found = outputs(tested.generate(turns))
    assert found[1::2] == [expected(each) for each in bare]
    assert all(set(ids) <= {1, 2} for ids, _ in found[::2])
