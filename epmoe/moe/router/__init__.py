"""Router: logits → chosen experts and their weights → this rank's gather and scatter index.

Letters: T tokens · E experts · L experts on this rank · K experts per token · S = T·K slots (one (token, k) pair each,
numbered t·K + k) · R = S rows (a fixed size, so that no shape depends on the routing).
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

ROUTERS = {  # by preference: `router=auto` is the first that serves the device
    "triton": "epmoe.moe.router.triton:TritonRouter",
    "reference": "epmoe.moe.router.reference:ReferenceRouter",
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


class Router(Protocol):
    """Made once for a model; its layers share it. What it says of itself is known without importing its kernels."""

    waits: ClassVar[bool]  # no CUDA graph can capture a step with it, since it waits for the device

    @classmethod
    def serves(cls, device: torch.device) -> bool:
        """Whether it is meant for such a device."""
        ...

    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        """Numbers of tokens, up to `tokens`, at which it compiles anew; () where it compiles nothing."""
        ...

    def route(self, logits_TE: torch.Tensor, top_k: int, local_E: torch.Tensor, num_local: int) -> Dispatch:
        """The K experts of each token, their weights, and the index of the slots whose expert lives on this rank.

        Never synchronises with the host.

        Args:
            logits_TE: [T, E] in the model's dtype; T may be 0.
            top_k: K, at most E.
            local_E: int32 [E], the index of each expert on this rank or -1 (`Placement.local_E`), ascending along the
                expert ids that live here.
            num_local: L.
        """
        ...
