"""Exchange by slots: the same bits for any number of ranks and any placement of the experts.

A slot is one (token, k) pair and has exactly one owner, so summing a slot's row over the ranks is x + 0 + … + 0: exact,
in whatever order the network adds. Every rank then has all K rows of a token, to be added in the one order k = 0 … K-1
by `add_rows`.

GPUs of one node add the rows of small steps, decode steps above all, in symmetric memory (symmetric.py), into which the
experts have written them; everything else goes by the process group's all-reduce. No bit depends on which. Where each
rank has its own tokens, all ranks' experts see all tokens, and each rank gets the rows of its own (gathered.py).

Letters: T tokens · X tokens that this rank's experts look at · E experts · K experts per token · H hidden.
"""

import torch
import torch.distributed as dist

from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Counts, Sent
from epmoe.moe.exchange.gathered import Gathered, gather, scatter
from epmoe.moe.exchange.symmetric import ROOM, connect
from epmoe.moe.router.routing import Routing
from epmoe.ranks.mesh import Ranks


class Slots:
    """y[t, k] = its owner's row. Carries K rows a token. Constructing it is a collective of the expert group.

    Args:
        room: bytes of symmetric memory; rows that need more go by the process group.
    """

    def __init__(self, ranks: Ranks, attention: str = "replicate", *, room: int = ROOM) -> None:
        self.ranks, self.group, self.data = ranks, ranks.expert_group, attention == "data"
        self.symmetric = None if self.data else connect(ranks, room)

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
        """The tokens themselves, or all ranks'.

        Rows go to zeros in symmetric memory, where this step's travel by it: it has room for one micro-batch.
        """
        if self.data and self.group is not None:
            return gather(norm_TH, logits_TE, routing, self.ranks, counts)
        # Before the router, whose kernel lets the experts' first one come in early (epmoe/kernels/gpu.py).
        rows_TKH = self.symmetric.lend(norm_TH, routing.top_k) if self.symmetric and not overlap else None
        lender = None if rows_TKH is None else self.symmetric
        return Sent(norm_TH, routing.route(logits_TE), rows_TKH, lender, overlap)

    def combine(self, y_XKH: torch.Tensor, sent: Sent) -> Owed:
        """[X, K, H] with zeros in other ranks' slots → [T, K, H] with all slots, in place where all have all tokens."""
        if isinstance(sent, Gathered):
            return Owed(scatter(y_XKH, sent))
        if self.group is None or not y_XKH.numel():
            return Owed(y_XKH)
        if self.symmetric and sent.lender is self.symmetric:
            self.symmetric.add(y_XKH)
            return Owed(y_XKH, lender=self.symmetric)
        return Owed(y_XKH, dist.all_reduce(y_XKH, group=self.group, async_op=sent.overlap))
