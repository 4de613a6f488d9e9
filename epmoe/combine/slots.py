"""Combine by slots: the same bits for any number of ranks and any placement of the experts.

A slot is one (token, k) pair and has exactly one owner, so summing a slot's row over the ranks is x + 0 + … + 0: exact,
in whatever order the network adds. Every rank then adds a token's K rows in the one order k = 0 … K-1.

Letters: T tokens · K experts per token · H hidden.
"""

import torch
import torch.distributed as dist

from epmoe.ranks import Ranks


class Slots:
    """y[t] = round(((+0 + y[t, 0]) + y[t, 1]) + … + y[t, K-1]), in float32, rounded once. Carries K rows a token."""

    def __init__(self, ranks: Ranks) -> None:
        self.group = ranks.expert_group

    def __call__(self, y_TKH: torch.Tensor) -> torch.Tensor:
        """[T, K, H] with zeros in other ranks' slots → [T, H] in the same dtype; overwrites `y_TKH` with all slots."""
        if self.group is not None and y_TKH.numel():
            dist.all_reduce(y_TKH, group=self.group)
        return add_slots(y_TKH)


def add_slots(y_TKH: torch.Tensor) -> torch.Tensor:
    """[T, K, H] → [T, H]: a token's rows, added in float32 in the order of k.

    Starts from +0, so that a row of -0 gives +0, as it does after other ranks' zeros were added to it. `sum(1)` would
    leave the order to the library.
    """
    sum_TH = torch.zeros(y_TKH.shape[0], y_TKH.shape[2], dtype=torch.float32, device=y_TKH.device)
    for y_TH in y_TKH.unbind(1):
        sum_TH += y_TH
    return sum_TH.to(y_TKH.dtype)
