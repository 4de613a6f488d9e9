"""The mixture-of-experts layer: route → dispatch → experts → combine.

Letters: T tokens · H hidden · E experts · K experts per token · J rows a token that are still to be added · L experts
on this rank.
"""

import torch
from torch import nn

from epmoe.moe.exchange import Combine, Pending
from epmoe.moe.experts import Experts
from epmoe.moe.router import Route
from epmoe.trace import named


class MoE(nn.Module):
    """out[t] = Σ_k weight[t, k] · expert[t, k](x[t]), whose experts may live on any rank.

    The router's parameters are ordinary parameters. What depends on ranks and backends is installed from outside by the
    loader, so that a model file never mentions either.
    """

    def __init__(self, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, num_experts)
        self.top_k = top_k
        self.experts: Experts | None = None

    def install(self, experts: Experts, route: Route, combine: Combine, local_E: torch.Tensor, num_local: int) -> None:
        """Give the layer this rank's packed experts and the parts that connect them to the other ranks.

        `local_E` is `Placement.local_E` on the layer's device.
        """
        self.experts, self.route, self.combine = experts, route, combine
        self.local_E, self.num_local = local_E, num_local

    def forward(self, x_TH: torch.Tensor, logits_TE: torch.Tensor, *, overlap: bool = False) -> Pending:
        """[T, H] and `router` of it → [T, J, H], a token's output being `add_rows` of it (epmoe/layers/norm.py).

        A collective: every rank of the expert group calls it with the same tokens. With `overlap` the rows may be asked
        for after another micro-batch's call.
        """
        assert self.experts is not None, "MoE.install was not called"
        # Before the router, whose kernel lets the experts' first one come in early (epmoe/kernels/gpu.py).
        place_TKH = self.combine.rows(x_TH, self.top_k, overlap=overlap)
        with named("route"):
            dispatch = self.route(logits_TE, self.top_k, self.local_E, self.num_local)
        y_TKH = self.experts.forward(x_TH, dispatch, place_TKH)
        with named("combine"):
            return self.combine(y_TKH, overlap=overlap)
