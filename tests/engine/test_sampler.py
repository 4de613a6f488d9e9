"""The sampler: exact greedy, filters as transformers', noise that depends on (seed, position, token id) alone."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import adjustments, log_probabilities, sample
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from epmoe.engine import sampler
from epmoe.engine.adjust import Adjustments, Listed
from epmoe.engine.request import Level, SamplingParams
from epmoe.errors import UserError

MASK = 2**64 - 1


def splitmix(z: int) -> int:
    """The finaliser in Python integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def kept(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """bool [V]: what the filters leave."""
    knobs = sampler.SamplingTensors.of([params], logits_V.device)
    return sampler._filter(logits_V[None], knobs, sampler.Level.FILTER)[0].isfinite()


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


def test_hash_equals_python_integers() -> None:
    """int64 products and shifts in torch are the 64-bit arithmetic that the definition means."""
    cases = [(0, 0, 0), (1, 0, 0), (2**63 - 1, 131071, 201087), (12345, 7, 3)]
    for seed, position, token in cases:
        golden = 0x9E3779B97F4A7C15
        start = splitmix((splitmix((seed + golden) & MASK) + position * golden) & MASK)
        expected = splitmix((start + (token + 1) * golden) & MASK)
        found = sampler.hash_bits(torch.tensor([seed]), torch.tensor([position]), torch.tensor([token]))
        assert int(found) & MASK == expected


def test_each_bit_of_seed_position_and_token_moves_half_of_the_bits() -> None:
    """Avalanche: over many keys, one changed input bit flips each output bit with probability 0.47 … 0.53."""
    base = torch.randint(0, 2**20, (3, 4000), generator=torch.Generator().manual_seed(1))
    for which in range(3):
        for bit in range(18):
            changed = base.clone()
            changed[which] ^= 1 << bit
            a, b = (sampler.hash_bits(s, p, t[:, None])[:, 0] for s, p, t in (diagonal(base), diagonal(changed)))
            flips_64 = ((a ^ b)[:, None] >> torch.arange(64) & 1).double().mean(0)
            assert (flips_64 - 0.5).abs().max() < 0.035, (which, bit)


def diagonal(key_3n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return key_3n[0], key_3n[1], key_3n[2, :]


@given(st.integers(1, 300), st.lists(st.integers(1, 299), max_size=6), st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_noise_is_the_same_for_any_slice_of_the_vocabulary(vocab: int, cuts: list[int], seed: int) -> None:
    """Ranks that each hold a slice of the vocabulary must see the bits that one rank sees."""
    seed_B, position_B = torch.tensor([seed, 5]), torch.tensor([3, 4])
    whole = sampler.gumbel(seed_B, position_B, torch.arange(vocab))
    edges = sorted({0, vocab, *(c for c in cuts if c < vocab)})
    parts = [sampler.gumbel(seed_B, position_B, torch.arange(a, b)) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(sampler.gumbel(seed_B[1:], position_B[1:], torch.arange(vocab))[0], whole[1])


@pytest.mark.parametrize("threads", [1, 2])
def test_noise_and_choice_do_not_depend_on_threads(threads: int) -> None:
    before = torch.get_num_threads()
    one, two = torch.tensor([1]), torch.tensor([2])
    whole = sampler.gumbel(one, two, torch.arange(120_000))
    try:
        torch.set_num_threads(threads)
        assert torch.equal(sampler.gumbel(one, two, torch.arange(120_000)), whole)
    finally:
        torch.set_num_threads(before)


def chi_square(ids: torch.Tensor, probability_V: torch.Tensor) -> float:
    """(χ² − dof) / √(2·dof): about standard normal when the frequencies follow the probabilities."""
    expected = probability_V * len(ids)
    enough = expected > 5
    counts = torch.bincount(ids, minlength=len(probability_V)).double()
    statistic = ((counts - expected)[enough] ** 2 / expected[enough]).sum()
    dof = int(enough.sum())
    return float((statistic - dof) / (2 * dof) ** 0.5)


@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_frequencies_follow_softmax(over: str) -> None:
    """40 000 draws from 60 tokens, over positions of one seed and over seeds at one position: within 4 sigma of χ²."""
    row = logits(1, 60, seed=4)
    draws = 40_000
    seeds = list(range(draws)) if over == "seeds" else [11] * draws
    positions = [9] * draws if over == "seeds" else list(range(draws))
    params = [SamplingParams(temperature=1.5, seed=seed) for seed in seeds]
    ids = sample(row.expand(draws, -1), params, positions)
    assert abs(chi_square(ids, (row[0].double() / 1.5).softmax(0))) < 4
    assert abs(chi_square(ids, (row[0].double() / 1.3).softmax(0))) > 4  # the test can tell a wrong temperature


def test_neighbouring_draws_are_independent() -> None:
    """Pairs (token at position p, token at p + 1) and (seed s, seed s + 1) fill their joint table as a product."""
    row = logits(1, 6, seed=2) / 3
    draws = 20_000
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


RECORDED = [1040, 1373, 2257, 491, 4586, 1933, 924]


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
        "FILTER",
        "FILTER",
        "SAMPLE",
        "GREEDY",
        "FILTER",
    ]
    rows = logits(len(MIXED), 777).bfloat16().float()  # with equal logits
    seen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    found = sample(rows, MIXED, [9] * len(MIXED), seen)
    for b, params in enumerate(MIXED):
        for level in sampler.Level:
            if level >= params.level:
                knobs, one = sampler.SamplingTensors.of([params], rows.device), slice(b, b + 1)
                asked = adjustments([params.settled()], rows[one], seen[one])
                assert sampler.sample(rows[one], knobs, torch.tensor([9]), asked, level) == found[b]
                if not params.kept:
                    assert sampler.sample(rows[one], knobs, torch.tensor([9]), None, level) == found[b]


def test_more_rows_than_are_filtered_at_a_time() -> None:
    count = sampler.FILTER_ROWS * 2 + 3
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
    """The hash and the integer sums are the same on every device; only a logarithm's last bit could differ."""
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
    temperature, top_k, top_p, min_p = params.row()
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
    "temperature": [-0.1, 1e-9, float("nan"), float("inf")],
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


@pytest.mark.parametrize("level", Level)
def test_the_sampler_never_looks_at_values(level: Level) -> None:
    """On the meta device there are none: whatever would wait for a GPU fails here."""
    meta = torch.device("meta")
    params = sampler.SamplingTensors(
        torch.empty(40, 4, dtype=torch.float64, device=meta), torch.empty(40, dtype=torch.int64, device=meta)
    )
    position, rows = torch.empty(40, dtype=torch.int64, device=meta), torch.empty(40, 300, device=meta)
    on_host = adjustments([SamplingParams().settled()] * 40, torch.empty(40, 300), torch.zeros(40, 300).bool())
    assert on_host.listed and on_host.seen_BV is not None
    held = (on_host.penalty_B3, on_host.seen_BV, on_host.count_BV, on_host.allowed_BW)
    penalties, seen, count, allowed = (each.to(meta) for each in held if each is not None)
    asked = Adjustments(penalties, seen, count, Listed(*(each.to(meta) for each in on_host.listed)), allowed)
    for each in (None, asked):
        assert sampler.sample(rows, params, position, each, level).shape == (40,)
