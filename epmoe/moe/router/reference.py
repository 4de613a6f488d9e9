"""The router in plain torch: the definition that every other one is compared with.

Letters: T tokens · E experts · L experts on this rank · K experts per token · S = T·K slots (numbered t·K + k) · R = S
rows.

An example: T = 2, K = 2, experts 2 and 3 live here as local 0 and 1 (L = 2).

    expert_TK  [[3, 0], [2, 3]]    slots 0..3 choose experts 3, 0, 2, 3
    offset_L1  [0, 1, 3]           local 0 has one row, local 1 two; three rows are used
    slot_R     [2, 0, 3, 4]        row 0 is slot 2, rows 1 and 2 are slots 0 and 3; row 3 is unused and holds S = 4
    row_S      [1, -1, 0, 2]       slot 1 lives on another rank
"""

from typing import ClassVar

import torch

from epmoe.moe.router import Dispatch
from epmoe.trace import named


class ReferenceRouter:
    """`route` as a backend, for any device."""

    waits: ClassVar[bool] = True  # nothing here reads a value on the host, but no graph has ever been captured with it

    @classmethod
    def serves(cls, device: torch.device) -> bool:
        return True

    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        return ()

    def route(self, logits_TE: torch.Tensor, top_k: int, local_E: torch.Tensor, num_local: int) -> Dispatch:
        return route(logits_TE, top_k, local_E, num_local)


def route(logits_TE: torch.Tensor, top_k: int, local_E: torch.Tensor, num_local: int) -> Dispatch:
    """The K largest logits of a token, their softmax, and the index of the slots whose expert lives on this rank.

    Equal logits go to the lower expert id, and -0 equals 0. A token with a logit that is not finite has NaN weights,
    which reach its logits, where they are told: a router that merely passed over a NaN or -inf would never choose that
    expert, and nobody would know. Such logits count as +inf, so that no id is ever out of range. No size depends on the
    values and nothing waits for the device.

    Args:
        logits_TE: floating point [T, E]; T may be 0.
        top_k: K, at most E.
        local_E: int32 [E], index of each expert on this rank or -1, as `Placement.local_E` gives it.
        num_local: L.
    """
    expert_TK, weight_TK = top_experts(logits_TE, top_k)
    with named("dispatch"):
        offset_L1, slot_R, row_S = index(local_E[expert_TK.flatten().long()], num_local)
    return Dispatch(expert_TK, weight_TK, offset_L1, slot_R, row_S, num_experts=logits_TE.shape[1])


def index(local_S: torch.Tensor, num_local: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Dispatch`'s offset_L1, slot_R and row_S, from the local expert of each slot (-1: another rank's)."""
    # Other ranks' slots get key L, so that a stable sort puts them last and keeps slots in order within an expert.
    key_S = torch.where(local_S < 0, num_local, local_S)
    sorted_R, slot_R = key_S.sort(stable=True)
    edge_L1 = torch.arange(num_local + 1, dtype=key_S.dtype, device=key_S.device)
    offset_L1 = torch.searchsorted(sorted_R, edge_L1, out_int32=True)

    slots = key_S.numel()
    rank_R = torch.arange(slots, device=key_S.device)
    used_R = sorted_R < num_local
    row_S = torch.empty_like(slot_R).scatter_(0, slot_R, torch.where(used_R, rank_R, -1))
    return offset_L1, torch.where(used_R, slot_R, slots).int(), row_S.int()


def top_experts(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids int32 [T, K] by falling logit, ties to the lower id; the softmax over those logits, float32 [T, K]."""
    assert 1 <= top_k <= logits_TE.shape[1], f"top_k={top_k} of {logits_TE.shape[1]} experts"
    number_TE = logits_TE.float()
    number_TE = number_TE.masked_fill(~number_TE.isfinite(), torch.inf)
    # torch.topk promises no order among equals; a stable sort does.
    sorted_TE, id_TE = number_TE.sort(dim=-1, descending=True, stable=True)
    return id_TE[:, :top_k].int(), sorted_TE[:, :top_k].softmax(dim=-1)
