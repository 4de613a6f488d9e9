"""The choice of a token in torch against the definition in Python's integers; draws follow the probabilities.

Letters: B rows · V vocabulary.
"""

import math

import pytest
import torch
from choosing import WAYS, Values, chi_square, hashed, kinds_of_logits, reference, rows_of

from epmoe.layers import sampling

KINDS = list(kinds_of_logits(64))


def expected(logits_BV: torch.Tensor, ways: list[Values]) -> list[int]:
    rows = rows_of(logits_BV, ways)
    seeds, positions = rows.params.seed_S[rows.sequence_B].tolist(), rows.position_B.tolist()
    found = zip(logits_BV, ways, seeds, positions, strict=True)
    return [reference(logits_V, values, seed, position).id for logits_V, values, seed, position in found]


@pytest.mark.parametrize("vocab", [1, 5, 7001])
@pytest.mark.parametrize("kind", KINDS)
def test_the_definition(kind: str, vocab: int) -> None:
    logits_BV = kinds_of_logits(vocab)[kind].expand(len(WAYS), -1)
    assert sampling.choose(*rows_of(logits_BV, WAYS)).tolist() == expected(logits_BV, WAYS)


@pytest.mark.parametrize("values", WAYS[1:], ids=str)
def test_what_is_kept(values: Values) -> None:
    """Of each kind of logits exactly those tokens, with these weights: a draw would tell one of many."""
    for kind, logits_V in kinds_of_logits(900).items():
        weight_V = sampling.weights(logits_V[None], torch.tensor([values[:1]], dtype=torch.float64))[0]
        sampling.drop(weight_V, logits_V, values)
        wanted = {id: weight for id, weight in reference(logits_V, values, 0, 0).weight.items() if weight}
        assert {id: int(weight_V[id]) for id in weight_V.nonzero()[:, 0].tolist()} == wanted, kind


def test_half_of_four_equal_tokens_are_two() -> None:
    """And three of them, of the lowest ids, are more than half."""
    logits_V, weight_V = torch.zeros(4), torch.full((4,), 1 << 40)
    assert sampling.first(logits_V, weight_V, 2 << 40, 28.5).tolist() == [True, True, False, False]
    assert sampling.first(logits_V, weight_V, (2 << 40) + 1, 28.5).tolist() == [True, True, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_yields_no_token(bad: float) -> None:
    logits_BV = kinds_of_logits(50)["ordinary"].repeat(len(WAYS), 1)
    wanted = expected(logits_BV, WAYS)
    logits_BV[::2, 31] = bad
    found = sampling.choose(*rows_of(logits_BV, WAYS)).tolist()
    assert found[::2] == [50] * len(found[::2])
    assert found[1::2] == wanted[1::2]
    chosen_B, _, logprob_BQ = sampling.top_logprobs(logits_BV, torch.full((len(WAYS),), 3), 2)
    assert chosen_B.isfinite().tolist() == [row % 2 == 1 for row in range(len(WAYS))]
    assert torch.equal(logprob_BQ.isfinite().all(1), chosen_B.isfinite())


def test_hash_equals_python_integers() -> None:
    """int64 products and shifts in torch are the 64-bit arithmetic that the definition means."""
    for seed, position in [(0, 0), (1, 0), (2**63 - 1, 131071), (12345, 7)]:
        found = sampling.hash_bits(torch.tensor([seed]), torch.tensor([position]))
        assert int(found) & (2**64 - 1) == hashed(seed, position)


def test_each_bit_of_seed_and_position_moves_half_of_the_bits() -> None:
    """Avalanche: over many keys, one changed input bit flips each output bit with probability 0.47 … 0.53."""
    base_2n = torch.randint(0, 2**20, (2, 4000), generator=torch.Generator().manual_seed(1))
    for which in range(2):
        for bit in range(18):
            changed_2n = base_2n.clone()
            changed_2n[which] ^= 1 << bit
            flips_n = sampling.hash_bits(*base_2n) ^ sampling.hash_bits(*changed_2n)
            flips_64 = (flips_n[:, None] >> torch.arange(64) & 1).double().mean(0)
            assert (flips_64 - 0.5).abs().max() < 0.035, (which, bit)


def test_scaled_bits_are_exact() -> None:
    bits = [0, 1, -1, 1 << 63, (1 << 63) - 1, 0x0123456789ABCDEF, 0xFFFFFFFF, 0xFFFFFFFF00000000]
    totals = [1, 2, 3, 1 << 40, (1 << 58) - 1, 1 << 60, 0x3FFFFFFFFFFFFFF, 0xFFFFFFFF]
    signed = [each - (1 << 64) if each >> 63 == 1 else each for each in bits]
    for total in totals:
        found_B = sampling.scaled(torch.tensor(signed), torch.full((len(bits),), total))
        assert found_B.tolist() == [(each % (1 << 64)) * total >> 64 for each in bits]


@pytest.mark.parametrize("kind", ["ordinary", "flat", "peaked", "few values"])
def test_frequencies_of_100_000_draws(kind: str) -> None:
    """Over positions of one seed: within 4 sigma of χ² of the softmax in float64; and not of another temperature's."""
    draws, logits_V = 100_000, kinds_of_logits(80)[kind]
    params = rows_of(logits_V[None], [(1.5, 0, 1.0, 0.0)]).params
    handle = int((params.value_SP[:, 0] == 1.5).nonzero())
    ids = sampling.choose(logits_V.expand(draws, -1), torch.full((draws,), handle), torch.arange(draws), params, None)
    assert abs(chi_square(ids, (logits_V.double() / 1.5).softmax(0))) < 4
    if kind not in ("flat", "peaked"):
        assert abs(chi_square(ids, (logits_V.double() / 1.4).softmax(0))) > 4


@pytest.mark.parametrize("values", [(1.0, 7, 1.0, 0.0), (0.8, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.05)], ids=str)
def test_frequencies_of_what_is_kept(values: Values) -> None:
    """Over seeds at one position; in float64, the filters as transformers' definitions."""
    draws, logits_V = 6_000, kinds_of_logits(80)["ordinary"]
    temperature, top_k, top_p, min_p = values
    probability_V = (logits_V.double() / temperature).softmax(0)
    sorted_V, order_V = probability_V.sort(descending=True)
    kept_V = (torch.arange(80) < (top_k or 80)) & (sorted_V.cumsum(0) - sorted_V < top_p)
    kept_V &= sorted_V >= min_p * sorted_V[0]
    probability_V[order_V[~kept_V]] = 0
    params = sampling.SamplingTensors(
        torch.tensor([values], dtype=torch.float64).expand(draws, -1),
        torch.arange(draws) * 7,
        torch.zeros(draws, dtype=torch.int32),
    )
    ids = sampling.choose(logits_V.expand(draws, -1), torch.arange(draws), torch.full((draws,), 5), params, None)
    assert set(ids.tolist()) <= set(probability_V.nonzero()[:, 0].tolist())
    assert abs(chi_square(ids, probability_V / probability_V.sum())) < 4


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities(kind: str) -> None:
    """In float64, within the weights' unit of 2^-40; ties to the lower id."""
    logits_V = kinds_of_logits(900)[kind]
    id_B = torch.tensor([0, 17, 600, 899])
    chosen_B, id_BQ, logprob_BQ = sampling.top_logprobs(logits_V.expand(4, -1), id_B, 20)
    exact_V = logits_V.double().log_softmax(0)
    order = sorted(range(900), key=lambda id: (-float(logits_V[id]), id))[:20]
    assert id_BQ.tolist() == [order] * 4
    torch.testing.assert_close(chosen_B, exact_V[id_B], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(logprob_BQ[0], exact_V[order], rtol=1e-12, atol=1e-9)
    assert sampling.top_logprobs(logits_V.expand(4, -1), id_B, 0)[1].shape == (4, 0)
    assert sampling.top_logprobs(logits_V[None, :7], id_B[:1], 20)[1].shape == (1, 7)
