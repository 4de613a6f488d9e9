"""Attention over the paged cache: grouped queries, a learned sink a head, sliding windows, rotary positions with YaRN.

Letters: T tokens of a step · H hidden · B sequences · C positions attended to · Q queries of a block · E query heads ·
J key/value heads · G = E/J query heads a key/value head · D head dimension · F = D/2 frequencies · R rows of a cache.
"""

from dataclasses import dataclass

import torch
from torch import nn

from epmoe.cache.plan import Plan, Prefill
from epmoe.layers.linear import product_f32
from epmoe.layers.norm import AddNorm
from epmoe.layers.owed import Owed
from epmoe.layers.rotary import rotate
from epmoe.layers.twin import twin
from epmoe.trace import named

# Names of torch versions with which a DecodeStep waits for its positions, so that no graph can capture it.
WAITING = frozenset({"attention"})

# Queries of a block. A decode has one of them to itself, so few; at 131,072 positions the float32 scores of 64 heads
# are an eighth of a GiB.
QUERIES = 4

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q_TED, k_TJD, v_TJD: of a step's tokens
Pair = tuple[torch.Tensor, torch.Tensor]  # cos_TF and sin_TF; or keys and values of a layer's cache, [J, R, D] each


@dataclass(frozen=True)
class Where:
    """What a layer's attention needs of a step beside its tokens."""

    cos_sin: Pair  # float32 [T, F] each
    cached: Pair  # the layer's keys and values, written as `plan` says
    plan: Plan
    wanted_O: torch.Tensor | None = None  # the tokens that the layer goes on with; None: all


def attend(
    q_BMD: torch.Tensor, k_BCD: torch.Tensor, v_BCD: torch.Tensor, valid_BMC: torch.Tensor, sink_BM: torch.Tensor
) -> torch.Tensor:
    """softmax([q·kᵀ/√D, sink]) without its last column, times v: [B, M, D] in q's dtype.

    The sink is a logit that only joins the denominator, and is not scaled. B counts independent products, M the rows of
    one. `valid` broadcasts; every row needs a valid column. Products take q's dtype and sum in float32, the softmax is
    float32 throughout.
    """
    score_BMC = product_f32(q_BMD, k_BCD.mT).mul_(q_BMD.shape[-1] ** -0.5)
    score_BMC.masked_fill_(~valid_BMC, -torch.inf)
    sink_BM1 = sink_BM.float()[..., None]
    top_BM1 = torch.maximum(score_BMC.amax(-1, keepdim=True), sink_BM1)
    weight_BMC = score_BMC.sub_(top_BM1).exp_()
    total_BM1 = weight_BMC.sum(-1, keepdim=True) + (sink_BM1 - top_BM1).exp()
    return (product_f32(weight_BMC.to(v_BCD.dtype), v_BCD) / total_BM1).to(q_BMD.dtype)


def cached_attention(heads: Heads, cos_sin: Pair, cached: Pair, plan: Plan, sink_E: torch.Tensor) -> torch.Tensor:
    """Rotate queries and keys, attend to [cached | new] as `plan` says, and write keys and values into `cached`.

    For any device and dtype; epmoe/kernels/attention has the fast one.

    Args:
        heads: queries, keys and values of the step's tokens.
        cos_sin: float32 [T, F] each.
        cached: the layer's keys and values, [J, R, D] each.
        sink_E: a logit a query head.
    Returns:
        [T, E, D] in q's dtype.
    """
    q_TED, k_TJD, v_TJD = heads
    turned = rotate(q_TED, *cos_sin), rotate(k_TJD, *cos_sin), v_TJD
    out_TED = torch.empty_like(turned[0])
    for prefill in (*(plan.decode.prefills if plan.decode else ()), *plan.prefills):
        _prefill(turned, cached, prefill, plan, sink_E, out_TED)
    return out_TED


def _prefill(
    heads: Heads, cached: Pair, prefill: Prefill, plan: Plan, sink_E: torch.Tensor, out_TED: torch.Tensor
) -> None:
    """A sequence's tokens, in blocks of queries: attend to [cached | chunk], then write what the layer keeps of it.

    A block has the positions from one multiple of QUERIES to the next, and the keys that these can see, whichever of
    them the chunk brings: so the shapes of its products follow from the positions alone.
    """
    q_TED, *new = heads
    window, tokens, past = plan.window, slice(prefill.begin, prefill.end), len(prefill.past_C)
    total = prefill.cached + prefill.end - prefill.begin
    first, last = prefill.cached // QUERIES * QUERIES, -(-total // QUERIES) * QUERIES
    start = _seen_from(first, window)
    q_QED = q_TED.new_zeros(last - first, *q_TED.shape[1:])
    q_QED[prefill.cached - first : total - first] = q_TED[tokens]
    context: list[torch.Tensor] = []  # keys and values of the positions start : last; zeros where there are none yet
    for store_JRD, new_TJD in zip(cached, new, strict=True):
        kept_JCD = new_TJD.new_zeros(new_TJD.shape[1], last - start, new_TJD.shape[2])
        at = prefill.cached - start
        kept_JCD[:, at - past : at] = store_JRD.index_select(1, prefill.past_C)
        kept_JCD[:, at : total - start] = new_TJD[tokens].transpose(0, 1)
        context.append(kept_JCD)
    for begin in range(first, last, QUERIES):
        seen = slice(_seen_from(begin, window) - start, begin + QUERIES - start)
        block_QED = q_QED[begin - first : begin - first + QUERIES]
        out_QED = _block(block_QED, context[0][:, seen], context[1][:, seen], window, sink_E)
        low, high = max(begin, prefill.cached), min(begin + QUERIES, total)
        to = prefill.begin - prefill.cached
        out_TED[to + low : to + high] = out_QED[low - begin : high - begin]
    for store_JRD, new_TJD in zip(cached, new, strict=True):
        store_JRD.index_copy_(1, prefill.row_R, new_TJD[tokens][-len(prefill.row_R) :].transpose(0, 1))


def _seen_from(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _block(
    q_QED: torch.Tensor, k_JCD: torch.Tensor, v_JCD: torch.Tensor, window: int | None, sink_E: torch.Tensor
) -> torch.Tensor:
    """Q queries whose own positions are the last Q of the C columns: [Q, E, D]."""
    queries, (kv_heads, columns, _) = q_QED.shape[0], k_JCD.shape
    ago_QC = torch.arange(columns - queries, columns, device=q_QED.device)[:, None]
    ago_QC = ago_QC - torch.arange(columns, device=q_QED.device)
    valid_QC = ago_QC >= 0 if window is None else (ago_QC >= 0) & (ago_QC < window)
    group = q_QED.shape[1] // kv_heads
    q_JGQD = q_QED.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
    out = attend(
        q_JGQD.flatten(1, 2),
        k_JCD,
        v_JCD,
        valid_QC.repeat(group, 1)[None],
        sink_E.view(kv_heads, group).repeat_interleave(queries, dim=1),
    )
    return out.unflatten(1, (group, queries)).permute(2, 0, 1, 3).flatten(1, 2)


class Attention(nn.Module):
    """One layer's attention, with the norm before it. Queries share key/value heads: head j·G + g reads head j's."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.norm = AddNorm(hidden, eps)
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * head_dim, bias)  # all in one product
        self.o = nn.Linear(heads * head_dim, hidden, bias)
        self.sinks = nn.Parameter(torch.empty(heads))

    def forward(self, x_TH: torch.Tensor, owed: Owed, where: Where) -> tuple[torch.Tensor, Owed]:
        """The residual stream [T, H] and what is owed to it → the same after this sublayer, of the wanted tokens.

        Writes all new keys and values into the cache.
        """
        with named("attention"):
            x_TH, norm_TH = owed.add_to(x_TH, self.norm)
            attended_TH = self.attended(norm_TH, where)
        return x_TH if where.wanted_O is None else x_TH[where.wanted_O], Owed(attended_TH[:, None])

    def attended(self, norm_TH: torch.Tensor, where: Where) -> torch.Tensor:
        """[T, H] → [T, H], or [O, H] of the wanted tokens: projections, rotation, attention, projection."""
        heads_TXD = twin("linear", norm_TH).linear(norm_TH, self.qkv).unflatten(-1, (-1, self.head_dim))
        heads = heads_TXD.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        attention = twin("attention", norm_TH)
        out_TED = attention.cached_attention(heads, where.cos_sin, where.cached, where.plan, self.sinks)
        out_TX = out_TED.flatten(1)
        out_OX = out_TX if where.wanted_O is None else out_TX[where.wanted_O]
        out_OH: torch.Tensor = twin("linear", out_OX).linear(out_OX, self.o)
        return out_OH
