"""Planned: what a step is to do on a rank, as every host knows it. Lists, no tensors.

Where ranks have requests of their own, each host plans the steps of all, so that it knows of what size the largest is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from epmoe.engine import sequence as engine
from epmoe.engine.ragged import Ragged, Score
from epmoe.engine.request import Variant
from epmoe.engine.sequence import Work


@dataclass(frozen=True)
class Planned:
    """A rank's step."""

    work: Work
    ragged: Ragged | None  # None: it has nothing but rows, which the device knows
    sequences: Sequence[engine.Sequence]  # whose next ids it is to choose; several in a row are of one that has a draft
    variant: Variant | None  # how; None: there are none
    scores: Sequence[Score]

    @property
    def brings(self) -> bool:
        """Whether anything comes of it."""
        return bool(self.sequences or self.scores or self.work.modelled)

    @property
    def restricted(self) -> list[engine.Sequence]:
        """Those that need the masks of their grammars before its head."""
        adjusted = self.variant is not None and self.variant.adjusted
        return [each for each in dict.fromkeys(self.sequences) if each.matcher] if adjusted else []

    @classmethod
    def of(cls, work: Work, *, listed: bool) -> "Planned":
        """`listed`: the device does not know by itself what to do."""
        ragged = Ragged.of(work.rows, work.pieces, work.drafts) if listed else None
        sequences, scores = (ragged.ended, ragged.scores) if ragged else (work.rows, ())
        variant = Variant.joined([each.request.variant for each in sequences]) if sequences else None
        return cls(work, ragged, sequences, variant, scores)

    def launched(self) -> None:
        """Its tokens count as computed from now on."""
        for sequence, tokens in self.work.pieces:
            sequence.cached += tokens
        for sequence in dict.fromkeys(self.sequences):
            sequence.launched += 1
        for sequence, places in self.scores:
            sequence.scored += len(places)


def planned(works: Sequence[Work]) -> list[Planned]:
    """Of each rank; all are listed where one is, since all must make the same kind of step."""
    listed = any(work.pieces or work.drafts or (work.rows and work.modelled) for work in works)
    plans = [Planned.of(work, listed=listed) for work in works]
    for plan in plans:
        plan.launched()
    return plans
