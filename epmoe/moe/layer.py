"""The mixture-of-experts sublayer: norm and router → tokens to the experts → experts → rows home.

Letters: T tokens · X tokens that this rank's experts look at · H hidden · E experts · K experts per token.
"""

import torch
from torch import nn

from epmoe.layers.norm import AddNorm
from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Counts, Exchange
from epmoe.moe.experts import Experts
from epmoe.moe.placement import Here
from epmoe.moe.router import Router
from epmoe.moe.router.routing import Routing
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

    def install(self, experts: Experts, router: Router, exchange: Exchange, here: Here) -> None:
        """Give the layer this rank's packed experts and the parts that connect them to the other ranks.

        `here` is `Placement.here` on the layer's device.
        """
        self.experts, self.exchange = experts, exchange
        self.routing = Routing(router, self.top_k, here)

    def distinct(self, tokens: int) -> set[int]:
        """Numbers of tokens, up to `tokens`, at which what is installed compiles anew."""
        assert self.experts is not None, "MoE.install was not called"
        return {*self.experts.distinct(tokens), *self.routing.router.distinct(tokens)}

    def forward(
        self, x_TH: torch.Tensor, owed: Owed, *, counts: Counts = None, overlap: bool = False
    ) -> tuple[torch.Tensor, Owed]:
        """The residual stream [T, H] and what is owed to it → the same after this sublayer, which owes K rows a token.

        A collective: every rank of the expert group calls it, with the same tokens or, where ranks have tokens of their
        own, with as many, or with each one's number in `counts`. With `overlap` what it owes may be asked for after
        another micro-batch's call.
        """
        x_TH, norm_TH, logits_TE = owed.add_to(x_TH, self.norm, self.router)
        return x_TH, self.routed(norm_TH, logits_TE, counts=counts, overlap=overlap)

    def routed(
        self, norm_TH: torch.Tensor, logits_TE: torch.Tensor, *, counts: Counts = None, overlap: bool = False
    ) -> Owed:
        """[T, H] and the router's logits → rows [T, J, H], a token's output being `add_rows` of its own."""
        assert self.experts is not None, "MoE.install was not called"
        sent = self.exchange.dispatch(norm_TH, logits_TE, self.routing, counts=counts, overlap=overlap)
        y_XKH = self.experts.forward(sent.x_XH, sent.dispatch, sent.rows_XKH)
        with named("combine"):
            return self.exchange.combine(y_XKH, sent)
