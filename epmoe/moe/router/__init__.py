"""Router: logits → chosen experts and their weights → this rank's gather and scatter index.

Letters: T tokens · E experts · L experts on this rank · K experts per token · S = T·K slots (one (token, k) pair each,
numbered t·K + k) · R = S rows (a fixed size, so that no shape depends on the routing).
"""

from dataclasses import dataclass
from typing import Protocol

import torch

ROUTERS = {
    "reference": "epmoe.moe.router.reference:route",
    "triton": "epmoe.moe.router.triton.launch:route",
}


@dataclass(frozen=True)
class Dispatch:
    """What one rank must compute for T tokens. All tensors on the device; no size depends on the routing.

    Rows are the slots whose expert lives here, sorted by local expert and then by slot. Rows from `offset_L1[L]` on are
    unused.
    """

    expert_TK: torch.Tensor  # int32, global ids by falling logit, ties to the lower id; the same on every rank
    weight_TK: torch.Tensor  # float32, softmax over the K chosen logits
    offset_L1: torch.Tensor  # int32 [L+1], rows of local expert l are offset[l] : offset[l+1]
    slot_R: torch.Tensor  # int32 gather index: row → slot; unused rows hold S
    row_S: torch.Tensor  # int32 scatter index: slot → row; -1 where the slot's expert lives on another rank
    num_experts: int  # E over all ranks, so that a tile choice can follow T·K/E and never the local rows


class Route(Protocol):
    """`route(logits_TE, top_k, local_E, num_local) -> Dispatch`.

    `logits_TE` is in the model's dtype; `local_E` is int32 [E], the index of each expert on this rank or -1 (from
    `Placement.local_E`), ascending along the expert ids that live here; `num_local` is L. Never synchronises with the
    host.
    """

    def __call__(self, logits_TE: torch.Tensor, top_k: int, local_E: torch.Tensor, num_local: int) -> Dispatch: ...
