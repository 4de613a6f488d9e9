"""Small steps of ranks that have tokens of their own: every rank's experts see all tokens, each rank gets its own rows.

    rank 0  t₀ t₁   ┐ all-gather         experts 0, 1    t₀: y·   t₁: ·y   u₀: y·   ┐ sum, each     t₀: yy  t₁: yy
    rank 1  u₀      ┘ both: t₀ t₁ u₀     experts 2, 3    t₀: ·y   t₁: y·   u₀: ·y   ┘ to its own    u₀: yy

A slot has one owner, and the other ranks add zeros, so the sums are exact. Nothing here waits for the host.

Letters: T tokens of this rank · A tokens of the rank that has most · N ranks · X all ranks' tokens · E experts · K
experts per token · J rows a token that travel · H hidden · C columns.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from epmoe.moe.exchange import Counts, Sent
from epmoe.moe.router.routing import Routing
from epmoe.ranks.mesh import Ranks, all_gather, reduce_scatter


@dataclass(frozen=True)
class Gathered(Sent):
    """All ranks' tokens, rank by rank, and how many each has."""

    counts: tuple[int, ...] = ()
    group: dist.ProcessGroup | None = None
    rank: int = 0


def gather(norm_TH: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, ranks: Ranks, counts: Counts) -> Gathered:
    """All ranks' tokens, and where this rank's experts stand in them. What fills up is nobody's, and not among them."""
    group = ranks.expert_group
    counts = counts or (len(norm_TH),) * ranks.expert_size
    assert group is not None and counts[ranks.expert_rank] == len(norm_TH)
    x_XH, logits_XE = (_gathered(each, counts, group) for each in (norm_TH, logits_TE))
    return Gathered(x_XH, routing.route(logits_XE), counts=counts, group=group, rank=ranks.expert_rank)


def scatter(y_XJH: torch.Tensor, sent: Gathered) -> torch.Tensor:
    """The sums over the ranks of the rows of this rank's tokens: [T, J, H]."""
    most, counts = max(sent.counts), sent.counts
    if not most or not y_XJH.shape[1:].numel():
        return y_XJH
    if set(counts) != {most}:
        padded_NAJH = y_XJH.new_zeros(len(counts), most, *y_XJH.shape[1:])
        for rank, rows in enumerate(y_XJH.split(counts)):
            padded_NAJH[rank, : len(rows)] = rows
        y_XJH = padded_NAJH.flatten(0, 1)
    own_AJH = y_XJH.new_empty(most, *y_XJH.shape[1:])
    reduce_scatter(own_AJH, y_XJH.contiguous(), group=sent.group)
    return own_AJH[: counts[sent.rank]]


def _gathered(own_TC: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's rows, one rank's after the other's: [X, C]."""
    most, (tokens, columns) = max(counts), own_TC.shape
    if not most:
        return own_TC
    own_AC = own_TC.contiguous()
    if tokens < most:
        own_AC = own_TC.new_zeros(most, columns)
        own_AC[:tokens] = own_TC
    all_NAC = own_TC.new_empty(len(counts) * most, columns)
    all_gather(all_NAC, own_AC, group=group)
    if set(counts) == {most}:
        return all_NAC
    return torch.cat([rows[:count] for rows, count in zip(all_NAC.split(most), counts, strict=True)])
