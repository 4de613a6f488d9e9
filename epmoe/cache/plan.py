"""Where the layers of one window read and write the cache in one step, spelled out for attention.

Letters: T tokens of a step · B rows, sequences that decode · P spans, prompts or pieces of them · C positions attended
to · R rows of a pool (where one position lies).
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from epmoe.batch import Span
from epmoe.cache.rows import PagedRows

# Queries of a block of attention's torch version: from one multiple to the next. A decode has one of them to itself, so
# few; at 131,072 positions the float32 scores of 64 heads are an eighth of a GiB.
QUERIES = 4


@dataclass(frozen=True)
class Prefill:
    """A prompt's tokens: they attend to what is cached and to each other, and are written last."""

    begin: int  # its tokens are begin : end of T
    end: int
    cached: int
    sequence: int
    pool: PagedRows

    @cached_property
    def past_C(self) -> torch.Tensor:
        """int64, rows of the cached positions that its first token attends to, ascending."""
        return self._rows(self.cached - self.pool.columns(self.cached) + 1, self.cached)

    @cached_property
    def row_R(self) -> torch.Tensor:
        """int64, rows of its R tokens."""
        return self._rows(self.cached, self.cached + self.end - self.begin)

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        device = self.pool.device
        position_1C = torch.arange(begin, end, device=device)[None]
        return self.pool.row(torch.full((1, 1), self.sequence, device=device), position_1C)[0]


@dataclass(frozen=True)
class Gather:
    """Rows whose positions lie in one block, spelled out."""

    token_B: torch.Tensor  # int64, the token's index in T
    offset_B: torch.Tensor  # int64, its place in the block
    row_B: torch.Tensor  # int64, the row of the token
    # int64, of the positions from the first that a query at the block's begin sees to the block's end; where a token
    # does not see one, the nearest that it sees: no row of another sequence is ever read.
    row_BC: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """One token of each of B sequences, the first tokens of a step: written, then attended to like the cached ones.

    With `drafted` a sequence may have several rows, one position after the other: all are written before one attends.
    """

    position_B: torch.Tensor  # int64
    sequence_B: torch.Tensor  # int64
    count_1: torch.Tensor | None  # int32, how many of them there are; None: all
    pool: PagedRows
    drafted: bool = False

    @cached_property
    def gathers(self) -> tuple[Gather, ...]:
        """The rows, block by block of QUERIES positions. Waits for the device."""
        positions = self.position_B[: None if self.count_1 is None else int(self.count_1)].tolist()
        blocks: dict[int, list[int]] = {}
        for index, position in enumerate(positions):
            blocks.setdefault(position // QUERIES * QUERIES, []).append(index)
        lows = [position + 1 - self.pool.columns(position) for position in positions]
        return tuple(self._gather(begin, rows, [lows[row] for row in rows]) for begin, rows in blocks.items())

    def _gather(self, begin: int, rows: list[int], lows: list[int]) -> Gather:
        index_B, low_B = (torch.tensor(each, device=self.position_B.device) for each in (rows, lows))
        position_B1, sequence_B1 = self.position_B[index_B, None], self.sequence_B[index_B, None]
        first = begin + 1 - self.pool.columns(begin)
        position_1C = torch.arange(first, begin + QUERIES, device=index_B.device)[None]
        seen_BC = position_1C.maximum(low_B[:, None]).minimum(position_B1)
        row_BC = self.pool.row(sequence_B1, seen_BC)
        row_B = self.pool.row(sequence_B1, position_B1)[:, 0]
        return Gather(index_B, position_B1[:, 0] - begin, row_B, row_BC)


@dataclass(frozen=True)
class Spans:
    """The spans of a step, which may be known on the device alone; some of them may be empty then."""

    span_P4: torch.Tensor  # int32, (begin, end, cached, sequence)
    tokens: int  # of a step
    known: tuple[Span, ...] | None
    pool: PagedRows

    @cached_property
    def prefills(self) -> tuple[Prefill, ...]:
        """Each by itself. Waits for the device where they are known there alone."""
        spans = self.span_P4.tolist() if self.known is None else self.known
        return tuple(Prefill(begin, end, cached, of, self.pool) for begin, end, cached, of in spans if begin < end)

    def runs(self, tokens: int) -> int:
        """Runs of so many tokens in all spans; the most, where these aren't known."""
        if self.known is None:
            return self.tokens // tokens + len(self.span_P4)
        return sum(-(-(end - begin) // tokens) for begin, end, _, _ in self.known)


@dataclass(frozen=True)
class Plan:
    """Where the layers of one window read and write in one step."""

    window: int | None
    rows: Rows | None
    spans: Spans | None
    shared: dict[str, torch.Tensor] = field(default_factory=dict)  # between the layers and windows of one step

    @property
    def padded(self) -> bool:
        """Whether some tokens of the step may belong to no row and no span."""
        return self.spans is not None and self.spans.known is None
