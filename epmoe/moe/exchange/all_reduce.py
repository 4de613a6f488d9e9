"""Exchange by sums: one row a token on the wire, and sums that depend on the number of ranks.

Letters: T tokens · X tokens that this rank's experts look at · E experts · K experts per token · H hidden.
"""

import torch
import torch.distributed as dist

from epmoe.layers.norm import add_rows
from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Counts, Sent
from epmoe.moe.exchange.gathered import Gathered, gather, scatter
from epmoe.moe.router.routing import Routing
from epmoe.ranks.mesh import Ranks


class AllReduce:
    """y[t] = Σ over ranks of round(Σ over this rank's k of y[t, k]); a bf16 sum is rounded again at every hop.

    For networks and large batches, where K times the traffic of `Slots` costs more than its reproducibility is worth.
    """

    def __init__(self, ranks: Ranks, attention: str = "replicate") -> None:
        self.ranks, self.group, self.data = ranks, ranks.expert_group, attention == "data"

    @property
    def overlaps(self) -> bool:
        return self.group is not None and not self.data

    def dispatch(
        self,
        norm_TH: torch.Tensor,
        logits_TE: torch.Tensor,
        routing: Routing,
        *,
        counts: Counts = None,
        overlap: bool = False,
    ) -> Sent:
        """The sum over this rank's slots travels, so the rows may be anywhere."""
        if self.data and self.group is not None:
            return gather(norm_TH, logits_TE, routing, self.ranks, counts)
        return Sent(norm_TH, routing.route(logits_TE), overlap=overlap)

    def combine(self, y_XKH: torch.Tensor, sent: Sent) -> Owed:
        """[X, K, H] with zeros in slots of other ranks → [T, 1, H]; one rank leaves the sum to what follows."""
        if isinstance(sent, Gathered):
            return Owed(scatter(add_rows(y_XKH)[:, None], sent))
        if self.group is None or not y_XKH.numel():
            return Owed(y_XKH)
        sum_TH = add_rows(y_XKH)
        work = dist.all_reduce(sum_TH, group=self.group, async_op=sent.overlap)
        return Owed(sum_TH[:, None], work)
