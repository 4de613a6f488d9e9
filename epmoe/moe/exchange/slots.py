"""Exchange by slots: the same bits for any number of ranks and any placement of the experts.

A slot is one (token, k) pair and has exactly one owner, so summing a slot's row over the ranks is x + 0 + … + 0: exact,
in whatever order the network adds. Every rank then has all K rows of a token, to be added in the one order k = 0 … K-1
by `add_rows`.

GPUs of one node add the rows of small steps, decode steps above all, in symmetric memory (symmetric.py), into which the
experts have written them; everything else goes by the process group's all-reduce. No bit depends on which.

Letters: T tokens · K experts per token · H hidden.
"""

import torch
import torch.distributed as dist

from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Buffer
from epmoe.moe.exchange.symmetric import ROOM, connect
from epmoe.ranks.mesh import Ranks


class Slots:
    """y[t, k] = its owner's row. Carries K rows a token. Constructing it is a collective of the expert group.

    Args:
        room: bytes of symmetric memory; rows that need more go by the process group.
    """

    def __init__(self, ranks: Ranks, room: int = ROOM) -> None:
        self.group = ranks.expert_group
        self.symmetric = connect(ranks, room)

    @property
    def travels(self) -> bool:
        return self.group is not None

    def prepare(self, x_TH: torch.Tensor, top_k: int, *, overlap: bool) -> Buffer:
        """Zeros in symmetric memory, where this step's rows go by it: it has room for one micro-batch."""
        rows_TKH = self.symmetric.lend(x_TH, top_k) if self.symmetric and not overlap else None
        return Buffer(rows_TKH, None if rows_TKH is None else self.symmetric, overlap)

    def combine(self, y_TKH: torch.Tensor, buffer: Buffer) -> Owed:
        """[T, K, H] with zeros in other ranks' slots → the same tensor with all slots."""
        if self.group is None or not y_TKH.numel():
            return Owed(y_TKH)
        if self.symmetric and buffer.lender is self.symmetric:
            self.symmetric.add(y_TKH)
            return Owed(y_TKH, lender=self.symmetric)
        return Owed(y_TKH, dist.all_reduce(y_TKH, group=self.group, async_op=buffer.overlap))
