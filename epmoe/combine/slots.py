"""Combine by slots: the same bits for any number of ranks and any placement of the experts.

A slot is one (token, k) pair and has exactly one owner, so summing a slot's row over the ranks is x + 0 + … + 0: exact,
in whatever order the network adds. Every rank then has all K rows of a token, to be added in the one order k = 0 … K-1
by `add_rows`.

Letters: T tokens · K experts per token · H hidden.
"""

import torch
import torch.distributed as dist

from epmoe.ranks import Ranks


class Slots:
    """y[t, k] = its owner's row. Carries K rows a token."""

    def __init__(self, ranks: Ranks) -> None:
        self.group = ranks.expert_group

    def __call__(self, y_TKH: torch.Tensor) -> torch.Tensor:
        """[T, K, H] with zeros in other ranks' slots → the same tensor with all slots."""
        if self.group is not None and y_TKH.numel():
            dist.all_reduce(y_TKH, group=self.group)
        return y_TKH
