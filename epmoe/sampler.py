"""Sampler: logits → the next token's id, the same on every rank, in every batch and for every split of the vocabulary.

Filters run in the order of transformers: repetition penalty → temperature → top-k → top-p → min-p. What is left is
sampled by the Gumbel trick, argmax(score + noise), whose noise is a hash of (seed, position, token id): there is no
generator state, so a token does not depend on the batch, the row, the rank or the order of requests.

Sums over the vocabulary (the normaliser, the cumulated probability of top-p) are sums of integers, probabilities in
units of 2^-40 of the largest one. Integer sums are exact in any order, so no kernel, thread count or batch shape and no
later split over ranks can move a token across a threshold.

Letters: B rows (sequences) · V vocabulary · C rows that are sampled · Q log-probabilities asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epmoe.errors import UserError

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
UNIT = 2.0**40  # weight of the most likely token; 2^40 · 2^22 tokens still fits int64
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Raises UserError for a value out of range.

    temperature 0 is greedy: the largest logit after the penalty, ties to the lower id. `logprobs` asks for that many
    most likely tokens with each chosen one (0: none).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(key: str, ok: bool, need: str) -> None:
            if not ok:
                raise UserError(f"{key}={getattr(self, key)!r} is out of range: give {need}")

        check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        warm = MIN_TEMPERATURE <= self.temperature < math.inf
        check("temperature", self.temperature == 0 or warm, f"0 (greedy) or at least {MIN_TEMPERATURE}")
        check("top_k", self.top_k >= 0, "0 (all tokens) or the number of tokens to keep")
        check("top_p", 0 < self.top_p <= 1, "more than 0, at most 1 (1 keeps all)")
        check("min_p", 0 <= self.min_p <= 1, "0 to 1 (0 keeps all)")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a positive number (1 is none)")
        check("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1")
        check("logprobs", 0 <= self.logprobs <= 100, "0 to 100")
        check("stop", all(self.stop), "strings that are not empty")


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log of the model's probability of the chosen token, and the most likely (id, log-probability) pairs."""

    chosen: float
    top: tuple[tuple[int, float], ...]


def sample(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    seen_BV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose one token a row: int64 [B] on the logits' device. A row that holds NaN yields V, which is no token.

    `positions[b]` is the index that the chosen token will have in its sequence. `seen_BV` (bool) marks the ids of
    prompt and output so far; it is needed where a row has a repetition penalty. Does not change its arguments.
    """
    assert logits_BV.dtype == torch.float32 and len(params) == len(positions) == logits_BV.shape[0]
    scores_BV = _penalise(logits_BV, params, seen_BV)
    id_B = argmax_lowest(scores_BV)
    rows = [b for b, p in enumerate(params) if p.temperature > 0]
    if rows:
        row_C = torch.tensor(rows, device=logits_BV.device)
        warm = [params[b] for b in rows]
        scores_CV = _filter(scores_BV[row_C], warm)
        token_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
        scores_CV += gumbel([p.seed for p in warm], [positions[b] for b in rows], token_V)
        id_B[row_C] = argmax_lowest(scores_CV)
    return id_B


def log_probabilities(logits_BV: torch.Tensor, id_B: torch.Tensor, top: int) -> list[TokenLogprobs]:
    """log softmax of the raw logits (before penalty, temperature and filters) at `id_B` and for the `top` largest.

    Ties go to the lower id.
    """
    logits_BV = logits_BV.double()
    max_B1 = logits_BV.amax(1, keepdim=True)
    total_B1 = _weights(logits_BV).sum(1, keepdim=True)
    logprob_BV = logits_BV - max_B1 - torch.log(total_B1.double() / UNIT)
    chosen_B = logprob_BV.gather(1, id_B[:, None])[:, 0].tolist()
    id_BQ = logits_BV.sort(dim=1, descending=True, stable=True).indices[:, :top]
    logprob_BQ = logprob_BV.gather(1, id_BQ)
    tops = zip(id_BQ.tolist(), logprob_BQ.tolist(), strict=True)
    return [
        TokenLogprobs(chosen, tuple(zip(ids, values, strict=True)))
        for chosen, (ids, values) in zip(chosen_B, tops, strict=True)
    ]


def argmax_lowest(scores_BV: torch.Tensor) -> torch.Tensor:
    """int64 [B]: the index of each row's largest value, the lowest where several are equal; V where the row has NaN.

    torch.argmax leaves the choice among equal values open, and bf16 logits are equal often.
    """
    vocab = scores_BV.shape[1]
    token_V = torch.arange(vocab, device=scores_BV.device)
    largest_BV = scores_BV == scores_BV.amax(1, keepdim=True)
    return torch.where(largest_BV, token_V, vocab).amin(1)


def gumbel(seeds: Sequence[int], positions: Sequence[int], token_V: torch.Tensor) -> torch.Tensor:
    """float64 [B, V] of standard Gumbel noise; an element is a function of (seed, position, token id) alone.

    The hash bits are the same on every device, the logarithms' last bits on devices of one type.
    uniform = (52 hash bits + ½) / 2^52 lies strictly between 0 and 1, so that noise = -log(-log(uniform)) is finite.
    """
    seed_B = torch.tensor(seeds, dtype=torch.int64, device=token_V.device)
    position_B = torch.tensor(positions, dtype=torch.int64, device=token_V.device)
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


def _penalise(logits_BV: torch.Tensor, params: Sequence[SamplingParams], seen_BV: torch.Tensor | None) -> torch.Tensor:
    """Divide seen tokens' logits by the penalty, multiply the negative ones (Keskar et al. 2019, as transformers)."""
    if all(p.repetition_penalty == 1 for p in params):
        return logits_BV
    assert seen_BV is not None, "a repetition penalty needs the ids seen so far"
    penalty_B = [p.repetition_penalty for p in params]
    penalty_B1 = torch.tensor(penalty_B, dtype=torch.float32, device=logits_BV.device)[:, None]
    penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def _weights(scores_BV: torch.Tensor) -> torch.Tensor:
    """int64 [B, V]: probabilities relative to the row's largest, in units of 1 / UNIT."""
    return ((scores_BV - scores_BV.amax(1, keepdim=True)).exp() * UNIT).round().long()


def _filter(scores_CV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """float64 [C, V]: score / temperature, and -inf for what top-k, top-p and min-p exclude.

    top-k keeps exactly k tokens and breaks ties to the lower id (transformers keeps all that equal the k-th). top-p
    keeps the fewest tokens, most likely first, whose share of what top-k left reaches p. min-p keeps tokens at least
    min_p times as likely as the most likely one, which always stays.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores_CV.device)[:, None]

    vocab = scores_CV.shape[1]
    scores_CV = scores_CV / column([p.temperature for p in params])  # float64, since the column is
    keep_CV = (scores_CV - scores_CV.amax(1, keepdim=True)).exp() >= column([p.min_p for p in params])
    if any(p.top_k or p.top_p < 1 for p in params):
        top_k_C1 = column([min(p.top_k or vocab, vocab) for p in params])
        top_p_C1 = column([p.top_p for p in params])
        order_CV = scores_CV.sort(dim=1, descending=True, stable=True).indices
        among_k_CV = torch.arange(vocab, device=scores_CV.device) < top_k_C1
        weight_CV = _weights(scores_CV).gather(1, order_CV) * among_k_CV
        before_CV = weight_CV.cumsum(1) - weight_CV
        among_p_CV = (before_CV < top_p_C1 * weight_CV.sum(1, keepdim=True)) | (top_p_C1 == 1)
        keep_CV &= torch.empty_like(keep_CV).scatter_(1, order_CV, among_k_CV & among_p_CV)
    nan_C1 = scores_CV.isnan().any(1, keepdim=True)
    return scores_CV.masked_fill(~keep_CV & ~nan_C1, -math.inf)
