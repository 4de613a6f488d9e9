"""The sampler: exact greedy, filters as transformers', draws that depend on (seed, position) and the row alone."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from choosing import chi_square
from sampling import adjustments, log_probabilities, sample
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from epmoe.engine import sampler
from epmoe.engine.request import Level, SamplingParams
from epmoe.errors import UserError
from epmoe.layers import sampling


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """bool [V]: what the filters leave."""
    values = params.settled().row()
    weight_V = sampling.weights(logits_V[None], torch.tensor([values[:1]]))[0]
    sampling.drop(weight_V, logits_V, values)
    return weight_V > 0


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    tied = torch.zeros(3, 1000)
    tied[0, [7, 500, 999]] = 4.0
    tied[1] = -2.0
    tied[2, [998, 999]] = 1.0
    assert sample(tied, [SamplingParams()] * 3, [0] * 3).tolist() == [7, 0, 998]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_yields_no_token(bad: float) -> None:
    broken = logits(4, 50)
    broken[:3, 3] = bad
    cold, warm, filtered = SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=5)
    for params in ([cold] * 4, [cold, warm, warm, warm], [cold, warm, filtered, filtered]):
        found = sample(broken, params, [0] * 4).tolist()
        assert found[:3] == [50] * 3 and 0 <= found[3] < 50


@pytest.mark.parametrize("over", [pytest.param("positions", marks=pytest.mark.slow), "seeds"])
def test_frequencies_follow_softmax(over: str) -> None:
    """20 000 draws from 60 tokens, over positions of one seed and over seeds at one position: within 4 sigma of χ²."""
    row = logits(1, 60, seed=4)
    draws = 20_000
    seeds = list(range(draws)) if over == "seeds" else [11] * draws
    positions = [9] * draws if over == "seeds" else list(range(draws))
    params = [SamplingParams(temperature=1.5, seed=seed) for seed in seeds]
    ids = sample(row.expand(draws, -1), params, positions)
    assert abs(chi_square(ids, (row[0].double() / 1.5).softmax(0))) < 4
    assert abs(chi_square(ids, (row[0].double() / 1.3).softmax(0))) > 4  # the test can tell a wrong temperature


def test_neighbouring_draws_are_independent() -> None:
    """Pairs (token at position p, token at p + 1) and (seed s, seed s + 1) fill their joint table as a product."""
    row = logits(1, 6, seed=2) / 3
    draws = 12_000
    for seeds, positions in (([3] * draws, list(range(draws))), (list(range(draws)), [3] * draws)):
        ids = sample(row.expand(draws, -1), [SamplingParams(temperature=1.0, seed=s) for s in seeds], positions)
        p = row[0].double().softmax(0)
        assert abs(chi_square(ids[:-1] * 6 + ids[1:], (p[:, None] * p).flatten())) < 4.5


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.7, top_k=5, seed=4),
    SamplingParams(temperature=1.3, top_p=0.8, seed=5, repetition_penalty=1.3),
    SamplingParams(temperature=2.0, min_p=0.1, seed=6),
    SamplingParams(repetition_penalty=5.0),
    SamplingParams(temperature=0.9, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=0.8, seed=7),
]


RECORDED = [1040, 2610, 3297, 1781, 1706, 1933, 1317]


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Rows of different parameters in one call equal each row alone and any order of rows."""
    rows = logits(len(MIXED), 777)
    seen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    positions = list(range(100, 100 + len(MIXED)))
    together = sample(rows, MIXED, positions, seen).tolist()
    alone = [
        sample(rows[b : b + 1], MIXED[b : b + 1], positions[b : b + 1], seen[b : b + 1]).item()
        for b in range(len(MIXED))
    ]
    order = [3, 0, 6, 5, 2, 4, 1]
    shuffled = sample(rows[order], [MIXED[b] for b in order], [positions[b] for b in order], seen[order]).tolist()
    assert together == alone
    assert shuffled == [together[b] for b in order]


def test_levels_are_the_least_that_serve() -> None:
    """And a higher level, which a neighbour in the batch may ask for, chooses the same tokens."""
    assert [params.level.name for params in MIXED] == [
        "GREEDY",
        "SAMPLE",
        "SAMPLE",
        "SAMPLE",
        "SAMPLE",
        "GREEDY",
        "SAMPLE",
    ]
    rows = logits(len(MIXED), 777).bfloat16().float()  # with equal logits
    seen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    found = sample(rows, MIXED, [9] * len(MIXED), seen)
    knobs, sequence_B = sampler.sampling_tensors(MIXED, rows.device), torch.arange(len(MIXED))
    asked = adjustments([each.settled() for each in MIXED], rows, seen)
    for b, params in enumerate(MIXED):
        one, position = sequence_B[b : b + 1], torch.tensor([9])
        for level in Level:
            if level >= params.level:
                assert sampler.sample(rows[b : b + 1], one, position, knobs, asked, level) == found[b]
                if not params.kept:
                    assert sampler.sample(rows[b : b + 1], one, position, knobs, None, level) == found[b]


def test_more_rows_than_go_through_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "VALUES", 60 * 5)
    count = 67
    rows = logits(count, 60)
    params = [dataclasses.replace(MIXED[b % 7], seed=b) for b in range(count)]
    seen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    alone = [sample(rows[b : b + 1], [params[b]], [b], seen[b : b + 1]).item() for b in range(count)]
    assert sample(rows, params, list(range(count)), seen).tolist() == alone


def test_recorded_tokens() -> None:
    """Other tokens for the same seed would be another sampler: texts that people kept could not be made again."""
    token_V, row_B1 = torch.arange(5000), torch.arange(len(MIXED))[:, None]
    rows = ((token_V * 7919 + row_B1 * 104729) % 10007).float() / 1000  # no generator whose stream could change
    seen = token_V % 3 == row_B1 % 3
    assert sample(rows, MIXED, list(range(40, 40 + len(MIXED))), seen).tolist() == RECORDED


@pytest.mark.gpu
def test_greedy_on_a_gpu_takes_the_lowest_of_equal_logits() -> None:
    """torch.argmax promises it; its reduction there is another one, over several blocks a row."""
    tied = torch.randn(3, 201_088, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    tied[1, [7, 100_000, 201_087]] = 40.0
    tied[2, [150_000, 9]] = float("nan")
    found = sample(tied.cuda(), [SamplingParams()] * 3, [0] * 3).tolist()
    assert found == [int((tied[0] == tied[0].max()).nonzero()[0]), 7, 201_088]


@pytest.mark.gpu
def test_tokens_on_a_gpu() -> None:
    """The hash and the integer sums are the same on every device; only a weight's last bit could differ."""
    rows = logits(len(MIXED), 20_000)
    seen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    positions = list(range(len(MIXED)))
    assert sample(rows.cuda(), MIXED, positions, seen.cuda()).tolist() == sample(rows, MIXED, positions, seen).tolist()


CASES = {
    "top_k": SamplingParams(temperature=1.0, top_k=7),
    "top_k beyond the vocabulary": SamplingParams(temperature=1.0, top_k=10_000),
    "top_p": SamplingParams(temperature=1.0, top_p=0.7),
    "top_p tiny keeps one": SamplingParams(temperature=1.0, top_p=1e-9),
    "min_p": SamplingParams(temperature=1.0, min_p=0.05),
    "min_p 1 keeps the best": SamplingParams(temperature=1.0, min_p=1.0),
    "temperature comes first": SamplingParams(temperature=2.5, top_p=0.5),
    "all": SamplingParams(temperature=0.6, top_k=40, top_p=0.9, min_p=0.02),
    "none": SamplingParams(temperature=1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_filters_keep_what_transformers_keeps(case: str) -> None:
    """Random float32 logits have no ties, where the two define top-k differently."""
    params = CASES[case]
    temperature, top_k, top_p, min_p, _ = params.row()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    for seed in range(5):
        row = logits(1, 500, seed)
        # transformers' float64 copy: its float32 cumulated sums move the border by a token now and then
        expected = warpers(torch.zeros(1, 1, dtype=torch.long), row.double())[0].isfinite()
        assert torch.equal(kept(row[0], params), expected)


def test_top_k_keeps_exactly_k_of_equal_logits() -> None:
    assert kept(torch.zeros(20), SamplingParams(temperature=1.0, top_k=3)).nonzero()[:, 0].tolist() == [0, 1, 2]


def test_top_p_keeps_no_token_beyond_p() -> None:
    """Four equal tokens are exact in integers: half of the probability is two of them."""
    assert kept(torch.zeros(4), SamplingParams(temperature=1.0, top_p=0.5)).tolist() == [True, True, False, False]


def test_filtered_tokens_are_never_drawn() -> None:
    row = logits(1, 100)
    params = SamplingParams(temperature=3.0, top_k=4)
    draws = [dataclasses.replace(params, seed=seed) for seed in range(2000)]
    ids = sample(row.expand(2000, -1), draws, [0] * 2000)
    assert set(ids.tolist()) == set(row[0].topk(4).indices.tolist())


def test_log_probabilities_are_of_the_raw_model() -> None:
    rows = logits(4, 300)
    rows[0, [5, 9]] = 40.0  # a tie at the top
    chosen = torch.tensor([9, 1, 2, 3])
    expected = rows.double().log_softmax(1)
    for b, found in enumerate(log_probabilities(rows, chosen, 3)):
        assert found.chosen == pytest.approx(expected[b, chosen[b]].item(), abs=1e-9)
        assert [value for _, value in found.top] == pytest.approx(expected[b].topk(3).values.tolist(), abs=1e-9)
    assert [token for token, _ in log_probabilities(rows, chosen, 2)[0].top] == [5, 9]


BAD: dict[str, list[Any]] = {
    "temperature": [-0.1, 1e-9, 1e7, float("nan"), float("inf")],
    "top_p": [0.0, 1.1, float("nan")],
    "min_p": [-0.1, 1.5],
    "top_k": [-1],
    "repetition_penalty": [0.0, -1.0, float("inf")],
    "seed": [-1, 2**63],
    "max_new_tokens": [0],
    "logprobs": [-1, 101],
    "stop": [("a", "")],
}


@pytest.mark.parametrize("key", BAD)
def test_values_out_of_range_are_refused_by_name(key: str) -> None:
    for value in BAD[key]:
        with pytest.raises(UserError, match=key):
            SamplingParams(**{key: value})
