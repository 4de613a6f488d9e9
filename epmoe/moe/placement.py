"""Placement: which expert lives on which rank.

Letters: E experts · L experts on this rank · N ranks of the expert group.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from epmoe.errors import UserError

PLACEMENTS = {"contiguous": "epmoe.moe.placement:contiguous"}


@dataclass(frozen=True)
class Here:
    """Where the experts live, as a rank's device knows it."""

    local_E: torch.Tensor  # int32, see `Placement.local_E`
    owner_E: torch.Tensor  # int64, the expert rank that each lives on
    count: int  # L


@dataclass(frozen=True)
class Placement:
    """`experts[r]` are the ids of the experts on expert rank r, ascending; every id has exactly one owner."""

    num_experts: int
    experts: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        owners = Counter(expert for mine in self.experts for expert in mine)
        for expert in {*owners, *range(self.num_experts)}:
            assert owners[expert] == (expert < self.num_experts), f"expert {expert} has {owners[expert]} owners"
        assert all(list(mine) == sorted(mine) for mine in self.experts), "a rank's expert ids must ascend"

    def local_E(self, rank: int, device: torch.device) -> torch.Tensor:
        """int32 [E]: each expert's index on `rank`, or -1 where it lives elsewhere."""
        local_E = torch.full((self.num_experts,), -1, dtype=torch.int32)
        mine = self.experts[rank]
        local_E[list(mine)] = torch.arange(len(mine), dtype=torch.int32)
        return local_E.to(device)

    def owner_E(self, device: torch.device) -> torch.Tensor:
        """int64 [E]: the rank that each expert lives on."""
        owner_E = torch.empty(self.num_experts, dtype=torch.int64)
        for rank, mine in enumerate(self.experts):
            owner_E[list(mine)] = rank
        return owner_E.to(device)

    def here(self, rank: int, device: torch.device) -> Here:
        """What `rank` has to know."""
        return Here(self.local_E(rank, device), self.owner_E(device), len(self.experts[rank]))


def contiguous(num_experts: int, ranks: int) -> Placement:
    """Ranks hold ⌈E/N⌉ or ⌊E/N⌋ neighbouring experts, the larger shares first; E = 5, N = 2 gives (0, 1, 2), (3, 4).

    Raises:
        UserError: more ranks than experts.
    """
    if ranks > num_experts:
        raise UserError(f"{ranks} expert ranks cannot share {num_experts} experts: start at most {num_experts} ranks")
    share, rest = divmod(num_experts, ranks)
    sizes = [share + (rank < rest) for rank in range(ranks)]
    starts = [sum(sizes[:rank]) for rank in range(ranks)]
    return Placement(num_experts, tuple(tuple(range(a, a + n)) for a, n in zip(starts, sizes, strict=True)))
