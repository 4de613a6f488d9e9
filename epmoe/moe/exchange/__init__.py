"""Combine: every rank's slot rows → the rows that make up each token's output, on every rank of the expert group.

A combine may say where the experts write their rows, so that nothing is copied on the way to the other ranks. What
comes back is not added up yet: the sum is one pass over memory together with the residual and the next block's norm
(epmoe/layers/norm.py). It may also still be on its way: a large prefill runs as two micro-batches, and the rows of one
travel while the other computes (epmoe/models/gpt_oss.py).

Letters: T tokens · K experts per token · J rows a token that are still to be added · H hidden.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

COMBINES = {
    "slots": "epmoe.moe.exchange.slots:Slots",
    "all_reduce": "epmoe.moe.exchange.all_reduce:AllReduce",
}


class Reused(Protocol):
    """Memory of a combine's own that the experts write their rows into; it must hold zeros before they do."""

    def zeros_again(self) -> None:
        """Take for granted that what comes next on the stream leaves zeros where the rows were."""
        ...


@dataclass(frozen=True)
class Pending:
    """Rows that may still be on their way. Holding this keeps their memory from being used again."""

    rows_TJH: torch.Tensor
    work: dist.Work | None = None  # None: they are here
    memory: Reused | None = None  # that the rows are in; None: their own

    def wait(self) -> torch.Tensor:
        """The rows [T, J, H], as what comes next on the current stream sees them; only a CPU's host waits for them."""
        if self.work is not None:
            self.work.wait()
        return self.rows_TJH

    def take(self) -> tuple[torch.Tensor, bool]:
        """The rows, as `wait` gives them, and whether who reads them must leave zeros in their place.

        That saves the next layer a kernel; nobody else may read them afterwards.
        """
        if self.memory is not None:
            self.memory.zeros_again()
        return self.wait(), self.memory is not None


class Combine(Protocol):
    """Constructed once with the rank's `Ranks`, by every rank of the expert group; then a `rows` and a call each layer.

    With `overlap` another micro-batch goes on before the rows are asked for: they have memory of their own and travel
    beside its work. Without, they must be consumed before the next `rows`, which may be the same memory; and who got
    them by `Pending.take` must have left the zeros that it asked for.
    """

    def rows(self, x_TH: torch.Tensor, top_k: int, *, overlap: bool) -> torch.Tensor | None:
        """Where the experts shall write this step's rows: zeros [T, K, H] in x's dtype; None: wherever they like."""
        ...

    def __call__(self, y_TKH: torch.Tensor, *, overlap: bool) -> Pending:
        """[T, J, H] in y's dtype, the same on every rank: `add_rows` of it is the sum over K and over the ranks.

        `y_TKH` has zeros in the slots of other ranks, and may be overwritten or come back. It is what `rows` gave, with
        this rank's slots filled in, unless that was None.
        """
        ...
