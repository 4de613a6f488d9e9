"""What is asked of the engine and what comes of it. Plain values: no tensors, no ranks."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from epmoe.config.keys import accept_all, keys_of, respelled
from epmoe.config.schema import SPELLINGS, Length, Sampling
from epmoe.errors import UserError

ALL_KEPT = frozenset(("seen", "count", "listed", "allowed"))
MOST_LISTED = 1024  # token ids of one request that logit_bias and min_tokens name


class Level(IntEnum):
    """How much work a row's parameters ask for; a batch takes the highest of its rows, which changes no row's bits."""

    GREEDY = 0  # the largest logit
    SAMPLE = 1  # a draw, from all or some; a row that asks for less takes no part in it


@dataclass(frozen=True)
class SamplingParams(Sampling, Length):
    """How one request's tokens are chosen and when it ends: the keys of the group `sampling`, and max_new_tokens.

    temperature 0 is greedy: the largest logit after the penalty, ties to the lower id. `logprobs` asks for that many
    most likely tokens with each chosen one (0: none), `prompt_logprobs` for that many with each token of the prompt
    (0: for its own alone; None: not), `n` for so many answers. None is left out, for `over` or `settled` to fill.
    `logit_bias` may be a mapping, too; layers/adjust.py says what it and the penalties do.
    `max_tokens` is another spelling of max_new_tokens, to make one with; 0 new tokens may be asked for with
    prompt_logprobs alone.

    Raises:
        UserError: a value of the wrong type or out of range; max_tokens and max_new_tokens that differ.
    """

    max_tokens: InitVar[int | None] = None

    def __post_init__(self, max_tokens: int | None) -> None:
        given = {"max_tokens": max_tokens, "max_new_tokens": self.max_new_tokens}
        length = respelled(given, SPELLINGS)["max_new_tokens"]
        none = type(length) is int and length == 0 and self.prompt_logprobs is not None
        object.__setattr__(self, "max_new_tokens", None if none else length)
        accept_all(self)
        if none:
            object.__setattr__(self, "max_new_tokens", 0)

    def over(self, base: "SamplingParams") -> "SamplingParams":
        """The same, and what is left out is `base`'s."""
        return self._filled(vars(base))

    def settled(self) -> "SamplingParams":
        """The same, and what is left out has the value that holds where nobody says another."""
        return self._filled(OTHERWISE)

    def _filled(self, values: Mapping[str, Any]) -> "SamplingParams":
        """What is left out is one of these, which need no look any more: a request's first token waits for this."""
        own = vars(self)
        missing = {name: value for name, value in values.items() if value is not None and own.get(name, value) is None}
        if not missing:
            return self
        found = object.__new__(type(self))
        vars(found).update(own | missing)
        return found

    @property
    def level(self) -> Level:
        """The least level at which a batch with this row may be chosen."""
        return Level.SAMPLE if self.temperature else Level.GREEDY

    @property
    def kept(self) -> frozenset[str]:
        """What the device must keep of its sequence, by the names in `batch.KINDS`; none: its logits stay."""
        wanted = {
            "seen": self.repetition_penalty not in (None, 1),
            "count": self.frequency_penalty or self.presence_penalty,
            "listed": self.logit_bias or self.min_tokens,
            "allowed": self.allowed_token_ids is not None or self.grammar,
        }
        return frozenset(name for name, each in wanted.items() if each)

    def row(self) -> tuple[float, ...]:
        """What `SamplingTensors.value_SP` holds of these: settled."""
        values = vars(self.settled())
        temperature, *others = (values[name] for name in ("temperature", "top_k", "top_p", "min_p"))
        return temperature, *others, 1 / (temperature or 1)

    def penalties(self) -> tuple[float, float, float]:
        """Repetition, frequency and presence: settled."""
        repetition = self.settled().repetition_penalty
        assert repetition is not None, "settled"
        return repetition, self.frequency_penalty, self.presence_penalty


OTHERWISE = {name: each.otherwise for name, each in keys_of(SamplingParams).items() if each.otherwise is not None}


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log of the model's probability of the chosen token, and the most likely (id, log-probability) pairs.

    Of a token of a prompt: of the one that stands there.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


PromptLogprobs = Sequence[TokenLogprobs | None]  # one for each token of a prompt, whose first has none


class Variant(NamedTuple):
    """What a decode step's rows ask for beyond their next ids; each is another sequence of kernels."""

    level: Level
    logits: bool  # keep them for log-probabilities
    adjusted: bool = False  # before the choice: penalties, biases, masks

    @classmethod
    def of(cls, params: SamplingParams) -> "Variant":
        """What one row asks for."""
        return cls(params.level, params.logprobs > 0, bool(params.kept))

    @classmethod
    def joined(cls, rows: "Sequence[Variant]") -> "Variant":
        """The least that serves all of them."""
        return cls(max(each.level for each in rows), any(each.logits for each in rows), any(each[2] for each in rows))


@dataclass(frozen=True)
class Request:
    """A prompt's token ids and how to go on. Its parameters are settled: the engine finds a value for each."""

    ids: tuple[int, ...]
    params: SamplingParams
    choice: tuple[int, int] | None = None  # the prompt's index and which of its n answers; None: it asks for one
    priority: int = 0  # among those that wait the lower goes first, of equal ones the earlier
    variant: Variant = field(init=False, compare=False, repr=False)  # of its params; each step asks
    kept: frozenset[str] = field(init=False, compare=False, repr=False)  # likewise

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", self.params.settled())
        object.__setattr__(self, "kept", self.params.kept)
        object.__setattr__(self, "variant", Variant.of(self.params))

    @cached_property
    def largest(self) -> int:
        """Of its ids: each check looks at it."""
        return max(self.ids)

    def length(self, max_positions: int) -> int:
        """Most tokens of prompt and output: max_new_tokens may ask for more than the model's positions allow."""
        assert self.params.max_new_tokens is not None, "settled"
        return min(len(self.ids) + self.params.max_new_tokens, max_positions)

    def cached(self, max_positions: int) -> int:
        """Positions of the cache that it can need: all but the last token, which is never fed back."""
        return max(self.length(max_positions) - 1, len(self.ids))

    def to_json(self) -> list[Any]:
        """What `of_json` makes the same request of, without the prompt's index: values that JSON can hold."""
        return [self.ids, asdict(self.params), self.priority]

    @staticmethod
    def of_json(value: Sequence[Any]) -> "Request":
        ids, params, priority = value
        return Request(tuple(ids), SamplingParams(**params), priority=priority)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of answer `choice` of a request with this seed: its own for the first, so that n = 1 is as without n.

    For the others the first 53 bits of SHA-256 of "epmoe choice <choice> of seed <seed>": no two collide as those of
    seed + choice would, answers of neighbouring seeds have nothing in common, and JSON's readers keep all bits.
    """
    if choice == 0:
        return seed
    hashed = hashlib.sha256(f"epmoe choice {choice} of seed {seed}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 11


def choices(requests: Sequence[Request]) -> list[Request]:
    """Each request n times, for one answer each; what asks for one is itself.

    The first of n has the prompt's log-probabilities.
    """
    found: list[Request] = []
    for index, request in enumerate(requests):
        params, seed = request.params, request.params.seed
        assert seed is not None, "settled"
        if params.n == 1:
            found.append(request)
            continue
        for choice in range(params.n):
            prompt = params.prompt_logprobs if choice == 0 else None  # they are the same for all
            own = replace(params, n=1, seed=choice_seed(seed, choice), prompt_logprobs=prompt)
            found.append(replace(request, params=own, choice=(index, choice)))
    return found


@dataclass(frozen=True)
class Result:
    """What came of a request. Times are seconds since it was added, so they include waiting for its turn."""

    ids: tuple[int, ...]  # new ids; the one that ended it included
    finish_reason: str  # "eos", "stop" (stop_token_ids, or a listener, ended it), "length", "abort" or "error"
    first_token_s: float
    total_s: float
    logprobs: tuple[TokenLogprobs, ...]  # one for each id when asked for, else empty
    cached_tokens: int = 0  # of the prompt, those whose keys and values were there already
    prompt_logprobs: PromptLogprobs = ()  # when asked for
    failure: str = ""  # of its grammar, where that is the error; else its numbers are none

    def stopped(self, count: int) -> "Result":
        """The same, ended by a listener after so many ids."""
        return replace(self, ids=self.ids[:count], logprobs=self.logprobs[:count], finish_reason="stop")


# Called on every rank, in the same order. `on_token(request, id)` for each new id but one that ends the text by itself
# (end of text, stop_token_ids); True ends the request there. `on_finish(request, result)` once for each.
OnToken = Callable[[int, int], bool]
OnFinish = Callable[[int, Result], None]


@dataclass(frozen=True)
class Token:
    """A new token of a request; one that ends the text by itself comes with the result alone."""

    id: int  # of the request
    token: int
    logprobs: TokenLogprobs | None  # when asked for
    prompt_logprobs: PromptLogprobs = ()  # when asked for, with the first token
    cached_tokens: int = 0  # of the prompt, with the first token


@dataclass(frozen=True)
class Finished:
    """The last event of a request."""

    id: int
    result: Result


Event = Token | Finished


@dataclass(frozen=True)
class Workload:
    """Sizes and kinds of the requests to come: what `Engine.prepare` makes ready for."""

    sequences: int  # at a time, at most
    prompt_tokens: int  # of the longest prompt
    prefill_tokens: int  # of the prompts of all sequences that run at a time, together
    longer_prompts: int  # those of them with more than one token
    levels: frozenset[Level]
    logprobs: frozenset[bool]  # whether log-probabilities are asked for: of some, of none, or both
    kept: frozenset[str]  # `SamplingParams.kept` of all
    adjusted: frozenset[bool]  # whether logits are adjusted: of some, of none, or both
    grammars: bool  # of some
    prompt_logprobs: bool = False  # of some; their steps are no graphs
    beside_tokens: int | None = None  # as prefill_tokens, of a step in which others decode; None: no fewer

    @classmethod
    def of(cls, requests: Sequence[Request], max_batch: int, max_positions: int = 0) -> "Workload":
        """Of these requests, `max_batch` of them at a time in any order.

        With the model's positions they may be put back, so that a prompt may be whatever a request has said.
        """
        found = (each.cached(max_positions) if max_positions else len(each.ids) for each in requests)
        lengths = sorted(found, reverse=True)[:max_batch]
        params = [request.params for request in requests]
        variants = {request.variant for request in requests}
        return cls(
            sequences=len(lengths),
            prompt_tokens=max(lengths, default=0),
            prefill_tokens=sum(lengths),
            longer_prompts=sum(length > 1 for length in lengths),
            levels=frozenset(each.level for each in variants),
            logprobs=frozenset(each.logits for each in variants),
            kept=frozenset(name for request in requests for name in request.kept),
            adjusted=frozenset(each.adjusted for each in variants),
            grammars=any(each.grammar for each in params),
            prompt_logprobs=any(each.prompt_logprobs is not None for each in params),
        )

    @classmethod
    def unknown(cls, rows: int, alone: int, beside: int, max_positions: int) -> "Workload":
        """Of any requests, so many of them; so many tokens of prompts in a step alone, and beside rows."""
        return cls(
            sequences=rows,
            prompt_tokens=min(alone, max_positions - 1),
            prefill_tokens=alone,
            longer_prompts=rows,
            levels=frozenset(Level),
            logprobs=frozenset((False, True)),
            kept=ALL_KEPT,
            adjusted=frozenset((False, True)),
            grammars=True,
            prompt_logprobs=True,
            beside_tokens=beside,
        )

    def variants(self) -> list[Variant]:
        """All that a decode step of such requests can be."""
        return [Variant(*each) for each in product(self.levels, self.logprobs, self.adjusted)]


def check(requests: Sequence[Request], vocab: int, max_positions: int, first: int = 0) -> None:
    """Raises UserError for a prompt that is empty, or too long for the model, and for ids that its vocabulary lacks.

    The message names a prompt by its number, of which the first one's is `first` + 1.
    """
    for number, request in enumerate(requests, first + 1):
        if not request.ids:
            raise UserError(f"prompt {number} is empty: give at least one token of text")
        if len(request.ids) >= max_positions:
            raise UserError(
                f"prompt {number} has {len(request.ids)} tokens and the model has {max_positions} positions "
                "(max_position_embeddings) for prompt and output: shorten the prompt"
            )
        if request.largest >= vocab:
            raise UserError(
                f"prompt {number} has token id {request.largest} and the model's vocab_size is {vocab}: "
                "tokenizer.json is not this model's"
            )
        _check_params(request.params, number, vocab)


def _check_params(params: SamplingParams, number: int, vocab: int) -> None:
    named = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": [id for id, _ in params.logit_bias],
        "allowed_token_ids": params.allowed_token_ids or (),
    }
    for name, ids in named.items():
        if max(ids, default=0) >= vocab:
            raise UserError(
                f"prompt {number} has {name}={max(ids)} and the model's vocab_size is {vocab}: "
                f"give ids from 0 to {vocab - 1}"
            )
    for name in ("min_tokens", "allowed_token_ids"):
        if params.grammar and (value := getattr(params, name)):
            raise UserError(
                f"prompt {number} has {name}={value} and a grammar, which together may allow no token: "
                "leave one of them out"
            )
    if params.min_tokens > (params.max_new_tokens or 0):
        raise UserError(
            f"prompt {number} has min_tokens={params.min_tokens} and max_new_tokens={params.max_new_tokens}: "
            "ask for fewer, or allow more"
        )
