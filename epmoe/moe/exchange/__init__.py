"""Exchange: every rank's slot rows → the rows that make up each token's output, on every rank of the expert group.

    buffer = exchange.prepare(x_TH, top_k)      before the experts: where they write their rows
    owed = exchange.combine(y_TKH, buffer)      after them: the rows travel

Experts may write straight into memory that the ranks share, so that nothing is copied on the way. What comes back is
not added up yet: the sum is one pass over memory together with the residual and the next norm (epmoe/layers/owed.py).
It may also still be on its way: a large prefill runs as two micro-batches, and the rows of one travel while the other
computes (epmoe/models/decoder.py).

Letters: T tokens · K experts per token · J rows a token that are owed · H hidden.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from epmoe.layers.owed import Lender, Owed

EXCHANGES = {  # by the configuration's key `combine`
    "slots": "epmoe.moe.exchange.slots:Slots",
    "all_reduce": "epmoe.moe.exchange.all_reduce:AllReduce",
}


def by_nodes(nodes: int) -> str:
    """What `combine=auto` stands for: K rows a token are little traffic within a node, and too much between nodes."""
    return "slots" if nodes == 1 else "all_reduce"


@dataclass(frozen=True)
class Buffer:
    """What `prepare` hands to `combine`."""

    rows_TKH: torch.Tensor | None = None  # zeros, for the experts' rows; None: they may be anywhere
    lender: Lender | None = None  # of that memory
    overlap: bool = False


class Exchange(Protocol):
    """Constructed once with the rank's `Ranks`, by every rank of the expert group; every layer calls both methods.

    With `overlap` another micro-batch goes on before the rows are asked for: they have memory of their own and travel
    beside its work. Without, they must be added (`Owed.add_to`) before the next `prepare`, which may lend the same
    memory.
    """

    @property
    def travels(self) -> bool:
        """Whether rows go to other ranks at all."""
        ...

    def prepare(self, x_TH: torch.Tensor, top_k: int, *, overlap: bool) -> Buffer:
        """Where the experts shall write this step's rows [T, K, H], in x's dtype."""
        ...

    def combine(self, y_TKH: torch.Tensor, buffer: Buffer) -> Owed:
        """Rows [T, J, H] in y's dtype, the same on every rank: `add_rows` of them sums over K and over the ranks.

        `y_TKH` has zeros in the slots of other ranks, and may be overwritten or come back. It is the buffer's rows,
        with this rank's slots filled in, where the buffer has some.
        """
        ...
