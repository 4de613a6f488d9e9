"""The mixture-of-experts sublayer: norm and router → gather and scatter index → experts → exchange.

Letters: T tokens · H hidden · E experts · K experts per token · L experts on this rank.
"""

import torch
from torch import nn

from epmoe.layers.norm import AddNorm
from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Exchange
from epmoe.moe.experts import Experts
from epmoe.moe.router import Router
from epmoe.trace import named


class MoE(nn.Module):
    """x[t] += Σ_k weight[t, k] · expert[t, k](norm(x)[t]), whose experts may live on any rank.

    Norm and router are ordinary parameters. What depends on ranks and backends is installed from outside by the loader,
    so that a model file never mentions either.
    """

    def __init__(self, hidden: int, num_experts: int, top_k: int, *, eps: float) -> None:
        super().__init__()
        self.norm = AddNorm(hidden, eps)
        self.router = nn.Linear(hidden, num_experts)
        self.top_k = top_k
        self.experts: Experts | None = None

    def install(
        self, experts: Experts, routing: Router, exchange: Exchange, local_E: torch.Tensor, num_local: int
    ) -> None:
        """Give the layer this rank's packed experts and the parts that connect them to the other ranks.

        `local_E` is `Placement.local_E` on the layer's device.
        """
        self.experts, self.routing, self.exchange = experts, routing, exchange
        self.local_E, self.num_local = local_E, num_local

    def distinct(self, tokens: int) -> set[int]:
        """Numbers of tokens, up to `tokens`, at which what is installed compiles anew."""
        assert self.experts is not None, "MoE.install was not called"
        return {*self.experts.distinct(tokens), *self.routing.distinct(tokens)}

    def forward(self, x_TH: torch.Tensor, owed: Owed, *, overlap: bool = False) -> tuple[torch.Tensor, Owed]:
        """The residual stream [T, H] and what is owed to it → the same after this sublayer, which owes K rows a token.

        A collective: every rank of the expert group calls it with the same tokens. With `overlap` what it owes may be
        asked for after another micro-batch's call.
        """
        x_TH, norm_TH, logits_TE = owed.add_to(x_TH, self.norm, self.router)
        return x_TH, self.routed(norm_TH, logits_TE, overlap=overlap)

    def routed(self, norm_TH: torch.Tensor, logits_TE: torch.Tensor, *, overlap: bool = False) -> Owed:
        """[T, H] and the router's logits → rows [T, J, H], a token's output being `add_rows` of its own."""
        assert self.experts is not None, "MoE.install was not called"
        # Before the router, whose kernel lets the experts' first one come in early (epmoe/kernels/gpu.py).
        buffer = self.exchange.prepare(norm_TH, self.top_k, overlap=overlap)
        with named("route"):
            dispatch = self.routing.route(logits_TE, self.top_k, self.local_E, self.num_local)
        y_TKH = self.experts.forward(norm_TH, dispatch, buffer.rows_TKH)
        with named("combine"):
            return self.exchange.combine(y_TKH, buffer)
