"""Exchange: tokens travel to the experts, and rows come home, over the ranks of the expert group.

    sent = exchange.dispatch(norm_TH, logits_TE, routing)    before the experts: which tokens they look at, and where
                                                             they write their rows
    owed = exchange.combine(y_XKH, sent)                     after them: the rows that make up each token's output

With mesh.attention=replicate every rank has all tokens and nothing travels out. With `data` each rank has its own: in
small steps all ranks get all of them (gathered.py), in large ones an expert's rank alone does (all_to_all.py).

Experts may write straight into memory that the ranks share, so that nothing is copied on the way. What comes back is
not added up yet: the sum is one pass over memory together with the residual and the next norm (epmoe/layers/owed.py).
It may also still be on its way: a large prefill runs as two micro-batches, and the rows of one travel while the other
computes (epmoe/models/decoder.py).

Letters: T tokens · X tokens that this rank's experts look at · E experts · K experts per token · J rows a token that
are owed · H hidden.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from epmoe.errors import UserError
from epmoe.layers.owed import Lender, Owed
from epmoe.moe.router import Dispatch
from epmoe.moe.router.routing import Routing

EXCHANGES = {  # by the configuration's key `combine`
    "slots": "epmoe.moe.exchange.slots:Slots",
    "all_reduce": "epmoe.moe.exchange.all_reduce:AllReduce",
    "all_to_all": "epmoe.moe.exchange.all_to_all:AllToAll",
    "local": "epmoe.moe.exchange.local:Local",
}

Counts = tuple[int, ...] | None  # by expert rank, how many tokens each brings; None: as many as this one


def by_nodes(nodes: int) -> str:
    """What `combine=auto` stands for: K rows a token are little traffic within a node, and too much between nodes."""
    return "slots" if nodes == 1 else "all_reduce"


def automatic(nodes: int, attention: str) -> str:
    """The same, where attention over the ranks is so; with `data` no row goes where nobody wants it."""
    return "all_to_all" if attention == "data" else by_nodes(nodes)


def check(name: str, ranks: int, attention: str) -> None:
    """Raises UserError for what cannot bring rows to so many ranks, with attention so."""
    if name == "local" and ranks > 1:
        raise UserError(f"combine=local brings no rows from one of {ranks} ranks to another: take combine=slots")
    if name == "all_to_all" and attention != "data":
        raise UserError(
            f"combine=all_to_all brings tokens to the experts, and with mesh.attention={attention} every rank has them "
            "all: take combine=slots, or mesh.attention=data"
        )


@dataclass(frozen=True)
class Sent:
    """What `dispatch` hands to the experts, and to `combine`."""

    x_XH: torch.Tensor
    dispatch: Dispatch  # of these tokens: the slots that are this rank's
    rows_XKH: torch.Tensor | None = None  # zeros, for the experts' rows; None: they may be anywhere
    lender: Lender | None = None  # of that memory
    overlap: bool = False


class Exchange(Protocol):
    """Constructed once with the rank's `Ranks` and what mesh.attention is, by every rank of the expert group; every
    layer calls both methods, which are collectives.

    With `overlap` another micro-batch goes on before the rows are asked for: they have memory of their own and travel
    beside its work. Without, they must be added (`Owed.add_to`) before the next `dispatch`, which may lend the same
    memory.
    """

    @property
    def overlaps(self) -> bool:
        """Whether rows travel to other ranks, and may do so beside another micro-batch's work."""
        ...

    def dispatch(
        self,
        norm_TH: torch.Tensor,
        logits_TE: torch.Tensor,
        routing: Routing,
        *,
        counts: Counts = None,
        overlap: bool = False,
    ) -> Sent:
        """Let the experts see their tokens: all that this rank needs of its own and of the others'.

        With `counts` None no size depends on a value and the host does not wait, so that it fits a CUDA graph.
        """
        ...

    def combine(self, y_XKH: torch.Tensor, sent: Sent) -> Owed:
        """Rows [T, J, H] of this rank's own tokens, in y's dtype: `add_rows` of them sums over K and over the ranks.

        `y_XKH` has zeros in the slots of other ranks, and may be overwritten or come back. It is the rows of `sent`,
        with this rank's slots filled in, where that has some.
        """
        ...
