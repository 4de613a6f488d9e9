"""Routing: a layer's router, with what it knows of where the experts live.

Letters: T tokens · X tokens that this rank's experts look at · E experts · L experts on this rank · K experts per
token.
"""

from dataclasses import dataclass

import torch

from epmoe.moe.placement import Here
from epmoe.moe.router import Dispatch, Router
from epmoe.moe.router.reference import index
from epmoe.trace import named


@dataclass(frozen=True)
class Routing:
    """Chooses each token's experts, and finds the slots of those that live here."""

    router: Router
    top_k: int
    here: Here

    def route(self, logits_TE: torch.Tensor) -> Dispatch:
        """As `Router.route`, for this rank."""
        with named("route"):
            return self.router.route(logits_TE, self.top_k, self.here.local_E, self.here.count)

    def routed(self, expert_XK: torch.Tensor, weight_XK: torch.Tensor) -> Dispatch:
        """The same of tokens whose experts were chosen elsewhere: int32 and float32 [X, K]."""
        local_E = self.here.local_E
        with named("dispatch"):
            offset_L1, slot_R, row_S = index(local_E[expert_XK.flatten().long()], self.here.count)
        return Dispatch(expert_XK, weight_XK, offset_L1, slot_R, row_S, num_experts=len(local_E))
