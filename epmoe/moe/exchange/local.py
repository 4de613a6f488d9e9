"""Exchange of one rank: nothing travels.

Letters: T tokens · E experts · K experts per token · H hidden.
"""

import torch

from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Counts, Sent
from epmoe.moe.router.routing import Routing
from epmoe.ranks.mesh import Ranks


class Local:
    """y[t, k] is there."""

    overlaps = False

    def __init__(self, ranks: Ranks, attention: str = "replicate") -> None:
        assert ranks.expert_size == 1

    def dispatch(
        self,
        norm_TH: torch.Tensor,
        logits_TE: torch.Tensor,
        routing: Routing,
        *,
        counts: Counts = None,
        overlap: bool = False,
    ) -> Sent:
        """The tokens themselves."""
        return Sent(norm_TH, routing.route(logits_TE))

    def combine(self, y_TKH: torch.Tensor, sent: Sent) -> Owed:
        """The rows themselves."""
        return Owed(y_TKH)
