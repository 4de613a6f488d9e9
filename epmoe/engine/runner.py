"""Runner: what the scheduler decided, launched on this rank's device; ids come back in flights.

Letters: T tokens of a step · B sequences of a step · O of them whose logits are wanted · V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from epmoe.batch import Step
from epmoe.cache.cache import Cache
from epmoe.engine import scheduler
from epmoe.engine.decode_step import State, StaticDecode
from epmoe.engine.request import TokenLogprobs, Variant
from epmoe.engine.sampler import to_logprobs, top_logprobs
from epmoe.models import Model
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import Arrival, to_device

Sequences = Sequence[scheduler.Sequence]
Landed = tuple[scheduler.Sequence, int, TokenLogprobs | None]


class Flight:
    """New ids of some sequences on their way to the host, with the log-probabilities that were asked for."""

    def __init__(self, sequences: Sequences, id_B: torch.Tensor, logits_BV: torch.Tensor | None) -> None:
        self.sequences = sequences
        self.asked = [row for row, each in enumerate(sequences) if each.request.params.logprobs]
        tensors = [id_B]
        if self.asked:
            assert logits_BV is not None
            row_O = to_device(self.asked, torch.int64, id_B.device)
            top = max(sequences[row].request.params.logprobs for row in self.asked)
            chosen_O = id_B[row_O].clamp(max=logits_BV.shape[1] - 1)  # logits that are not finite have chosen no token
            tensors += top_logprobs(logits_BV[row_O], chosen_O, top)
        self.arrival = Arrival(tensors)
        for sequence in sequences:
            sequence.launched += 1

    def land(self, timeout_s: float) -> Iterator[Landed]:
        """Each sequence's new id and its log-probabilities.

        Raises:
            NoArrival: the step did not end in time.
        """
        id_B, *found = self.arrival.wait(timeout_s)
        logprobs = dict(zip(self.asked, to_logprobs(*found), strict=True)) if found else {}
        for row, (sequence, token) in enumerate(zip(self.sequences, id_B.tolist(), strict=True)):
            yield sequence, token, logprobs.get(row)


class Runner:
    """A model, its cache and what the device knows of each sequence. Its methods are collectives of the expert group.

    Args:
        rows: the most sequences of a decode step.
    """

    def __init__(self, model: Model, cache: Cache, ranks: Ranks, rows: int) -> None:
        self.model, self.cache, self.ranks = model, cache, ranks
        self.state = State(cache, model.config.vocab, ranks)
        self.decode = StaticDecode(model, cache, self.state, rows)

    def keep_seen(self) -> bool:
        """Keep the ids of each sequence from now on; whether that is new."""
        new = self.state.sequences.seen_SV is None
        self.state.keep_seen()
        return new

    def admit(self, sequence: scheduler.Sequence) -> None:
        """Tell the device of a sequence that the scheduler has admitted: its pages, its parameters."""
        self.cache.write(sequence.handle)
        self.state.admit(sequence.handle, sequence.request.ids, sequence.request.params)

    def prefill(self, work: Sequence[tuple[scheduler.Sequence, int]]) -> Flight | None:
        """One forward pass over so many tokens of each prompt; the first tokens of those that end with it."""
        if not work:
            return None
        logits_OV = self.model(build(work, self.ranks.device), self.cache)
        for sequence, tokens in work:
            sequence.cached += tokens
        done = [sequence for sequence, _ in work if not sequence.pending]
        if not done:
            return None
        sequence_O = to_device([each.handle for each in done], torch.int64, self.ranks.device)
        position_O = to_device([len(each.request.ids) for each in done], torch.int64, self.ranks.device)
        id_O = self.state.sample(logits_OV, sequence_O, position_O, _variant(done).level)
        return Flight(done, id_O, logits_OV)

    def launch(self, rows: Sequences, replay: Callable[[Sequence[int], Variant], torch.Tensor]) -> Flight | None:
        """One decode step of these sequences; `replay` starts it and gives its ids [B]."""
        if not rows:
            return None
        variant = _variant(rows)
        id_B = replay([each.handle for each in rows], variant)
        return Flight(rows, id_B, self.decode.logits_MV if variant.logits else None)


def _variant(sequences: Sequences) -> Variant:
    return Variant.of(sequence.request.params for sequence in sequences)


def build(work: Sequence[tuple[scheduler.Sequence, int]], device: torch.device) -> Step:
    """The step of so many tokens of each prompt; the logits of each prompt's last token are wanted."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, outputs = [0], []
    for sequence, count in work:
        span = range(sequence.cached, sequence.cached + count)
        tokens += sequence.request.ids[span.start : span.stop]
        positions += span
        starts.append(len(tokens))
        if count == sequence.pending:
            outputs.append(len(tokens) - 1)
    return Step(
        token_T=to_device(tokens, torch.int64, device),
        position_T=to_device(positions, torch.int64, device),
        start_B1=tuple(starts),
        cached_B=tuple(sequence.cached for sequence, _ in work),
        sequence_B=tuple(sequence.handle for sequence, _ in work),
        output_O=to_device(outputs, torch.int64, device),
    )
