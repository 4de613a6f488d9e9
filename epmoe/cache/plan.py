"""Where the layers of one window read and write the cache in one step, spelled out for attention.

Letters: T tokens of a step · B sequences · C positions attended to · R rows of a pool (a row is the place of one
position) · P sequences that bring several tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from epmoe.cache.rows import PagedRows, RingRows


@dataclass(frozen=True)
class Limits:
    """How much the torch version of attention has in memory at once, however long prompts and chunks are."""

    # A decode step gathers the keys and values of several sequences at once, padded to the longest: at most this many
    # positions a gather. 8 key/value heads of 64 in bf16 make it 1 GiB of keys and as much of values.
    gather_positions: int = 2**20
    # A prefill's float32 scores are made in blocks of queries of at most this many elements (256 MiB; about three times
    # that is alive at once).
    score_elements: int = 2**26
    # With a window W a block of Q queries meets Q + W positions, of which each query uses W: a small block wastes
    # little.
    window_queries: int = 128


@dataclass(frozen=True)
class Gather:
    """Some of a Decode's rows, spelled out. The last of the C rows attended to is the token's own."""

    token_B: torch.Tensor  # int64, the token's index in T
    row_B: torch.Tensor  # int64, the row of the token
    row_BC: torch.Tensor  # int64, ascending positions; the columns of positions below 0 repeat position 0 ...
    valid_BC: torch.Tensor  # bool ... and are False here: no row of another sequence is ever read


@dataclass(frozen=True)
class Decode:
    """Sequences that bring one token each. Its row is written, and then attended to like the cached ones."""

    token_B: torch.Tensor  # int64, the token's index in T
    position_B: torch.Tensor  # int64
    sequence_B: torch.Tensor  # int64
    pool: "PagedRows | RingRows"
    positions: tuple[int, ...] | None  # position_B on the host, if it is known there
    limits: Limits = Limits()

    @cached_property
    def gathers(self) -> tuple[Gather, ...]:
        """The rows of neighbours together, up to a limit. Sizes come from the positions: may wait for them."""
        positions = self.position_B.tolist() if self.positions is None else self.positions
        columns_B = [self.pool.columns(position) for position in positions]
        return tuple(
            self._gather(slice(begin, end), max(columns_B[begin:end]))
            for begin, end in _groups(columns_B, self.limits.gather_positions)
        )

    def _gather(self, part: slice, columns: int) -> Gather:
        position_B1, sequence_B1 = self.position_B[part, None], self.sequence_B[part, None]
        position_BC = position_B1 + torch.arange(1 - columns, 1, device=position_B1.device)
        return Gather(
            self.token_B[part],
            self.pool.row(sequence_B1, position_B1).squeeze(1),
            self.pool.row(sequence_B1, position_BC.clamp(min=0)),
            position_BC >= 0,
        )


@dataclass(frozen=True)
class Prefill:
    """A sequence that brings several tokens: they attend to what is cached and to each other, and are written last."""

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
class Plan:
    """Where the layers of one window read and write in one step."""

    window: int | None
    decode: Decode | None
    prefills: tuple[Prefill, ...]
    span_P4: torch.Tensor | None  # int32, the prefills' (begin, end, cached, sequence) on the device
    limits: Limits = Limits()


def _groups(columns_B: list[int], most: int) -> list[tuple[int, int]]:
    """(begin, end) of neighbouring sequences whose gathers together have at most `most` positions."""
    groups: list[tuple[int, int]] = []
    begin, widest = 0, 0
    for index, columns in enumerate(columns_B):
        widest = max(widest, columns)
        if index > begin and (index + 1 - begin) * widest > most:
            groups.append((begin, index))
            begin, widest = index, columns
    return [*groups, (begin, len(columns_B))]
