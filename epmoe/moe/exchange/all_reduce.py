"""Exchange by all-reduce: one row a token on the wire, and sums that depend on the number of ranks.

Letters: T tokens · K experts per token · H hidden.
"""

import torch
import torch.distributed as dist

from epmoe.layers.norm import add_rows
from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Buffer
from epmoe.ranks.mesh import Ranks


class AllReduce:
    """y[t] = Σ over ranks of round(Σ over this rank's k of y[t, k]); a bf16 sum is rounded again at every hop.

    For networks and large batches, where K times the traffic of `Slots` costs more than its reproducibility is worth.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.group = ranks.expert_group

    @property
    def travels(self) -> bool:
        return self.group is not None

    def prepare(self, x_TH: torch.Tensor, top_k: int, *, overlap: bool) -> Buffer:
        """The sum over this rank's slots travels, so the rows may be anywhere."""
        return Buffer(overlap=overlap)

    def combine(self, y_TKH: torch.Tensor, buffer: Buffer) -> Owed:
        """[T, K, H] with zeros in slots of other ranks → [T, 1, H]; one rank leaves the sum to what follows."""
        if self.group is None or not y_TKH.numel():
            return Owed(y_TKH)
        sum_TH = add_rows(y_TKH)
        work = dist.all_reduce(sum_TH, group=self.group, async_op=buffer.overlap)
        return Owed(sum_TH[:, None], work)
