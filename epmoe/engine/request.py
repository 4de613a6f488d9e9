"""What is asked of the engine and what comes of it. Plain values: no tensors, no ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from epmoe.errors import UserError

MIN_TEMPERATURE = 1e-6


class Level(IntEnum):
    """How much work a row's parameters ask for; a batch takes the highest of its rows, which changes no row's bits."""

    GREEDY = 0  # the largest logit
    SAMPLE = 1  # temperature and min-p: no order needed
    FILTER = 2  # all: repetition penalty, top-k and top-p, which sort the vocabulary


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

    @property
    def level(self) -> Level:
        """The least level at which a batch with this row may be chosen."""
        warm = self.temperature > 0
        if self.repetition_penalty != 1 or (warm and (self.top_k or self.top_p < 1)):
            return Level.FILTER
        return Level.SAMPLE if warm else Level.GREEDY

    def row(self) -> tuple[float, ...]:
        """What `Knobs.value_BP` holds of these."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log of the model's probability of the chosen token, and the most likely (id, log-probability) pairs."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Request:
    """A prompt's token ids and how to go on."""

    ids: tuple[int, ...]
    params: SamplingParams

    def length(self, max_positions: int) -> int:
        """Most tokens of prompt and output: max_new_tokens may ask for more than the model's positions allow."""
        return min(len(self.ids) + self.params.max_new_tokens, max_positions)

    def cached(self, max_positions: int) -> int:
        """Positions of the cache that it can need: all but the last token, which is never fed back."""
        return max(self.length(max_positions) - 1, len(self.ids))


@dataclass(frozen=True)
class Result:
    """What came of a request. Times are seconds since `generate` was called, so they include waiting for a place."""

    ids: tuple[int, ...]  # new ids; the one that ended it included
    finish_reason: str  # "eos", "stop" (a callback ended it) or "length"
    first_token_s: float
    total_s: float
    logprobs: tuple[TokenLogprobs, ...]  # one for each id when asked for, else empty


# Called on every rank, in the same order. `on_token(request, id)` for each new id but an end-of-text one; True ends the
# request there. `on_finish(request, result)` once for each.
OnToken = Callable[[int, int], bool]
OnFinish = Callable[[int, Result], None]


def check(requests: Sequence[Request], vocab: int, max_positions: int) -> None:
    """Raises UserError for a prompt that is empty, too long for the model or not of its vocabulary."""
    for index, request in enumerate(requests):
        if not request.ids:
            raise UserError(f"prompt {index + 1} is empty: give at least one token of text")
        if len(request.ids) >= max_positions:
            raise UserError(
                f"prompt {index + 1} has {len(request.ids)} tokens and the model has {max_positions} positions "
                "(max_position_embeddings) for prompt and output: shorten the prompt"
            )
        if max(request.ids) >= vocab:
            raise UserError(
                f"prompt {index + 1} has token id {max(request.ids)} and the model's vocab_size is {vocab}: "
                "tokenizer.json is not this model's"
            )
