"""A step on the device: tokens → model → sampler → next tokens, which the device feeds back itself.

    state[handle]: token, position, sampling parameters, ids seen                (epmoe/engine/state.py)
       │  ▲
       ▼  └──── write back ◀── broadcast ◀── sample ◀──┐
    rows that decode ──▶ model ──▶ logits_OV ──────────┘──▶ id_O, for the host to read later
    pieces of prompts ─▶

A step that only decodes needs nothing from the host but the handles of its rows, so it can be launched before the last
one's tokens are known there. All of it lies in buffers that stay where they are, so that each function here can be a
CUDA graph (epmoe/engine/graphs.py):

    decode(rows, variant)    a step of rows alone, whole; where no row's logits are adjusted
    rows(rows)               it up to the last norm
    drafts(rows)             the same, of the host's rows: several of a sequence that has a draft
    body(tokens, rows)       a step with prompts, up to the last norm
    head(count, variant)     the rest of these: the vocabulary, the sampler, which of a draft's ids count
    extend(part, size)       where a model drafts: it goes over what `drafts` or a `body` has fed (proposer.py)

Letters: T tokens of a step · B rows of it · P pieces of prompts · O outputs · M the most rows, pieces and outputs ·
H hidden · V vocabulary · S tokens of prompts that are to be scored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from epmoe.batch import Beside, Drafted, Step
from epmoe.cache.cache import Cache, Changes
from epmoe.engine.proposer import Proposer
from epmoe.engine.ragged import Ragged
from epmoe.engine.request import Level, Variant
from epmoe.engine.state import State
from epmoe.models import DraftModel, Model
from epmoe.ranks.transfer import Stage, to_device

# Up to so many rows ranks of one node exchange logits. gpt-oss' are 0.8 MB a row: of 64, which two GPUs exchange in
# 0.13 ms at 200 GB/s, a rank makes the half that the other would in 0.14 ms (an estimate; eight gain twice as much).
GATHERED_ROWS = 64


def vocabulary_part(vocab: int, chunk: int, rank: int, size: int) -> tuple[int, int] | None:
    """A rank's run of whole chunks of the vocabulary; None when there is nothing to share, or too little.

    >>> [vocabulary_part(100, 16, rank, 3) for rank in range(3)]
    [(0, 32), (32, 64), (64, 100)]
    """
    chunks = -(-vocab // chunk)
    if size == 1 or chunks < size:
        return None
    return chunks * rank // size * chunk, min(chunks * (rank + 1) // size * chunk, vocab)


class Sizes(NamedTuple):
    """Of a step, at most."""

    sequences: int
    tokens: int  # of a `body`
    drafted_rows: int = 0  # of one without prompts, those of drafts among them; 0: there are no drafts
    score_rows: int = 64  # of prompts' tokens whose logits are made at a time


class StaticStep:
    """The parts of a step over buffers that stay where they are; ids are in `id_M` then.

    Each rank projects to its part of the vocabulary only. Where all outputs are greedy and nobody wants logits, ranks
    tell each other what they have found in theirs, else the logits, if these are not many.

    Args:
        sizes: of a step, at most.
        drafter: that drafts; None: nothing is trained to.
    """

    def __init__(
        self, model: Model, cache: Cache, state: State, sizes: Sizes, drafter: DraftModel | None = None
    ) -> None:
        self.model, self.cache, self.state = model, cache, state
        self.pieces, self.tokens, self.drafted = sizes.sequences, sizes.tokens, sizes.drafted_rows > 0
        rows = max(sizes.sequences, sizes.drafted_rows)
        device, ranks = state.ranks.device, state.ranks
        size = ranks.expert_size
        parts = [vocabulary_part(state.vocab, model.vocab_chunk, rank, size) for rank in range(size)]
        self.part, self.widths = parts[ranks.expert_rank], [part[1] - part[0] for part in parts if part]
        self.most_shared = GATHERED_ROWS if ranks.nodes == 1 else 0

        # What the host orders lies in one buffer, so that a step takes one copy; each part begins at 16 bytes.
        even = rows + rows % 2
        tokens = max(self.tokens, even)  # those of `drafts` may be more than a body's
        self.parts = [tokens] * 2 + [even] * 7 + [2 * even] + [2] + [self.changes(self.tokens, self.pieces)] * 2
        self.order = torch.zeros(sum(self.parts), dtype=torch.int64, device=device)
        self.given_T, self.position_T, *of_M, spans, one, self.place_U, self.page_U = self.order.split(self.parts)
        self.row_M, self.output_M, self.ended_M, self.next_M, self.chosen_M, *drafted = (each[:rows] for each in of_M)
        self.drafted_M = Drafted(*drafted)
        self.span_M4, self.rows_1 = spans.view(torch.int32).view(-1, 4)[:rows], one.view(torch.int32)[:1]
        self.stage = Stage(self.order, self.parts)
        self.sequence_M = torch.full((rows,), state.spare, dtype=torch.int64, device=device)  # of a decode
        self.norm_MH: torch.Tensor | None = None  # what a body leaves for the head
        self.scored_SH: torch.Tensor | None = None  # what `run` leaves of the tokens that are to be scored
        self.id_M = torch.zeros(rows, dtype=torch.int64, device=device)
        self.proposer = None if drafter is None else Proposer(drafter, model, cache, state, (rows, tokens))
        self.logits_MV: torch.Tensor | None = None

    def keep_logits(self) -> None:
        if self.logits_MV is None:
            self.logits_MV = torch.zeros(len(self.id_M), self.state.vocab, device=self.id_M.device)

    def decode(self, rows: int, variant: Variant) -> None:
        """One token of the first `rows` sequences of `sequence_M`. A collective.

        No size in it depends on anything but `rows`.
        """
        sequence_B = self.sequence_M[:rows]
        token_B, position_B, next_B = self.state.last(sequence_B)
        norm_BH = self.model.hidden(Step(token_B, position_B, sequence_B), self.cache)
        id_B = self._choose(norm_BH, sequence_B, next_B, variant)
        self.id_M[:rows] = self.state.advance(id_B, sequence_B, next_B)

    def rows(self, rows: int) -> None:
        """The same up to the last norm, for a head of as many outputs, which may have to wait. A collective."""
        sequence_B = self.sequence_M[:rows]
        token_B, position_B, next_B = self.state.last(sequence_B)
        self._keep(self.model.hidden(Step(token_B, position_B, sequence_B), self.cache))
        self.ended_M[:rows], self.next_M[:rows] = sequence_B, next_B
        if self.drafted:
            self.chosen_M[:rows] = sequence_B
            self.drafted_M.ahead_O[:rows].zero_()
            self.drafted_M.wanted_O[:rows].fill_(-1)

    def drafts(self, rows: int) -> None:
        """So many rows, some of which may be of one sequence, up to the last norm, as `order_step` has said. A
        collective.

        No size in it depends on anything but `rows`.
        """
        self._keep(self.model.hidden(self._drafts(rows), self.cache))

    def _drafts(self, rows: int) -> Step:
        token_B = self.state.tokens(self.given_T[:rows])
        return Step(token_B, self.position_T[:rows], self.row_M[:rows], drafted=True)

    def most(self, tokens: int, *, rows: bool) -> int:
        """Pieces of prompts, and outputs, that a `body` of so many tokens has room for.

        `pieces` beside rows, which are outputs too, and in the largest body; else a quarter of the tokens: room that is
        not used takes time (a program that finds nothing to do for each piece, a row of the last layer's experts).
        """
        every = rows or tokens == self.tokens
        return min(tokens, self.pieces, self.pieces if every else max(8, tokens // 4))

    def changes(self, tokens: int, pieces: int) -> int:
        """Pages that a `body` has room for, which its step's sequences have come to hold; prefixes may bring more."""
        stocks, page = len(self.cache.pages.stocks), self.cache.pages.size
        return stocks * (tokens // page + pieces)

    def order_step(self, ragged: Ragged, changes: Changes = ((), ())) -> None:
        """Tell `body` and `head` what to do. What is beyond its tokens and outputs is nobody's.

        Args:
            changes: of the cache's pages, for a `body` that has room for them.
        """
        given_T, position_T, row_M, output_M, ended_M, next_M, *parts = self.stage.begin()
        chosen_M, ahead_M, wanted_M, spans, one, place_U, page_U = parts
        if (tokens := len(ragged.given)) <= len(given_T):  # else `run` takes them
            given_T[:tokens], position_T[: len(ragged.rows)] = ragged.given, ragged.row_positions
            for begin, end, cached, _ in ragged.spans:
                position_T[begin:end] = np.arange(cached, cached + end - begin)
        row_M[: len(ragged.rows)], row_M[len(ragged.rows) :] = ragged.rows, self.state.spare
        outputs = len(ragged.outputs)
        ended_M[outputs:] = self.state.spare
        ended_M[:outputs] = [each.handle for each in ragged.ended]
        output_M[:outputs], next_M[:outputs] = ragged.outputs, ragged.nexts
        chosen_M[:] = ended_M
        wanted_M[:] = -1
        if ragged.ahead:
            ahead_M[:outputs], wanted_M[:outputs] = ragged.ahead, ragged.wanted
        if ragged.chosen:
            chosen_M[:outputs] = ragged.chosen
        spans.view("int32")[: 4 * len(ragged.spans)] = [number for span in ragged.spans for number in span]
        one.view("int32")[0] = len(ragged.rows)
        place_U[:] = self.cache.nobody
        place_U[: len(changes[0])], page_U[: len(changes[1])] = changes
        self.stage.send()

    def body(self, tokens: int, *, rows: bool) -> None:
        """A step of so many tokens up to the last norm, as `order_step` has said. A collective.

        No size in it depends on anything but `tokens`, and on whether there may be `rows` beside the prompts.
        """
        room = self.changes(tokens, self.most(tokens, rows=rows))
        self.cache.set(self.place_U[:room], self.page_U[:room])
        self._keep(self.model.hidden(self._body(tokens, rows=rows), self.cache))

    def _body(self, tokens: int, *, rows: bool) -> Step:
        most = self.most(tokens, rows=rows)
        return Step(
            token_T=self.state.tokens(self.given_T[:tokens]),
            position_T=self.position_T[:tokens],
            sequence_B=self.row_M[: most if rows else 0],
            rows_1=self.rows_1,
            spans=None,
            span_P4=self.span_M4[:most],
            output_O=self.output_M[:most],
            drafted=self.drafted,
        )

    def extend(self, part: str, size: int) -> None:
        """Let the draft model go over the tokens of `drafts`, or of a `body`: "mixed", or "prompts" alone."""
        assert self.proposer is not None
        step = self._drafts(size) if part == "drafts" else self._body(size, rows=part == "mixed")
        self.proposer.extend(step, self.id_M, self.ended_M)

    def run(self, ragged: Ragged, every: Sequence[Ragged] = ()) -> None:
        """What `body` does, for a step of any size, whose sizes the host knows. A collective.

        Args:
            every: steps of all ranks, this one's among them, where each has its own; where one has no tokens, nobody's
                goes through the layers.
        """
        if len(every) > 1:
            beside = Beside(*zip(*(each.sizes for each in every), strict=True))
            step = self._known(ragged if ragged.given else Ragged.nobody(self.state.spare), beside)
        else:
            step = self._known(ragged)
        outputs, norm_XH = len(ragged.outputs), self.model.hidden(step, self.cache)
        self._keep(norm_XH[:outputs])
        if ragged.scored:
            self.scored_SH = norm_XH[outputs:]

    def extend_known(self, ragged: Ragged) -> None:
        """What `extend` does, after `run`."""
        assert self.proposer is not None
        self.proposer.extend_known(self._known(ragged), ragged, self.id_M, self.ended_M)

    def _known(self, ragged: Ragged, beside: Beside | None = None) -> Step:
        device = self.id_M.device
        return Step(
            token_T=self.state.tokens(to_device(ragged.given, torch.int64, device)),
            position_T=to_device(ragged.positions, torch.int64, device),
            sequence_B=to_device(ragged.rows, torch.int64, device),
            spans=tuple(ragged.spans),
            output_O=to_device([*ragged.outputs, *ragged.scored], torch.int64, device),
            drafted=bool(ragged.ahead),
            beside=beside,
        )

    def head(self, count: int, variant: Variant) -> None:
        """The next ids of the first `count` outputs. A collective."""
        assert self.norm_MH is not None, "no body ran"
        sequence_O, next_O, chosen_O = self.ended_M[:count], self.next_M[:count], self.chosen_M[:count]
        id_O = self._choose(self.norm_MH[:count], chosen_O if self.drafted else sequence_O, next_O, variant)
        drafted_O = Drafted(*(each[:count] for each in self.drafted_M)) if self.drafted else None
        self.id_M[:count] = self.state.advance(id_O, sequence_O, next_O, drafted_O)

    def take_scored(self) -> torch.Tensor:
        """[S, H], what `run` has left of them; it is kept no longer."""
        assert self.scored_SH is not None, "no step with such tokens ran"
        scored_SH, self.scored_SH = self.scored_SH, None
        return scored_SH

    def _keep(self, norm_OH: torch.Tensor) -> None:
        if self.norm_MH is None:
            self.norm_MH = norm_OH.new_zeros(len(self.id_M), norm_OH.shape[1])
        self.norm_MH[: len(norm_OH)] = norm_OH
        if self.proposer is not None:
            self.proposer.keep()

    def _choose(
        self, norm_OH: torch.Tensor, sequence_O: torch.Tensor, next_O: torch.Tensor, variant: Variant
    ) -> torch.Tensor:
        """int64 [O]; logits are kept where the variant says so."""
        whole = variant.logits or variant.adjusted or variant.level > Level.GREEDY
        part = None if whole and len(norm_OH) > self.most_shared else self.part
        logits_OV = self.model.logits(norm_OH, part)
        if part and whole:
            logits_OV, part = self.state.ranks.beside(logits_OV, self.widths), None
        if variant.logits:
            assert self.logits_MV is not None, "StaticStep.keep_logits was not called"
            self.logits_MV[: len(norm_OH)] = logits_OV
        return self.state.sample(logits_OV, sequence_O, next_O, variant, part)
