"""One decode step, all of it on the device: the last tokens → model → sampler → the next tokens.

    state[handle]: token, position, sampling parameters, ids seen
       │  ▲
       ▼  └──── write back ◀── broadcast ◀── choose ◀──┐
    DecodeStep ──▶ model ──▶ logits_BV ────────────────┘──▶ id_B, for the host to read later

Nothing comes from the host but the handles of the B rows, so a step can be launched before the last one's tokens are
known there, and can be a CUDA graph (epmoe/engine/graphs.py).

Letters: B rows of a step · S handles of the cache · P sampling parameters · V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import torch

from epmoe.batch import DecodeStep, Step
from epmoe.cache.cache import Cache
from epmoe.engine.request import Level, SamplingParams
from epmoe.engine.sampler import Knobs, choose
from epmoe.layers.greedy import join_largest, largest
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import to_device
from epmoe.trace import named


class Model(Protocol):
    """What the engine needs of a model (epmoe/models/__init__.py)."""

    config: Any  # vocab, max_positions
    vocab_chunk: int

    def __call__(self, step: Step | DecodeStep, cache: Cache, /) -> torch.Tensor: ...


class State:
    """What the device knows of every sequence, by its handle in the cache; the spare one stays at position 0."""

    def __init__(self, cache: Cache, vocab: int, ranks: Ranks) -> None:
        count, device = cache.spare + 1, ranks.device
        self.spare, self.vocab, self.ranks = cache.spare, vocab, ranks
        self.token_S = torch.zeros(count, dtype=torch.int64, device=device)
        self.position_S = torch.zeros(count, dtype=torch.int64, device=device)
        self.knobs_S = Knobs.of([SamplingParams()] * count, device)
        self.seen_SV: torch.Tensor | None = None  # bool; ids of prompt and output, of sequences with a penalty

    def keep_seen(self) -> None:
        """Keep what was seen from now on. Graphs must be captured after this, or they don't write it."""
        if self.seen_SV is None:
            shape = (len(self.token_S), self.vocab)
            self.seen_SV = torch.zeros(shape, dtype=torch.bool, device=self.ranks.device)

    def admit(self, handle: int, ids: tuple[int, ...], params: SamplingParams) -> None:
        """Take over a request's parameters."""
        device = self.ranks.device
        self.knobs_S.value_BP[handle] = to_device(params.row(), torch.float64, device)
        self.knobs_S.seed_B[handle] = params.seed
        if params.repetition_penalty != 1:
            assert self.seen_SV is not None, "State.keep_seen was not called"
            self.seen_SV[handle] = False
            self.seen_SV[handle].index_fill_(0, to_device(ids, torch.int64, device), True)

    def choose(
        self,
        logits_BV: torch.Tensor,
        sequence_B: torch.Tensor,
        position_B: torch.Tensor,
        level: Level,
        part: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """The next ids [B], at `position_B` of the sequences, and the state after them; a collective.

        They are the same on every rank: those of expert rank 0, or what all ranks find together when each has the
        logits of its `part` of the vocabulary. V, where the logits are NaN, is for the host to see; the state gets an
        id that the model can take until then.
        """
        with named("sample"):
            if level == Level.GREEDY:
                key_SB = largest(logits_BV, part[0] if part else 0)
                id_B = join_largest(self.ranks.stack(key_SB.amax(0)) if part else key_SB, self.vocab)
            else:
                assert part is None
                seen_BV = None if self.seen_SV is None or level < Level.FILTER else self.seen_SV[sequence_B]
                id_B = choose(logits_BV, self.knobs_S[sequence_B], position_B, seen_BV, level)
            if part is None:
                self.ranks.broadcast(id_B)
        self.advance(id_B, sequence_B, position_B)
        return id_B

    def take(self, sequence_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The last token of each row's sequence, its position and the position after it: int64 [B] each."""
        if self.token_S.device.type == "cuda":
            from epmoe.kernels import sequence_state as decode_triton  # only here: a CPU machine need not have triton

            return decode_triton.take(sequence_B, self.token_S, self.position_S)
        position_B = self.position_S[sequence_B]
        return self.token_S[sequence_B], position_B, position_B + 1

    def advance(self, id_B: torch.Tensor, sequence_B: torch.Tensor, position_B: torch.Tensor) -> None:
        """Make the ids, at `position_B`, their sequences' last tokens; V counts as V-1, the spare sequence stays."""
        if self.token_S.device.type == "cuda":
            from epmoe.kernels import sequence_state as decode_triton

            state = (self.token_S, self.position_S, self.seen_SV)
            return decode_triton.advance(id_B, sequence_B, position_B, *state, self.vocab)
        token_B = id_B.clamp(max=self.vocab - 1)
        if self.seen_SV is not None:
            self.seen_SV[sequence_B, token_B] = True
        real_B = sequence_B != self.spare
        self.token_S[sequence_B] = torch.where(real_B, token_B, 0)
        self.position_S[sequence_B] = torch.where(real_B, position_B, 0)


class Variant(NamedTuple):
    """What a decode step's rows ask for beyond their next ids."""

    level: Level
    logits: bool  # keep them for log-probabilities


def vocabulary_part(vocab: int, chunk: int, rank: int, size: int) -> tuple[int, int] | None:
    """A rank's run of whole chunks of the vocabulary; None when there is nothing to share, or too little.

    >>> [vocabulary_part(100, 16, rank, 3) for rank in range(3)]
    [(0, 32), (32, 64), (64, 100)]
    """
    chunks = -(-vocab // chunk)
    if size == 1 or chunks < size:
        return None
    return chunks * rank // size * chunk, min(chunks * (rank + 1) // size * chunk, vocab)


class Decoder:
    """The decode step over buffers that stay where they are: rows in `sequence_M`, ids and logits out.

    Where all rows are greedy and nobody wants logits, each rank projects to its part of the vocabulary only.

    Args:
        rows: M, the most rows of a step.
    """

    def __init__(self, model: Model, cache: Cache, state: State, rows: int) -> None:
        self.model, self.cache, self.state = model, cache, state
        device, ranks = state.ranks.device, state.ranks
        self.part = vocabulary_part(state.vocab, model.vocab_chunk, ranks.expert_rank, ranks.expert_size)
        self.sequence_M = torch.full((rows,), state.spare, dtype=torch.int64, device=device)
        self.id_M = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logits_MV: torch.Tensor | None = None

    def keep_logits(self) -> None:
        if self.logits_MV is None:
            self.logits_MV = torch.zeros(len(self.id_M), self.state.vocab, device=self.id_M.device)

    def step(self, rows: int, variant: Variant) -> None:
        """One token of the first `rows` sequences of `sequence_M`; ids are in `id_M` then. A collective.

        This is what a graph captures: no size in it depends on anything but `rows`.
        """
        sequence_B = self.sequence_M[:rows]
        token_B, position_B, next_B = self.state.take(sequence_B)
        part = None if variant.logits or variant.level > Level.GREEDY else self.part
        logits_BV = self.model(DecodeStep(token_B, position_B, sequence_B, part), self.cache)
        self.id_M[:rows] = self.state.choose(logits_BV, sequence_B, next_B, variant.level, part)
        if variant.logits:
            assert self.logits_MV is not None, "Decoder.keep_logits was not called"
            self.logits_MV[:rows] = logits_BV
