"""Combine: every rank's slot rows → each token's output, on every rank of the expert group.

Letters: T tokens · K experts per token · H hidden.
"""

from typing import Protocol

import torch

COMBINES = {
    "slots": "epmoe.combine.slots:Slots",
    "all_reduce": "epmoe.combine.all_reduce:AllReduce",
}


class Combine(Protocol):
    """Constructed once with the rank's `Ranks`; called once per MoE layer by every rank of the expert group."""

    def __call__(self, y_TKH: torch.Tensor) -> torch.Tensor:
        """Sum over K and over the ranks: [T, H] in y's dtype.

        `y_TKH` has zeros in the slots of other ranks, and may be overwritten.
        """
        ...
