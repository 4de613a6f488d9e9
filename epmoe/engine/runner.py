"""Runner: what the scheduler decided, launched on this rank's device; ids come back in flights.

Letters: B sequences whose ids come · O of them whose log-probabilities are wanted · V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from epmoe.cache.cache import Cache
from epmoe.engine import scheduler
from epmoe.engine.ragged import Ragged, Score
from epmoe.engine.request import TokenLogprobs, Variant
from epmoe.engine.sampler import to_logprobs, top_logprobs
from epmoe.engine.scheduler import Piece
from epmoe.engine.scores import deliver, scored
from epmoe.engine.state import State
from epmoe.engine.step import StaticStep
from epmoe.models import Model
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import Arrival, to_device

Sequences = Sequence[scheduler.Sequence]
Prompts = tuple[Sequence[Score], Sequence[torch.Tensor]]
Landed = tuple[scheduler.Sequence, int, TokenLogprobs | None]


class Flight:
    """New ids of some sequences on their way to the host, with the log-probabilities that were asked for.

    Args:
        prompts: `scores` of prompts' tokens, and what `scores.scored` has found of them.
    """

    def __init__(
        self, sequences: Sequences, id_B: torch.Tensor, logits_BV: torch.Tensor | None, prompts: Prompts
    ) -> None:
        self.sequences, (self.scores, found) = sequences, prompts
        self.asked = [row for row, each in enumerate(sequences) if each.request.params.logprobs]
        tensors = [id_B]
        if self.asked:
            assert logits_BV is not None
            row_O = to_device(self.asked, torch.int64, id_B.device)
            top = max(sequences[row].request.params.logprobs for row in self.asked)
            chosen_O = id_B[row_O].clamp(max=logits_BV.shape[1] - 1)  # logits that are not finite have chosen no token
            tensors += top_logprobs(logits_BV[row_O], chosen_O, top)
        self.arrival = Arrival([*tensors, *found])
        for sequence in sequences:
            sequence.launched += 1
        for sequence, places in self.scores:
            sequence.scored += len(places)

    def land(self, timeout_s: float) -> Iterator[Landed]:
        """Each sequence's new id and its log-probabilities, once sequences have those of their prompts.

        Raises:
            NoArrival: the step did not end in time.
        """
        id_B, *found = self.arrival.wait(timeout_s)
        if self.scores:
            deliver(self.scores, found[-3:])
            del found[-3:]
        logprobs = dict(zip(self.asked, to_logprobs(*found), strict=True)) if found else {}
        for row, (sequence, token) in enumerate(zip(self.sequences, id_B.tolist(), strict=True)):
            yield sequence, token, logprobs.get(row)


class Launcher(Protocol):
    """Starts the parts of a step, as graphs or not; both give the new ids, on the device until the next step."""

    def decode(self, handles: Sequence[int], variant: Variant) -> torch.Tensor: ...
    def ragged(self, ragged: Ragged, variant: Variant | None) -> torch.Tensor: ...


class Runner:
    """A model, its cache and what the device knows of each sequence. Its methods are collectives of the expert group.

    Args:
        rows: the most sequences of a step.
        tokens: the most tokens of a step that is a graph.
        score_rows: logits of prompts' tokens are made of so many rows at a time, at most.
    """

    def __init__(self, model: Model, cache: Cache, ranks: Ranks, rows: int, tokens: int, score_rows: int) -> None:
        self.model, self.cache, self.ranks, self.score_rows = model, cache, ranks, score_rows
        self.state = State(cache, model.config.vocab, ranks)
        self.static = StaticStep(model, cache, self.state, rows, tokens)

    def keep_seen(self) -> bool:
        """Keep the ids of each sequence from now on; whether that is new."""
        new = self.state.sequences.seen_SV is None
        self.state.keep_seen()
        return new

    def admit(self, sequence: scheduler.Sequence) -> None:
        """Tell the device of a sequence that begins: its parameters, and its ids where they count."""
        self.state.admit(sequence.handle, sequence.prompt, sequence.request.params)

    def launch(self, rows: Sequences, work: Sequence[Piece], launcher: Launcher) -> Flight | None:
        """One step: the next token of each row, and so many tokens of each prompt; the ids that it gives."""
        if not work:
            self.cache.write()
            return self._flight(rows, launcher.decode([each.handle for each in rows], _variant(rows))) if rows else None
        ragged = Ragged.of(rows, work)
        id_O = launcher.ragged(ragged, _variant(ragged.ended) if ragged.ended else None)
        for sequence, tokens in work:
            sequence.cached += tokens
        if not ragged.scores:
            return self._flight(ragged.ended, id_O) if ragged.ended else None
        found = scored(self.model, self.static.take_scored(), ragged.scores, self.score_rows)
        return self._flight(ragged.ended, id_O, (ragged.scores, found))

    def _flight(self, sequences: Sequences, id_O: torch.Tensor, prompts: Prompts = ((), ())) -> Flight:
        logits = bool(sequences) and _variant(sequences).logits
        return Flight(sequences, id_O, self.static.logits_MV if logits else None, prompts)


def _variant(sequences: Sequences) -> Variant:
    return Variant.of(sequence.request.params for sequence in sequences)
