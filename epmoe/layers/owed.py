"""What a sublayer owes the residual stream: rows that the norm of the next sublayer adds, in one pass over memory.

    x, owed = layer.attention(x, owed, where)          owes one row a token
    x, owed = layer.moe(x, owed)                       owes K rows a token, one of each chosen expert

Rows may still travel between ranks, and may lie in memory that all layers share. `Owed` alone waits for them, adds them
in order, clears that memory and gives it back; neither model nor engine nor exchange knows of it.

Letters: T tokens · J rows a token that are owed · H hidden · E outputs of a linear layer.
"""

from dataclasses import dataclass
from typing import Protocol, overload

import torch
import torch.distributed as dist
from torch import nn

from epmoe.layers.norm import AddNorm


class Lender(Protocol):
    """Who owns the memory that rows lie in, and lends it to one layer after the other: it must hold zeros each time."""

    def give_back(self) -> None:
        """The memory is free again: what comes next on the stream reads the rows and leaves zeros in their place."""
        ...


@dataclass(frozen=True)
class Owed:
    """Rows [T, J, H] still to be added to the residual stream. Holding this keeps their memory from being reused."""

    rows_TJH: torch.Tensor | None = None  # None: nothing is owed
    work: dist.Work | None = None  # that brings them; None: they are here
    lender: Lender | None = None  # of the memory they lie in; None: it is their own

    @overload
    def add_to(self, x_TH: torch.Tensor, norm: AddNorm) -> tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def add_to(
        self, x_TH: torch.Tensor, norm: AddNorm, linear: nn.Linear
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def add_to(self, x_TH: torch.Tensor, norm: AddNorm, linear: nn.Linear | None = None) -> tuple[torch.Tensor, ...]:
        """(x + these rows, `norm` of that[, `linear` of the norm]): [T, H] twice and [T, E], in x's dtype.

        Rows in borrowed memory are zeros afterwards, which saves the next layer a kernel; nobody may read them again.
        """
        rows_TJH = self.wait()
        if self.lender is not None:
            self.lender.give_back()
        if linear is None:
            return norm(x_TH, rows_TJH, clear=self.lender is not None)
        assert rows_TJH is not None and self.lender is None, "no sublayer before a linear layer borrows memory"
        return norm.with_linear(x_TH, rows_TJH, linear)

    def wait(self) -> torch.Tensor | None:
        """The rows, as what comes next on the current stream sees them; only a CPU's host waits for them."""
        if self.work is not None:
            self.work.wait()
        return self.rows_TJH

    @staticmethod
    def join(first_T11: torch.Tensor, first: "Owed", second: "Owed") -> "Owed":
        """The rows of two micro-batches as one's: `first`'s where `first_T11` (bool) is true; waits for both."""
        assert first.lender is None and second.lender is None, "micro-batches have memory of their own"
        mine_TJH, other_TJH = first.wait(), second.wait()
        assert mine_TJH is not None and other_TJH is not None
        return Owed(torch.where(first_T11, mine_TJH, other_TJH))
