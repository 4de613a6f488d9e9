"""Where the layers of one window read and write the cache in one step, spelled out for attention.

Letters: T tokens of a step · B sequences · C positions attended to · R rows of a pool (a row is the place of one
position) · P prompts.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from epmoe.cache.rows import PagedRows, RingRows


@dataclass(frozen=True)
class Gather:
    """One of a Decode's rows, spelled out."""

    token: int  # its index in T
    row_1: torch.Tensor  # int64, the row of the token
    row_C: torch.Tensor  # int64, rows of what it attends to, ascending positions; the last is its own


@dataclass(frozen=True)
class Decode:
    """Rows of a DecodeStep, a token each. Its row is written, and then attended to like the cached ones."""

    token_B: torch.Tensor  # int64, the token's index in T
    position_B: torch.Tensor  # int64
    sequence_B: torch.Tensor  # int64
    pool: "PagedRows | RingRows"

    @cached_property
    def gathers(self) -> tuple[Gather, ...]:
        """Each row by itself: a product's shape follows from the sequence alone. Waits for the positions."""
        return tuple(
            self._gather(index, position, sequence)
            for index, (position, sequence) in enumerate(
                zip(self.position_B.tolist(), self.sequence_B.tolist(), strict=True)
            )
        )

    def _gather(self, index: int, position: int, sequence: int) -> Gather:
        row_C = _rows(self.pool, sequence, position + 1 - self.pool.columns(position), position + 1)
        return Gather(index, row_C[-1:], row_C)


@dataclass(frozen=True)
class Prefill:
    """A prompt's tokens: they attend to what is cached and to each other, and are written last."""

    begin: int  # its tokens are begin : end of T
    end: int
    cached: int
    sequence: int
    pool: "PagedRows | RingRows"

    @cached_property
    def past_C(self) -> torch.Tensor:
        """int64, rows of the cached positions that its first token attends to, ascending."""
        return _rows(self.pool, self.sequence, self.cached - self.pool.columns(self.cached) + 1, self.cached)

    @cached_property
    def row_R(self) -> torch.Tensor:
        """int64, rows of its last R tokens; a ring keeps no more than the window."""
        end = self.cached + self.end - self.begin
        return _rows(self.pool, self.sequence, max(self.cached, end - self.pool.columns(end - 1)), end)


@dataclass(frozen=True)
class Plan:
    """Where the layers of one window read and write in one step."""

    window: int | None
    decode: Decode | None
    prefills: tuple[Prefill, ...]
    span_P4: torch.Tensor | None  # int32, the prefills' (begin, end, cached, sequence) on the device


def _rows(pool: "PagedRows | RingRows", sequence: int, begin: int, end: int) -> torch.Tensor:
    """int64, the rows of a sequence's positions begin : end."""
    position_1C = torch.arange(begin, end, device=pool.device)[None]
    return pool.row(torch.full((1, 1), sequence, device=pool.device), position_1C)[0]
