"""Engine: requests → token ids, several sequences in one forward pass, each entering and leaving when it can.

    waiting ──admit──▶ running ──▶ step: one token of each that decodes, chunks of prompts for the rest
                          ▲            │ model → logits of the rows that end their prompt or decode
                          └──── ids ◀──┘ sampler → broadcast from expert rank 0

Every rank runs this loop with the same requests and makes the same choices, so that all of them call the model with the
same step; no choice depends on a clock. It knows token ids only; text listens through two callbacks.

Letters: T tokens of a step · B sequences of a step · O of them whose logits are wanted · V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from epmoe.cache import Cache, CacheFull, Step
from epmoe.errors import UserError
from epmoe.profile import named
from epmoe.ranks import Ranks
from epmoe.sampler import SamplingParams, TokenLogprobs, log_probabilities, sample


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


class Model(Protocol):
    """What the engine needs of a model (epmoe/models/__init__.py)."""

    config: Any  # vocab, max_positions

    def __call__(self, step: Step, cache: Cache, /) -> torch.Tensor: ...


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


@dataclass(eq=False)
class _Sequence:
    """A request in the cache."""

    index: int
    request: Request
    handle: int
    end: int  # length at which it must stop
    seen_V: torch.Tensor | None  # bool, ids of prompt and output; only kept for a repetition penalty
    ids: list[int]  # prompt and output
    cached: int = 0
    first_token_s: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen yet; one when it decodes."""
        return len(self.ids) - self.cached


class Engine:
    """Runs requests through a model.

    Args:
        eos_ids: ids that end a text, unless a request ignores them.
        prefill_chunk: prompt tokens in a step at most, of all sequences together.
        max_batch: sequences at a time at most.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        ranks: Ranks,
        *,
        eos_ids: Sequence[int] = (),
        prefill_chunk: int = 2048,
        max_batch: int = 64,
    ) -> None:
        assert prefill_chunk > 0 and max_batch > 0
        self.model, self.cache, self.ranks = model, cache, ranks
        self.eos_ids = frozenset(eos_ids)
        self.prefill_chunk, self.max_batch = prefill_chunk, max_batch
        self.vocab: int = model.config.vocab
        self.max_positions: int = model.config.max_positions

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        on_token: OnToken = lambda request, token: False,
        on_finish: OnFinish = lambda request, result: None,
    ) -> list[Result]:
        """Run all requests to their end; results in their order. A collective of the expert group.

        Raises:
            UserError: see `check`; a request that the whole cache cannot hold; logits that are NaN.
        """
        check(requests, self.vocab, self.max_positions)
        started = time.perf_counter()
        waiting = deque(enumerate(requests))
        running: list[_Sequence] = []
        results: dict[int, Result] = {}
        try:
            while waiting or running:
                self._admit(waiting, running)
                for sequence, token in self._step(running):
                    now = time.perf_counter() - started
                    sequence.first_token_s = sequence.first_token_s or now
                    reason = self._append(sequence, token, on_token)
                    if reason:
                        running.remove(sequence)
                        self.cache.release(sequence.handle)
                        results[sequence.index] = _result(sequence, reason, now)
                        on_finish(sequence.index, results[sequence.index])
        finally:
            for sequence in running:
                self.cache.release(sequence.handle)
        return [results[index] for index in range(len(requests))]

    def _admit(self, waiting: deque[tuple[int, Request]], running: list[_Sequence]) -> None:
        """Move requests from `waiting` to `running`, in their order, while there are places and pages.

        All pages that a request can ever need are reserved now: a running sequence is never put back.
        """
        while waiting and len(running) < self.max_batch:
            index, request = waiting[0]
            try:
                handle = self.cache.admit(request.cached(self.max_positions))
            except CacheFull:
                assert running, "an empty cache refused a request"
                return
            waiting.popleft()
            seen_V = None
            if request.params.repetition_penalty != 1:
                seen_V = torch.zeros(self.vocab, dtype=torch.bool, device=self.ranks.device)
                seen_V[torch.tensor(request.ids, device=self.ranks.device)] = True
            end = request.length(self.max_positions)
            running.append(_Sequence(index, request, handle, end, seen_V, list(request.ids)))

    def _step(self, running: list[_Sequence]) -> list[tuple[_Sequence, int]]:
        """One forward pass; the next token of each sequence whose tokens are all cached after it."""
        work = self._schedule(running)
        logits_OV = self.model(_build(work, self.ranks.device), self.cache)
        for sequence, count in work:
            sequence.cached += count
        done = [sequence for sequence, _ in work if sequence.pending == 0]
        return list(zip(done, self._choose(done, logits_OV), strict=True)) if done else []

    def _schedule(self, running: list[_Sequence]) -> list[tuple[_Sequence, int]]:
        """(sequence, how many of its pending tokens): first those that decode, then prompts in order of admission."""
        work = [(sequence, 1) for sequence in running if sequence.cached and sequence.pending == 1]
        decoding = {sequence.index for sequence, _ in work}
        left = self.prefill_chunk
        for sequence in running:
            count = min(sequence.pending, left)
            if sequence.index not in decoding and count:
                work.append((sequence, count))
                left -= count
        return work

    def _choose(self, sequences: list[_Sequence], logits_OV: torch.Tensor) -> list[int]:
        """The sampler's ids, those of expert rank 0 on every rank, and the log-probabilities that were asked for."""
        params = [sequence.request.params for sequence in sequences]
        with named("sample"):
            id_O = sample(logits_OV, params, [len(sequence.ids) for sequence in sequences], _seen(sequences))
        self.ranks.broadcast(id_O)
        ids = id_O.tolist()
        for sequence, token in zip(sequences, ids, strict=True):
            if token == self.vocab:
                raise UserError(
                    f"the model's logits are NaN at position {len(sequence.ids) - 1} of prompt {sequence.index + 1}: "
                    "the checkpoint's weights hold NaN, or overflow in this runtime.dtype"
                )
        wanted = [row for row, each in enumerate(params) if each.logprobs]
        if wanted:
            top = max(params[row].logprobs for row in wanted)
            row_O = torch.tensor(wanted, device=logits_OV.device)
            for row, found in zip(wanted, log_probabilities(logits_OV[row_O], id_O[row_O], top), strict=True):
                own = found.top[: params[row].logprobs]
                sequences[row].logprobs.append(TokenLogprobs(found.chosen, own))
        return ids

    def _append(self, sequence: _Sequence, token: int, on_token: OnToken) -> str:
        """Add a chosen token; the reason when it ends the sequence, else ""."""
        sequence.ids.append(token)
        if sequence.seen_V is not None:
            sequence.seen_V[token] = True
        if token in self.eos_ids and not sequence.request.params.ignore_eos:
            return "eos"
        if on_token(sequence.index, token):
            return "stop"
        return "length" if len(sequence.ids) >= sequence.end else ""


def _build(work: list[tuple[_Sequence, int]], device: torch.device) -> Step:
    tokens: list[int] = []
    positions: list[int] = []
    starts, outputs = [0], []
    for sequence, count in work:
        span = range(sequence.cached, sequence.cached + count)
        tokens += sequence.ids[span.start : span.stop]
        positions += span
        starts.append(len(tokens))
        if count == sequence.pending:
            outputs.append(len(tokens) - 1)
    return Step(
        token_T=torch.tensor(tokens, dtype=torch.int64, device=device),
        position_T=torch.tensor(positions, dtype=torch.int64, device=device),
        start_B1=tuple(starts),
        cached_B=tuple(sequence.cached for sequence, _ in work),
        sequence_B=tuple(sequence.handle for sequence, _ in work),
        output_O=torch.tensor(outputs, dtype=torch.int64, device=device),
    )


def _seen(sequences: list[_Sequence]) -> torch.Tensor | None:
    """bool [O, V]; rows of sequences without a penalty are not read."""
    kept = [sequence.seen_V for sequence in sequences]
    some = next((seen_V for seen_V in kept if seen_V is not None), None)
    if some is None:
        return None
    return torch.stack([some if seen_V is None else seen_V for seen_V in kept])


def _result(sequence: _Sequence, reason: str, now: float) -> Result:
    new = sequence.ids[len(sequence.request.ids) :]
    return Result(tuple(new), reason, sequence.first_token_s, now, tuple(sequence.logprobs))
