"""Sampler: logits → the next token's id, the same on every rank, in every batch and for every split of the vocabulary.

The order: adjustments of the raw logits (adjust.py: penalties → biases → masks), then transformers' filters
(temperature → top-k → top-p → min-p). What is left is sampled by the Gumbel trick, argmax(score + noise), whose noise
is a hash of (seed, position, token id): there is no generator state, so a token does not depend on the batch, the row,
the rank or the order of requests.

Sums over the vocabulary (the normaliser, the cumulated probability of top-p) are sums of integers, probabilities in
units of 2^-40 of the largest one. Integer sums are exact in any order, so no kernel, thread count or batch shape and no
later split over ranks can move a token across a threshold.

Letters: B rows (sequences) · V vocabulary · P parameters of a row · Q log-probabilities asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from epmoe.engine.adjust import Adjustments, adjust
from epmoe.engine.request import Level, SamplingParams, TokenLogprobs
from epmoe.layers.greedy import finite_rows
from epmoe.layers.twin import twin

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
UNIT = 2.0**40  # weight of the most likely token; 2^40 · 2^22 tokens still fits int64
# Filters work in float64 and int64: this many rows at a time, so that a batch of 256 rows and 200 000 tokens takes no
# more than a few hundred megabytes.
FILTER_ROWS = 32


@dataclass(frozen=True)
class SamplingTensors:
    """The parameters of B rows as tensors."""

    value_BP: torch.Tensor  # float64: temperature, top-k, top-p, min-p
    seed_B: Any  # an int64 tensor; Any since a seed may be left out, which a request's is not

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device) -> "SamplingTensors":
        value_BP = torch.tensor([each.row() for each in params], dtype=torch.float64)
        seed_B = torch.tensor([each.settled().seed for each in params], dtype=torch.int64)
        return SamplingTensors(value_BP.to(device), seed_B.to(device))

    def __getitem__(self, rows: slice | torch.Tensor) -> "SamplingTensors":
        return SamplingTensors(self.value_BP[rows], self.seed_B[rows])

    def columns(self) -> tuple[torch.Tensor, ...]:
        """Four float64 [B, 1]."""
        return self.value_BP.split(1, dim=1)


def sample(
    logits_BV: torch.Tensor,
    params: SamplingTensors,
    position_B: torch.Tensor,
    adjustments: Adjustments | None,
    level: Level,
) -> torch.Tensor:
    """Choose one token a row: int64 [B] on the logits' device. A row that is not finite yields V, which is no token.

    Everything is on the device and nothing waits for it, so it fits a CUDA graph. Does not change its arguments.

    Args:
        position_B: the index that the chosen token will have in its sequence.
        adjustments: of the logits; None: they stay as they are. What is not finite is told by the raw ones.
        level: at least that of every row.
    """
    assert logits_BV.dtype == torch.float32
    if level == Level.GREEDY and adjustments is None:
        greedy = twin("greedy", logits_BV)
        id_B: torch.Tensor = greedy.join_largest(greedy.largest(logits_BV, 0), logits_BV.shape[1])
        return id_B
    chunks = [slice(begin, begin + FILTER_ROWS) for begin in range(0, len(logits_BV), FILTER_ROWS)]
    chosen = [
        _sample(logits_BV[rows], params[rows], position_B[rows], adjustments and adjustments[rows], level)
        for rows in chunks
    ]
    return torch.where(finite_rows(logits_BV), torch.cat(chosen), logits_BV.shape[1])


def _sample(
    scores_BV: torch.Tensor,
    params: SamplingTensors,
    position_B: torch.Tensor,
    adjustments: Adjustments | None,
    level: Level,
) -> torch.Tensor:
    if adjustments is not None:
        scores_BV = adjust(scores_BV, adjustments, position_B)
    if level == Level.GREEDY:
        return scores_BV.argmax(1)
    token_V = torch.arange(scores_BV.shape[1], device=scores_BV.device)
    noisy_BV = _filter(scores_BV, params, level) + gumbel(params.seed_B, position_B, token_V)
    warm_B = params.value_BP[:, 0] > 0
    # torch.argmax promises the first of equal values, and bf16 logits are equal often.
    return torch.where(warm_B, noisy_BV.argmax(1), scores_BV.argmax(1))


def top_logprobs(
    logits_BV: torch.Tensor, id_B: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log softmax of the raw logits (before penalty, temperature and filters) at `id_B` and for the `top` largest.

    On the device: chosen_B (float64), id_BQ (int64), logprob_BQ (float64). Ties go to the lower id.
    """
    logits_BV = logits_BV.double()
    max_B1 = logits_BV.amax(1, keepdim=True)
    total_B1 = _weights(logits_BV).sum(1, keepdim=True)
    logprob_BV = logits_BV - max_B1 - torch.log(total_B1.double() / UNIT)
    if not top:
        return logprob_BV.gather(1, id_B[:, None])[:, 0], id_B.new_empty(len(id_B), 0), logprob_BV[:, :0]
    id_BQ = logits_BV.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return logprob_BV.gather(1, id_B[:, None])[:, 0], id_BQ, logprob_BV.gather(1, id_BQ)


def to_logprobs(chosen_B: torch.Tensor, id_BQ: torch.Tensor, logprob_BQ: torch.Tensor) -> list[TokenLogprobs]:
    tops = zip(id_BQ.tolist(), logprob_BQ.tolist(), strict=True)
    return [
        TokenLogprobs(chosen, tuple(zip(ids, values, strict=True)))
        for chosen, (ids, values) in zip(chosen_B.tolist(), tops, strict=True)
    ]


def gumbel(seed_B: torch.Tensor, position_B: torch.Tensor, token_V: torch.Tensor) -> torch.Tensor:
    """float64 [B, V] of standard Gumbel noise; an element is a function of (seed, position, token id) alone.

    The hash bits are the same on every device, the logarithms' last bits on devices of one type.
    uniform = (52 hash bits + ½) / 2^52 lies strictly between 0 and 1, so that noise = -log(-log(uniform)) is finite.
    """
    bits_BV = hash_bits(seed_B, position_B, token_V)
    uniform_BV = (_shift_right(bits_BV, 12).double() + 0.5) * 2.0**-52
    return uniform_BV.log_().neg_().log_().neg_()


def hash_bits(seed_B: torch.Tensor, position_B: torch.Tensor, token_V: torch.Tensor) -> torch.Tensor:
    """int64 [B, V] of 64 well-mixed bits: a row is the SplitMix64 stream whose start is a hash of seed and position."""
    start_B = _mix(_mix(seed_B + _signed(GOLDEN)) + position_B * _signed(GOLDEN))
    return _mix(start_B[:, None] + (token_V + 1) * _signed(GOLDEN))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, a bijection of 64 bits; int64 products wrap around as uint64 ones do."""
    z = (z ^ _shift_right(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift: torch's >> on int64 copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """A 64-bit pattern as the int64 that holds it."""
    return constant - (1 << 64) if constant >> 63 else constant


def _weights(scores_BV: torch.Tensor) -> torch.Tensor:
    """int64 [B, V]: probabilities relative to the row's largest, in units of 1 / UNIT."""
    return ((scores_BV - scores_BV.amax(1, keepdim=True)).exp() * UNIT).round().long()


def _filter(scores_BV: torch.Tensor, params: SamplingTensors, level: Level) -> torch.Tensor:
    """float64 [B, V]: score / temperature, and -inf for what min-p and, at level FILTER, top-k and top-p exclude.

    top-k keeps exactly k tokens and breaks ties to the lower id (transformers keeps all that equal the k-th). top-p
    keeps the fewest tokens, most likely first, whose share of what top-k left reaches p. min-p keeps tokens at least
    min_p times as likely as the most likely one, which always stays. A greedy row (temperature 0) keeps its scores.
    """
    vocab = scores_BV.shape[1]
    temperature_B1, top_k_B1, top_p_B1, min_p_B1 = params.columns()
    scores_BV = scores_BV / torch.where(temperature_B1 > 0, temperature_B1, 1.0)  # float64, since the column is
    keep_BV = (scores_BV - scores_BV.amax(1, keepdim=True)).exp() >= min_p_B1
    if level == Level.FILTER:
        top_k_B1 = torch.where(top_k_B1 > 0, top_k_B1, vocab)
        order_BV = scores_BV.sort(dim=1, descending=True, stable=True).indices
        among_k_BV = torch.arange(vocab, device=scores_BV.device) < top_k_B1
        weight_BV = _weights(scores_BV).gather(1, order_BV) * among_k_BV
        before_BV = weight_BV.cumsum(1) - weight_BV
        among_p_BV = (before_BV < top_p_B1 * weight_BV.sum(1, keepdim=True)) | (top_p_B1 == 1)
        keep_BV &= torch.empty_like(keep_BV).scatter_(1, order_BV, among_k_BV & among_p_BV)
    return scores_BV.masked_fill(~keep_BV, -math.inf)
