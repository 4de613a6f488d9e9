"""What a sublayer owes the residual stream: rows that the norm of the next sublayer adds, in one pass over memory.

    x, owed = layer.attention(x, owed, where)          owes one row a token
    x, owed = layer.moe(x, owed)                       owes K rows a token, one of each chosen expert

Rows may still travel between ranks, by a collective or written by the ranks themselves into memory that layers share
(push.py). `Owed` alone waits for them, adds them in order, and leaves that memory as the next exchange must find it;
neither model nor engine nor exchange knows of it.

Letters: T tokens · J rows a token that are owed · H hidden · E outputs of a linear layer.
"""

from dataclasses import dataclass
from typing import overload

import torch
import torch.distributed as dist
from torch import nn

from epmoe.kernels.symmetric import Place
from epmoe.layers.norm import AddNorm
from epmoe.layers.twin import twin


@dataclass(frozen=True)
class Owed:
    """Rows [T, J, H] still to be added to the residual stream. Holding this keeps their memory from being reused."""

    rows_TJH: torch.Tensor | None = None  # None: nothing is owed
    work: dist.Work | None = None  # that brings them; None: they are here
    place: Place | None = None  # of these rows, where ranks write them until `add_to`; None: nobody does

    @overload
    def add_to(self, x_TH: torch.Tensor, norm: AddNorm) -> tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def add_to(
        self, x_TH: torch.Tensor, norm: AddNorm, linear: nn.Linear
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def add_to(self, x_TH: torch.Tensor, norm: AddNorm, linear: nn.Linear | None = None) -> tuple[torch.Tensor, ...]:
        """(x + these rows, `norm` of that[, `linear` of the norm]): [T, H] twice and [T, E], in x's dtype.

        What ranks have written is gone afterwards: the memory is theirs again.
        """
        if self.place is not None:
            assert linear is None, "no sublayer before a linear layer gets rows of peers"
            return norm(x_TH, self.rows_TJH, place=self.place)
        rows_TJH = self.wait()
        if linear is None:
            return norm(x_TH, rows_TJH)
        assert rows_TJH is not None, "no sublayer before a linear layer owes nothing"
        return norm.with_linear(x_TH, rows_TJH, linear)

    def wait(self) -> torch.Tensor | None:
        """The rows, as what comes next on the current stream sees them; only a CPU's host waits for them."""
        if self.work is not None:
            self.work.wait()
        if self.place is not None and self.rows_TJH is not None:
            twin("push", self.rows_TJH).arrive(self.rows_TJH, self.place)
        return self.rows_TJH

    @staticmethod
    def join(first_T11: torch.Tensor, first: "Owed", second: "Owed") -> "Owed":
        """The rows of two micro-batches as one's: `first`'s where `first_T11` (bool) is true; waits for both."""
        assert first.place is None and second.place is None, "micro-batches have memory of their own"
        mine_TJH, other_TJH = first.wait(), second.wait()
        assert mine_TJH is not None and other_TJH is not None
        return Owed(torch.where(first_T11, mine_TJH, other_TJH))
