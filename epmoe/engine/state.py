"""What the device knows of every sequence: its last token and position, its sampling parameters, the ids seen.

Letters: B rows of a step · S handles of the cache · P sampling parameters · V vocabulary.
"""

from typing import Any

import torch

from epmoe.batch import SequenceState
from epmoe.cache.cache import Cache
from epmoe.engine.request import Level, SamplingParams
from epmoe.engine.sampler import SamplingTensors, sample
from epmoe.layers.twin import twin
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import to_device
from epmoe.trace import named


class State:
    """By a sequence's handle in the cache; the spare one stays at position 0."""

    def __init__(self, cache: Cache, vocab: int, ranks: Ranks) -> None:
        count, device = cache.spare + 1, ranks.device
        self.spare, self.vocab, self.ranks = cache.spare, vocab, ranks
        token_S, position_S = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
        self.sequences = SequenceState(token_S, position_S, seen_SV=None)
        self.params_S = SamplingTensors.of([SamplingParams()] * count, device)
        self.told: dict[int, tuple[Any, ...]] = {}  # what it holds of each handle

    def keep_seen(self) -> None:
        """Keep what was seen from now on. Graphs must be captured after this, or they don't write it."""
        if self.sequences.seen_SV is None:
            shape = (len(self.sequences.token_S), self.vocab)
            seen_SV = torch.zeros(shape, dtype=torch.bool, device=self.ranks.device)
            self.sequences = self.sequences._replace(seen_SV=seen_SV)

    def admit(self, handle: int, ids: tuple[int, ...], params: SamplingParams) -> None:
        """Take over a request's parameters."""
        device = self.ranks.device
        told = (*params.row(), params.seed)
        if self.told.get(handle) != told:  # most requests have their forerunner's
            self.told[handle] = told
            self.params_S.value_BP[handle] = to_device(params.row(), torch.float64, device)
            self.params_S.seed_B[handle] = params.seed
        if params.repetition_penalty != 1:
            seen_SV = self.sequences.seen_SV
            assert seen_SV is not None, "State.keep_seen was not called"
            seen_SV[handle] = False
            seen_SV[handle].index_fill_(0, to_device(ids, torch.int64, device), True)

    def sample(
        self,
        logits_BV: torch.Tensor,
        sequence_B: torch.Tensor,
        position_B: torch.Tensor,
        level: Level,
        part: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """The next ids [B], at `position_B` of the sequences, and the state after them; a collective.

        They are the same on every rank: those of expert rank 0, or what all ranks find together when each has the
        logits of its `part` of the vocabulary. V, where the logits are not finite, is for the host to see; the state
        gets an id that the model can take until then.
        """
        with named("sample"):
            if level == Level.GREEDY:
                greedy = twin("greedy", logits_BV)
                key_SB = greedy.largest(logits_BV, part[0] if part else 0)
                id_B = greedy.join_largest(self.ranks.stack(key_SB.amax(0)) if part else key_SB, self.vocab)
            else:
                assert part is None
                seen_SV = self.sequences.seen_SV
                seen_BV = None if seen_SV is None or level < Level.FILTER else seen_SV[sequence_B]
                id_B = sample(logits_BV, self.params_S[sequence_B], position_B, seen_BV, level)
            if part is None:
                self.ranks.broadcast(id_B)
        state = twin("sequence_state", self.sequences.token_S)
        state.advance(id_B, sequence_B, position_B, self.sequences, self.vocab)
        found_B: torch.Tensor = id_B
        return found_B

    def tokens(self, given_T: torch.Tensor) -> torch.Tensor:
        """int64 [T]: the given tokens, and where -1 - handle is given, that sequence's last one."""
        handle_T = (-1 - given_T).clamp(min=0)
        return torch.where(given_T < 0, self.sequences.token_S[handle_T], given_T)

    def last(self, sequence_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The last token of each row's sequence, its position and the position after it: int64 [B] each."""
        token_S, position_S, _ = self.sequences
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        found = twin("sequence_state", token_S).take(sequence_B, token_S, position_S)
        return found
