"""How a token is chosen out of a row of logits, and how probable the model holds it to be; exact in integers.

    score     the adjusted logit (adjust.py), float32, at most the largest float32 and at least the smallest
    weight    round(2^40 · exp((score - best) · (1 / temperature))), in float64; best: the row's largest score
    order     by score, of equal ones the lower id first
    kept      top-k: the k first; top-p: of these the fewest, first ones first, whose weights reach p of theirs; min-p:
              of these all whose weight is at least min_p · 2^40
    draw      target = floor(u · total / 2^64), total: the sum of the kept weights, u: 64 hash bits of (seed, position);
              the token is the first, by id, at which the running sum of the kept weights is above the target

A row at temperature 0 takes the first in that order. Weights are integers: their sums are exact in any order, so no
kernel, thread count or batch can move a token across a border. What is less likely than 2^-41 of the best weighs
nothing. To reach p is to reach ceil(p · W), W the sum of all weights that top-k left, in float64.

Log-probabilities are of the raw logits: logit - best - log(total / 2^40), the weights at temperature 1.

kernels/sampling/ computes the same ids without a look at the host; this is for the CPU, where each row takes the way
that its own parameters need. Passes go through a few rows at a time, which stay in the processor's cache.

Letters: B rows (sequences) · R of them at a time · V vocabulary · C candidates · Q log-probabilities asked for.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch

from epmoe.batch import Adjustments, SamplingTensors
from epmoe.layers.adjust import adjust
from epmoe.layers.greedy import finite_rows

UNIT = 2.0**40  # weight of the most likely token; 2^40 · 2^20 tokens fits int64
MOST_IDS = 1 << 20  # of a vocabulary: an id and its score's bits are one int64
MOST = torch.finfo(torch.float32).max
VALUES = 1 << 18  # of a chunk of rows
BINS = 4096
REACH = 28.5  # what is so many temperatures below the best weighs nothing: ln 2^41 is 28.42

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
LOW = 0xFFFFFFFF
_MAGIC = 2.0**52  # added to a smaller number it leaves the number, rounded, in the mantissa
_MAGIC_BITS = 0x433 << 52


def choose(
    logits_BV: torch.Tensor,
    sequence_B: torch.Tensor,
    position_B: torch.Tensor,
    params: SamplingTensors,
    adjustments: Adjustments | None,
) -> torch.Tensor:
    """One token a row: int64 [B]. A row whose raw logits are not finite yields V, which is no token.

    Args:
        logits_BV: float32; stays as it is.
        position_B: the index that the chosen token will have in its sequence.
        adjustments: None: no row of `sequence_B` needs one.
    """
    vocab = logits_BV.shape[1]
    assert logits_BV.dtype == torch.float32 and vocab <= MOST_IDS
    id_B = torch.full_like(sequence_B, vocab)
    warm_B, adjusted_B = params.value_SP[sequence_B, 0] > 0, params.kind_S[sequence_B] != 0
    finite_B = finite_rows(logits_BV)
    for warm, adjusted in product((False, True), repeat=2):
        wanted_B = finite_B & (warm_B == warm) & (adjusted_B == adjusted)
        row_X = wanted_B.nonzero()[:, 0]
        for row_R in row_X.split(max(1, VALUES // vocab)) if len(row_X) else ():
            sequence_R, position_R = sequence_B[row_R], position_B[row_R]
            score_RV = logits_BV[row_R]
            if adjusted:
                assert adjustments is not None
                score_RV = adjust(score_RV, adjustments[sequence_R], params.kind_S[sequence_R], position_R).clamp_(
                    -MOST, MOST
                )
            if warm:
                bits_R = hash_bits(params.seed_S[sequence_R], position_R)
                id_B[row_R] = _draw(score_RV, params.value_SP[sequence_R], bits_R)
            else:
                id_B[row_R] = score_RV.argmax(1)  # it promises the first of equal values
    return id_B


def top_logprobs(
    logits_BV: torch.Tensor, id_B: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log softmax of the raw logits at `id_B` and for the `top` largest (V, if there are fewer).

    On the device: chosen_B (float64), id_BQ (int64), logprob_BQ (float64). Ties go to the lower id. NaN where the row
    is not finite.
    """
    rows = max(1, VALUES // logits_BV.shape[1])
    chunks = [
        _top_logprobs(*each, min(top, logits_BV.shape[1]))
        for each in zip(logits_BV.split(rows), id_B.split(rows), strict=True)
    ]
    chosen_B, id_BQ, logprob_BQ = (torch.cat(each) for each in zip(*chunks, strict=True))
    return chosen_B, id_BQ, logprob_BQ


def hash_bits(seed_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """int64 [B] of 64 well-mixed bits: the first number of the SplitMix64 stream whose start is a hash of both."""
    start_B = _mix(_mix(seed_B + _signed(GOLDEN)) + position_B * _signed(GOLDEN))
    return _mix(start_B + _signed(GOLDEN))


def weights(score_BV: torch.Tensor, temperature_B1: torch.Tensor) -> torch.Tensor:
    """int64 [B, V]: probabilities relative to the row's largest, in units of 1 / UNIT."""
    x_BV = score_BV.double()
    x_BV -= score_BV.amax(1, keepdim=True).double()
    x_BV *= 1 / temperature_B1.double()
    return x_BV.exp_().mul_(UNIT).add_(_MAGIC).view(torch.int64).sub_(_MAGIC_BITS)


def scaled(bits_B: torch.Tensor, total_B: torch.Tensor) -> torch.Tensor:
    """floor(bits · total / 2^64), the bits without a sign: int64 [B]. `total_B` is from 0 to 2^62."""
    high_B, low_B = _shift_right(bits_B, 32), bits_B & LOW
    above_B, below_B = total_B >> 32, total_B & LOW
    middle_B = high_B * below_B + _shift_right(low_B * below_B, 32)  # below 2^64, as all sums here
    other_B = low_B * above_B + (middle_B & LOW)
    return high_B * above_B + _shift_right(middle_B, 32) + _shift_right(other_B, 32)


def _draw(score_RV: torch.Tensor, value_RP: torch.Tensor, bits_R: torch.Tensor) -> torch.Tensor:
    weight_RV = weights(score_RV, value_RP[:, :1])
    for score_V, weight_V, values in zip(score_RV, weight_RV, value_RP.tolist(), strict=True):
        drop(weight_V, score_V, values)
    running_RV = weight_RV.cumsum(1)
    target_R = scaled(bits_R, running_RV[:, -1])
    return torch.searchsorted(running_RV, target_R[:, None], right=True)[:, 0]


def drop(weight_V: torch.Tensor, score_V: torch.Tensor, values: Sequence[float]) -> None:
    """Let what top-k, top-p and min-p do not keep weigh nothing.

    Args:
        values: temperature, top-k, top-p, min-p, and what may follow.
    """
    temperature, top_k, top_p, min_p, *_ = values
    reach = REACH * temperature
    if 0 < top_k < len(score_V):
        weight_V.masked_fill_(~first(score_V, None, int(top_k), reach), 0)
    if top_p < 1:
        total = int(weight_V.sum())
        need = min(total, math.ceil(top_p * float(total)))
        weight_V.masked_fill_(~first(score_V, weight_V, need, reach), 0)
    if min_p:
        weight_V.masked_fill_(weight_V < math.ceil(min_p * UNIT), 0)


def first(score_V: torch.Tensor, measure_V: torch.Tensor | None, need: int, reach: float) -> torch.Tensor:
    """bool [V]: the fewest tokens, by score and of equal ones the lower id first, whose measures together reach `need`.

    No sort of all: tokens fall into bins by score; those above the border's bin are in, and that one's are sorted.

    Args:
        measure_V: int64 from 0 to 2^40, in all at least `need`; None: each token counts as 1.
        reach: bins end so far below the largest score; what is below is the last one's.
    """
    low, high = (each.item() for each in score_V.aminmax())
    width = min(reach, high - low) / (BINS - 1)
    below_V = (high - score_V).mul_(1 / max(width, 1e-30))  # float32: whatever it rounds to, it rises as scores fall
    bin_V = below_V.clamp_(max=BINS - 1).long()
    sum_J = torch.zeros(BINS, dtype=torch.int64, device=score_V.device)
    sum_J = torch.bincount(bin_V, minlength=BINS) if measure_V is None else sum_J.scatter_add_(0, bin_V, measure_V)
    running_J = sum_J.cumsum(0)
    bin = int((running_J < need).sum())
    id_C = (bin_V == bin).nonzero()[:, 0]
    id_C = id_C[score_V[id_C].sort(descending=True, stable=True).indices]
    measure_C = torch.ones_like(id_C) if measure_V is None else measure_V[id_C]
    missing = need - int(running_J[bin] - sum_J[bin])
    count = int((measure_C.cumsum(0) < missing).sum()) + 1
    return (bin_V < bin).index_fill_(0, id_C[:count], True)


def _top_logprobs(
    logits_RV: torch.Tensor, id_R: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    high_R = logits_RV.amax(1)
    total_R = weights(logits_RV, torch.ones_like(high_R)[:, None]).sum(1).double()
    log_total_R = torch.log(total_R / UNIT).masked_fill_(~finite_rows(logits_RV), math.nan)
    chosen_R = logits_RV.gather(1, id_R[:, None])[:, 0].double() - high_R.double() - log_total_R
    if not top:
        return chosen_R, id_R.new_empty(len(id_R), 0), chosen_R.new_empty(len(id_R), 0)
    id_RQ = torch.stack([_largest(logits_V, top) for logits_V in logits_RV])
    return chosen_R, id_RQ, logits_RV.gather(1, id_RQ).double() - high_R.double()[:, None] - log_total_R[:, None]


def _largest(logits_V: torch.Tensor, top: int) -> torch.Tensor:
    """int64 [Q]: ids of the largest, ties to the lower one, which topk does not promise. Any, where one is NaN."""
    least = logits_V.topk(top).values[-1]
    id_C = (~(logits_V < least)).nonzero()[:, 0]
    return id_C[logits_V[id_C].sort(descending=True, stable=True).indices[:top]]


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
