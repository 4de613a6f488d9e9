"""Attention over the mesh by heads: each rank has some query heads and the key/value heads that they read.

    2 ranks      key/value head   0       1       2       3
                 query heads      0 1 2   3 4 5   6 7 8   9 10 11
                 rank             0 ───────────   1 ─────────────

    8 ranks      key/value head   0               1 …              a head may be on several ranks, each with some of its
                 query heads      0 1     2 3     4 5 …            queries
                 rank             0       1       2 …

What the heads give is put side by side before the output projection, so that each of its sums stays whole, and the bits
are those of one rank.

Letters: T tokens · E query heads · J key/value heads · N ranks that share them · D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from epmoe.errors import UserError


class Part(NamedTuple):
    """A run of all heads, or of rows: first, last + 1, and how many there are."""

    begin: int
    end: int
    of: int

    @property
    def size(self) -> int:
        return self.end - self.begin

    def rows(self, each: int = 1) -> "Part | None":
        """Of a matrix with so many rows a head; None: all."""
        return None if self.size == self.of else Part(*(each * number for number in self))


@dataclass(frozen=True)
class HeadPart:
    """A rank's query heads and key/value heads."""

    query: Part
    kv: Part

    @property
    def among(self) -> Part | None:
        """Which query heads of its key/value head these are; None: whole groups."""
        group = self.query.of // self.kv.of
        first = self.query.begin % group
        return None if self.query.size >= group else Part(first, first + self.query.size, group)

    @classmethod
    def of(cls, heads: int, kv_heads: int, rank: int = 0, ranks: int = 1) -> "HeadPart":
        """Rank's share of E query heads and J key/value heads, where as many ranks can have shares of one size.

        >>> HeadPart.of(12, 4, 1, 2).kv, HeadPart.of(12, 3, 1, 6).kv
        (Part(begin=2, end=4, of=4), Part(begin=0, end=1, of=3))

        Raises:
            UserError: they cannot.
        """
        if not can_share(heads, kv_heads, ranks):
            able = [count for count in range(1, heads + 1) if can_share(heads, kv_heads, count)]
            raise UserError(
                f"mesh.attention=tensor: {ranks} ranks cannot share {heads} query and {kv_heads} key/value heads "
                f"evenly; {', '.join(map(str, able))} can: start as many, or take mesh.attention=replicate"
            )
        query, kv = heads // ranks, max(1, kv_heads // ranks)
        first = rank * kv_heads // ranks
        return cls(Part(rank * query, (rank + 1) * query, heads), Part(first, first + kv, kv_heads))


@dataclass(frozen=True)
class Share:
    """What a rank has of each layer's heads, and what puts all ranks' results side by side: [T, X] → [T, N · X]."""

    heads: HeadPart
    join: Callable[[torch.Tensor], torch.Tensor]


def can_share(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether each of so many ranks can have as many query heads, and all the key/value heads that these read.

    >>> [ranks for ranks in range(1, 65) if can_share(64, 8, ranks)]
    [1, 2, 4, 8, 16, 32, 64]
    """
    whole = kv_heads % ranks == 0 or ranks % kv_heads == 0
    return whole and heads % ranks == 0
