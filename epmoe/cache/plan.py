"""Where the layers of one window read and write the cache in one step, spelled out for attention.

Letters: T tokens of a step · B sequences · C positions attended to · R rows of a pool (a row is the place of one
position) · P prompts.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from epmoe.cache.rows import PagedRows, RingRows


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
        return self._rows(self.cached - self.pool.columns(self.cached) + 1, self.cached)

    @cached_property
    def row_R(self) -> torch.Tensor:
        """int64, rows of its last R tokens; a ring keeps no more than the window."""
        end = self.cached + self.end - self.begin
        return self._rows(max(self.cached, end - self.pool.columns(end - 1)), end)

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        device = self.pool.device
        position_1C = torch.arange(begin, end, device=device)[None]
        return self.pool.row(torch.full((1, 1), self.sequence, device=device), position_1C)[0]


@dataclass(frozen=True)
class Decode:
    """Rows of a DecodeStep, a token each. Its row is written, and then attended to like the cached ones."""

    token_B: torch.Tensor  # int64, the token's index in T
    position_B: torch.Tensor  # int64
    sequence_B: torch.Tensor  # int64
    pool: "PagedRows | RingRows"

    @cached_property
    def prefills(self) -> tuple[Prefill, ...]:
        """Each row as what it would be as a prompt's single token. Waits for the device."""
        rows = zip(self.position_B.tolist(), self.sequence_B.tolist(), strict=True)
        return tuple(Prefill(token, token + 1, *row, self.pool) for token, row in enumerate(rows))


@dataclass(frozen=True)
class Plan:
    """Where the layers of one window read and write in one step."""

    window: int | None
    decode: Decode | None
    prefills: tuple[Prefill, ...]
    span_P4: torch.Tensor | None  # int32, the prefills' (begin, end, cached, sequence) on the device
