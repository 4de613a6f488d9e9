"""Large steps of ranks that have tokens of their own: a token goes to the ranks of its experts, once to each.

    rank 0   t₀ chose 0, 2   t₁ chose 1, 0           rank 0 has experts 0 and 1, rank 1 has 2 and 3
    out      to rank 0: t₀ t₁    to rank 1: t₀       each with its K ids and weights
    home     from rank 0: rows (t₀,0) (t₁,1) (t₁,0)  from rank 1: row (t₀,2)         slots by owner, then in order

The host must know how many travel from whom to whom, and waits for that: never in a CUDA graph. Steps whose sizes the
device alone knows, and small ones, go as `Slots` do. No bit depends on it: in either way a token's K rows come home, to
be added in the order k = 0 … K-1.

Letters: T tokens of this rank · N ranks · M tokens that leave, each as often as ranks want it · X tokens that this
rank's experts look at · E experts · K experts per token · S slots of this rank's tokens · H hidden · C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Counts, Sent
from epmoe.moe.exchange.slots import Slots
from epmoe.moe.router.routing import Routing
from epmoe.ranks.mesh import Ranks


@dataclass(frozen=True)
class Limits:
    """Sizes at which a step takes another way."""

    # A step of so many tokens, those of the rank that has most, waits for its sizes. An estimate, not measured: the
    # host's wait in each layer is some 50 µs, and all tokens of 8 ranks with all their slots' rows take as long from
    # about 256 tokens on.
    parted_from: int = 256


@dataclass(frozen=True)
class Parted(Sent):
    """Other ranks' tokens and this one's own, rank by rank; how the rows find home."""

    home_S: torch.Tensor | None = None  # int64, this rank's slots in the order in which their rows come
    takes: tuple[int, ...] = ()  # rows that this rank computes for each
    gets: tuple[int, ...] = ()  # rows that each computes for this one


class AllToAll(Slots):
    """y[t, k] = its owner's row; large steps carry the wanted rows alone, in both directions."""

    def __init__(self, ranks: Ranks, attention: str = "data", *, limits: Limits | None = None) -> None:
        assert attention == "data"
        super().__init__(ranks, attention)
        self.limits = limits or Limits()

    def dispatch(
        self,
        norm_TH: torch.Tensor,
        logits_TE: torch.Tensor,
        routing: Routing,
        *,
        counts: Counts = None,
        overlap: bool = False,
    ) -> Sent:
        """The tokens that this rank's experts are to see; all ranks', where the step is small."""
        if self.group is None or counts is None or max(counts) < max(1, self.limits.parted_from):
            return super().dispatch(norm_TH, logits_TE, routing, counts=counts, overlap=overlap)
        chosen = routing.route(logits_TE)
        expert_TK, weight_TK, size = chosen.expert_TK, chosen.weight_TK, self.ranks.expert_size
        owner_TK = routing.here.owner_E[expert_TK.long()]
        rank_N = torch.arange(size, device=norm_TH.device)
        slot_TKN = owner_TK[..., None] == rank_N
        wants_NT = slot_TKN.any(1).T
        out_N2 = torch.stack([wants_NT.sum(1), slot_TKN.sum((0, 1))], dim=1)
        in_N2 = torch.empty_like(out_N2)
        dist.all_to_all_single(in_N2, out_N2, group=self.group)
        (leave, gets), (come, takes) = (each.T.tolist() for each in torch.stack([out_N2, in_N2]))

        token_M = wants_NT.nonzero()[:, 1]
        x_XH = self._travel(norm_TH[token_M], come, leave)
        about_TC = torch.cat([expert_TK, weight_TK.view(torch.int32)], dim=1)  # of one type, to travel together
        expert_XK, weight_XK = self._travel(about_TC[token_M], come, leave).split(routing.top_k, dim=1)
        dispatch = routing.routed(expert_XK.contiguous(), weight_XK.contiguous().view(torch.float32))
        home_S = owner_TK.flatten().argsort(stable=True)
        return Parted(x_XH, dispatch, home_S=home_S, takes=tuple(takes), gets=tuple(gets))

    def combine(self, y_XKH: torch.Tensor, sent: Sent) -> Owed:
        """[X, K, H], of which this rank's slots travel → [T, K, H] of its own tokens."""
        if not isinstance(sent, Parted):
            return super().combine(y_XKH, sent)
        assert sent.home_S is not None
        top_k, hidden = y_XKH.shape[1:]
        mine_SH = y_XKH.flatten(0, 1)[(sent.dispatch.row_S >= 0).nonzero()[:, 0]]
        y_SH = y_XKH.new_empty(len(sent.home_S), hidden)
        y_SH[sent.home_S] = self._travel(mine_SH, sent.gets, sent.takes)
        return Owed(y_SH.view(-1, top_k, hidden))

    def _travel(self, out_RC: torch.Tensor, come: Sequence[int], leave: Sequence[int]) -> torch.Tensor:
        """So many of the rows to each rank, in its order; what comes, so many from each."""
        in_RC = out_RC.new_empty(sum(come), out_RC.shape[1])
        dist.all_to_all_single(in_RC, out_RC, list(come), list(leave), group=self.group)
        return in_RC
