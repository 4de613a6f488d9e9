"""Flight: what a step has brought, on its way to the host: ids, log-probabilities, what a draft model says.

Where ranks have requests of their own, each one's results go to all others first, in one tensor: every host knows how
many words each of them has.

Letters: B sequences whose ids come · O of them whose log-probabilities are wanted · S scored tokens of prompts · Q most
likely ones · K drafted tokens · N ranks · W words of 8 bytes · V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from epmoe.engine import sequence as engine
from epmoe.engine.planned import Planned
from epmoe.engine.proposer import DEPTH
from epmoe.engine.ragged import Score
from epmoe.engine.request import TokenLogprobs
from epmoe.engine.sampler import to_logprobs, top_logprobs
from epmoe.engine.scores import deliver, most_asked
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import Arrival, to_device

Sequences = Sequence[engine.Sequence]
Landed = tuple[engine.Sequence, int, TokenLogprobs | None]


@dataclass(frozen=True)
class Awaited:
    """What a rank's step brings, as every host knows it."""

    sequences: Sequences  # of the ids; several in a row are of one that has a draft
    scores: Sequence[Score]
    told: Sequences  # of whose next tokens a draft model says something

    @classmethod
    def of(cls, plan: Planned) -> "Awaited":
        return cls(plan.sequences, plan.scores, list(plan.work.told) if plan.work.modelled else ())

    @property
    def asked(self) -> list[int]:
        """Places of the ids whose log-probabilities are asked for."""
        return [row for row, each in enumerate(self.sequences) if each.request.params.logprobs]

    @property
    def waits(self) -> bool:
        """Whether the next step's rows follow from it."""
        return bool(self.told) or len(set(self.sequences)) < len(self.sequences)

    def tensors(
        self,
        id_B: torch.Tensor,
        logits_BV: torch.Tensor | None,
        found: Sequence[torch.Tensor],
        draft_BK: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """All of it on the device, in the order that `shapes` has.

        Args:
            found: what `scores.scored` has found of the prompts' tokens.
        """
        tensors = [id_B]
        if asked := self.asked:
            assert logits_BV is not None
            top = max(self.sequences[row].request.params.logprobs for row in asked)
            logits_OV, id_O = logits_BV[: len(self.sequences)], id_B
            if len(asked) < len(self.sequences):  # a row of logits takes as long to copy as to look at
                row_O = to_device(asked, torch.int64, id_B.device)
                logits_OV, id_O = logits_BV[row_O], id_B[row_O]
            # Logits that are not finite have chosen no token, and what does not count means nothing.
            chosen_O = id_O.clamp(0, logits_BV.shape[1] - 1)
            tensors += top_logprobs(logits_OV, chosen_O, top)
        return [*tensors, *found, *([draft_BK] if draft_BK is not None else ())]

    def shapes(self, vocab: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Of `tensors`; each value has 8 bytes."""
        shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [(torch.int64, (len(self.sequences),))]
        tops = []
        if asked := self.asked:
            tops.append((len(asked), max(self.sequences[row].request.params.logprobs for row in asked)))
        if self.scores:
            tops.append((sum(len(places) for _, places in self.scores), most_asked(self.scores)))
        for rows, top in tops:
            many = rows, min(top, vocab)
            shapes += [(torch.float64, (rows,)), (torch.int64, many), (torch.float64, many)]
        if self.told:
            shapes.append((torch.int64, (len(self.told), DEPTH)))
        return shapes

    def land(self, tensors: Sequence[torch.Tensor]) -> tuple[list[Landed], list[list[int]]]:
        """Each sequence's new id and its log-probabilities, once sequences have those of their prompts; and the drafts.

        Of one with a draft all that it may bring, in order; -1 are those that do not count.
        """
        id_B, *found = tensors
        drafts = found.pop().tolist() if self.told else []
        if self.scores:
            deliver(self.scores, found[-3:])
            del found[-3:]
        logprobs = dict(zip(self.asked, to_logprobs(*found), strict=True)) if found else {}
        pairs = enumerate(zip(self.sequences, id_B.tolist(), strict=True))
        return [(sequence, token, logprobs.get(row)) for row, (sequence, token) in pairs], drafts


class Flight:
    """A step's results.

    Args:
        awaited: of each rank that brings something else than the others, in the order of the lanes.
        tensors: of this rank, as `Awaited.tensors` has them.
        ranks: the group whose ranks tell each other, a collective then; None: all have the same.
    """

    def __init__(
        self, awaited: Sequence[Awaited], tensors: Sequence[torch.Tensor], vocab: int, ranks: Ranks | None
    ) -> None:
        self.awaited, self.shared = awaited, ranks is not None
        self.shapes = [each.shapes(vocab) for each in awaited] if self.shared else []
        self.told = [sequence for each in awaited for sequence in each.told]
        self.drafts: list[list[int]] = []  # of those in `told`, once it has landed
        self.waits = any(each.waits for each in awaited)
        self.arrival = Arrival([_told_to_all(tensors, self.shapes, ranks)] if ranks is not None else tensors)

    def land(self, timeout_s: float) -> Iterator[Landed]:
        """As `Awaited.land`, of one rank after the other.

        Raises:
            NoArrival: the step did not end in time.
        """
        tensors = self.arrival.wait(timeout_s)
        every = [_unpacked(*each) for each in zip(tensors[0], self.shapes, strict=True)] if self.shared else [tensors]
        for awaited, own in zip(self.awaited, every, strict=True):
            landed, drafts = awaited.land(own)
            self.drafts += drafts
            yield from landed


def _words(shapes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[int]:
    return [prod(shape) for _, shape in shapes]


def _told_to_all(
    tensors: Sequence[torch.Tensor],
    shapes: Sequence[Sequence[tuple[torch.dtype, tuple[int, ...]]]],
    ranks: Ranks,
) -> torch.Tensor:
    """Every rank's words, int64 [N, W]."""
    assert [(each.dtype, tuple(each.shape)) for each in tensors] == shapes[ranks.expert_rank], "another step's results"
    sizes = [sum(_words(each)) for each in shapes]
    own_W = tensors[0].new_zeros(max(sizes))
    own_W[: sizes[ranks.expert_rank]] = torch.cat([each.flatten().view(torch.int64) for each in tensors])
    return ranks.stack(own_W)


def _unpacked(word_W: torch.Tensor, shapes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[torch.Tensor]:
    words = _words(shapes)
    parts = word_W[: sum(words)].split(words)
    return [part.view(dtype).view(shape) for part, (dtype, shape) in zip(parts, shapes, strict=True)]
