"""Speculation: which rows of a step have drafts, and of whom a draft model says what comes next. On the host alone.

drafts.py says what a draft is and how long it may be; here it meets the pages and the room of a step. Nobody gives a
page up for it.
"""

from collections.abc import Sequence as Several

from epmoe.cache.pages import Pages
from epmoe.engine.drafts import MOST_DRAFT, Drafter, Drafting, History, Modelled
from epmoe.engine.sequence import Sequence, Work

NOTHING = History(())  # of one that has said nothing yet


class Speculation:
    """Adds drafts to the scheduler's choices.

    Args:
        most_outputs: of a step with prompts; one without has up to `drafting.most_rows`.
    """

    def __init__(self, pages: Pages, drafting: Drafting, most_outputs: int) -> None:
        self.pages, self.drafting, self.most_outputs = pages, drafting, most_outputs

    def learn(self, sequence: Sequence, token: int) -> None:
        """A token has come."""
        if sequence.history is None:
            sequence.history = self.drafting.history(sequence.request.ids)
        sequence.history.take(token)

    def accept(self, sequence: Sequence) -> None:
        """A token of its draft was right: what its row has chosen counts."""
        self.drafting.accepted += 1
        sequence.launched += 1

    def tell(self, sequence: Sequence, ids: list[int]) -> None:
        """The draft model says that these come next."""
        if isinstance(sequence.history, Modelled) and not sequence.finished:
            sequence.history.told(ids)

    def soon(self, running: Several[Sequence], *, prompts: bool = False) -> bool:
        """Whether the next step would have drafts, for all that has come; it needs the tokens that are under way.

        Args:
            prompts: another rank's step beside this one will have pieces of some.
        """
        rows = [sequence for sequence in running if sequence.decodes]
        room = self._room(len(rows), sum(sequence.pending > 0 for sequence in running), prompts)
        return any(self._counts(rows, room, len(rows)))

    def add_to(self, work: Work, *, prompts: bool = False) -> None:
        """Let rows have drafts, where all their tokens have come; and the draft model go over the step.

        Args:
            prompts: another rank's step beside this one has pieces of some.
        """
        if work.rows:
            self._draft(work, prompts)
        if self.drafting.depth:
            self._model(work)

    def _draft(self, work: Work, prompts: bool) -> None:
        room = self._room(len(work.rows), len(work.pieces), prompts)
        known = [sequence for sequence in work.rows if sequence.launched == len(sequence.ids)]
        for sequence, count in zip(known, self._counts(known, room, len(work.rows)), strict=True):
            got = self._grow(sequence, 1 + count) - 1 if count else 0
            if got > 0 and sequence.history:
                work.drafts[sequence] = sequence.history.draft(got)
                self.drafting.drafted += got

    def _model(self, work: Work) -> None:
        """It says what comes behind the step of those sequences with which it goes on."""
        in_step = [*work.rows, *(sequence for sequence, _ in work.pieces)]
        work.modelled = any(_goes_on(sequence) for sequence in in_step)
        fed = {sequence: count for sequence, count in work.pieces if count == sequence.pending}
        fed |= {sequence: 1 + len(work.drafts.get(sequence, ())) for sequence in work.rows}
        pays = work.modelled and self.drafting.pays(len(fed))  # else nobody drafts, and nobody waits to hear of it
        for sequence, count in fed.items() if pays else ():
            if _goes_on(sequence):
                begin = sequence.computed
                work.told[sequence] = begin + self._grow(sequence, count + self.drafting.depth) - 1

    def _room(self, rows: int, pieces: int, prompts: bool) -> int:
        """For rows of drafts, beside so many rows and pieces of prompts; all ranks make the same kind of step."""
        return (self.most_outputs if pieces or prompts else self.drafting.most_rows) - rows - pieces

    def _counts(self, sequences: Several[Sequence], room: int, rows: int) -> list[int]:
        """How many tokens each drafts in a step of so many rows."""
        drafters: list[Drafter] = []
        for sequence in sequences:
            if sequence.history is None:
                drafters.append((NOTHING, 0))
            else:
                most = min(sequence.end - 1 - sequence.next, MOST_DRAFT)
                drafters.append((sequence.history, self.pages.readable(sequence.handle, most, len(sequences))))
        return self.drafting.allot(drafters, rows, room)

    def _grow(self, sequence: Sequence, count: int) -> int:
        """Pages for up to so many tokens more; how many."""
        return self.pages.grow(sequence.handle, sequence.computed, sequence.computed + count)


def _goes_on(sequence: Sequence) -> bool:
    """Whether the draft model does, with one that has just begun too."""
    return sequence.history is None or sequence.history.modelled
