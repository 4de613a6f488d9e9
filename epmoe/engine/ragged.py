"""A step as the host knows it: a token of each sequence that decodes, then pieces of prompts. Lists, no tensors.

    tokens   [ row 0 · row 1 · … | piece 0 · … | piece 1 · … ]
    rows     of a sequence its last token, then those of its draft
    outputs  the rows, and the last tokens of those prompts that end here: their next ids are chosen
    scored   the tokens after which the prompt goes on, where the next one's log-probability is wanted

Letters: T tokens of a step · B rows · P pieces · O outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from epmoe.batch import Span
from epmoe.engine import sequence as engine
from epmoe.engine.sequence import Piece

Drafts = Mapping[engine.Sequence, Sequence[int]]
Score = tuple[engine.Sequence, range]  # places of the prompt's tokens whose log-probabilities come


@dataclass(frozen=True)
class Ragged:
    """What a step is to do."""

    given: list[int]  # a prompt's token; -1 - handle: the last one of that sequence, which the device knows
    row_positions: list[int]  # the spans have those of their tokens
    rows: list[int]  # handles
    spans: list[Span]
    outputs: list[int]  # tokens
    ended: list[engine.Sequence]  # the outputs' sequences
    nexts: list[int]  # the outputs' next positions
    ahead: list[int] = field(
        default_factory=list
    )  # of the outputs: see `batch.Drafted`; empty where there are no drafts
    wanted: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)  # handles by whose parameters the outputs are; empty: their own

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens, of which nobody's is one where it has none, and those whose logits are wanted."""
        return max(1, len(self.given)), len(self.outputs) + len(self.scored)

    @property
    def positions(self) -> list[int]:
        """Of all tokens."""
        spans = (range(cached, cached + end - begin) for begin, end, cached, _ in self.spans)
        return [*self.row_positions, *chain.from_iterable(spans)]

    @property
    def behind(self) -> list[int]:
        """The token behind each one; 0 where it has yet to be chosen."""
        return [*[0] * len(self.rows), *self.follow]

    follow: list[int] = field(default_factory=list)  # tokens behind those of the prompts
    scored: list[int] = field(default_factory=list)  # tokens
    scores: list[Score] = field(default_factory=list)  # whose they are

    @classmethod
    def of(cls, rows: Sequence[engine.Sequence], work: Sequence[Piece], drafts: Drafts | None = None) -> "Ragged":
        """The rows' next tokens and their drafts', and the next tokens of prompts."""
        if drafts:
            made = cls._drafted(rows, drafts)
        else:
            made = cls(
                given=[-1 - row.handle for row in rows],
                row_positions=[row.next - 1 for row in rows],
                rows=[row.handle for row in rows],
                spans=[],
                outputs=list(range(len(rows))),
                ended=list(rows),
                nexts=[row.next for row in rows],
            )
        for sequence, count in work:
            made._add(sequence, count)
        return made

    @classmethod
    def nobody(cls, spare: int) -> "Ragged":
        """A token of the spare sequence, of which nothing comes."""
        return cls(given=[0], row_positions=[0], rows=[spare], spans=[], outputs=[], ended=[], nexts=[])

    @classmethod
    def _drafted(cls, rows: Sequence[engine.Sequence], drafts: Drafts) -> "Ragged":
        made = cls([], [], [], [], [], [], [])
        for row in rows:
            draft = drafts.get(row, ())
            made.given.extend([-1 - row.handle, *draft])
            made.wanted.extend([*draft, -1])
            for ahead in range(1 + len(draft)):
                made.outputs.append(len(made.rows))
                made.rows.append(row.handle)
                made.row_positions.append(row.next - 1 + ahead)
                made.nexts.append(row.next + ahead)
                made.ended.append(row)
                made.ahead.append(ahead)
        return made

    def _add(self, sequence: engine.Sequence, count: int) -> None:
        """The next so many tokens of its prompt."""
        begin, cached = len(self.given), sequence.cached
        self.given.extend(sequence.prompt[cached : cached + count])
        self.follow.extend(sequence.prompt[cached + 1 : cached + count + 1])
        self.follow.extend([0] * (len(self.given) - len(self.rows) - len(self.follow)))
        self.spans.append((begin, begin + count, cached, sequence.handle))
        last = min(cached + count, sequence.scored + sequence.unscored)
        if last > sequence.scored:
            assert cached <= sequence.scored, "what is to be scored was found"
            places = range(sequence.scored + 1, last + 1)
            self.scored.extend(begin + place - 1 - cached for place in places)
            self.scores.append((sequence, places))
        if count == sequence.pending:
            self.outputs.append(begin + count - 1)
            self.ended.append(sequence)
            self.nexts.append(cached + count)
            if self.ahead:
                self.ahead.append(0)
                self.wanted.append(-1)
