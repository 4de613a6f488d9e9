"""Attention over the paged cache: grouped queries, a learned sink a head, sliding windows, rotary positions with YaRN.

Letters: T tokens of a step · H hidden · B sequences · C positions attended to · Q queries of a block · E query heads ·
J key/value heads · G = E/J query heads a key/value head · D head dimension · F = D/2 frequencies · R rows of a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from epmoe.cache.plan import QUERIES, Gather, Plan, Prefill
from epmoe.layers.heads import HeadPart, Share
from epmoe.layers.linear import Runs, product_f32
from epmoe.layers.norm import AddNorm
from epmoe.layers.owed import Owed
from epmoe.layers.rotary import rotate
from epmoe.layers.twin import twin
from epmoe.trace import named

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


def cached_attention(
    heads: Heads,
    cos_sin: Pair,
    cached: Pair,
    plan: Plan,
    sink_E: torch.Tensor,
    among: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, attend to [cached | new] as `plan` says, and write keys and values into `cached`.

    For any device and dtype; epmoe/kernels/attention has the fast one.

    Args:
        heads: queries, keys and values of the step's tokens.
        cos_sin: float32 [T, F] each.
        cached: the layer's keys and values, [J, R, D] each.
        sink_E: a logit a query head.
        among: where the queries are not all of their key/value head's, but some: first, last + 1, and how many there
            are. A library's products follow from how many rows they have, so here the others stand beside them.
    Returns:
        [T, E, D] in q's dtype.
    """
    if among is not None:
        begin, end, group = among
        beside = begin, group - end
        padded = nn.functional.pad(heads[0], (0, 0, *beside)), *heads[1:]
        out_TED = cached_attention(padded, cos_sin, cached, plan, nn.functional.pad(sink_E, beside))
        return out_TED[:, begin:end]
    q_TED, k_TJD, v_TJD = heads
    turned = rotate(q_TED, *cos_sin), rotate(k_TJD, *cos_sin), v_TJD
    out_TED = torch.zeros_like(turned[0])  # for tokens that belong to nothing
    gathers = plan.rows.gathers if plan.rows else ()
    for gather in gathers:  # all before one attends: a draft's rows see those before them
        for store_JRD, new_TJD in zip(cached, turned[1:], strict=True):
            store_JRD.index_copy_(1, gather.row_B, new_TJD[gather.token_B].transpose(0, 1))
    for gather in gathers:
        _decode(turned, cached, gather, plan.window, sink_E, out_TED)
    for prefill in plan.spans.prefills if plan.spans else ():
        _prefill(turned, cached, prefill, plan.window, sink_E, out_TED)
    return out_TED


def _decode(
    heads: Heads, cached: Pair, gather: Gather, window: int | None, sink_E: torch.Tensor, out_TED: torch.Tensor
) -> None:
    """Sequences whose tokens lie in one block: gather what each one sees, attend as a prefill would.

    The products have a prefill's shapes, of how many sequences ever: a token has the bits of a prompt's.
    """
    q_TED, (count, columns), kv_heads = heads[0], gather.row_BC.shape, len(cached[0])
    seen: list[torch.Tensor] = []
    for store_JRD in cached:
        seen_JXD = store_JRD.index_select(1, gather.row_BC.flatten())
        seen.append(seen_JXD.unflatten(1, (count, columns)).transpose(0, 1).flatten(0, 1))
    q_BQED = q_TED.new_zeros(count, QUERIES, *q_TED.shape[1:])
    each_B = torch.arange(count, device=q_TED.device)
    q_BQED[each_B, gather.offset_B] = q_TED[gather.token_B]
    q_BJMD = _blocks(q_BQED.flatten(0, 1), kv_heads)
    sink_JM = sink_E.view(kv_heads, -1).repeat_interleave(QUERIES, dim=1)
    seen_1MC = _seen(columns, window, q_TED.device).repeat(q_BJMD.shape[2] // QUERIES, 1)[None]
    out_XMD = attend(q_BJMD.flatten(0, 1), seen[0], seen[1], seen_1MC, sink_JM.repeat(count, 1))
    out_BQED = _queries(out_XMD.unflatten(0, (count, kv_heads)))
    out_TED[gather.token_B] = out_BQED[each_B, gather.offset_B]


def _prefill(
    heads: Heads, cached: Pair, prefill: Prefill, window: int | None, sink_E: torch.Tensor, out_TED: torch.Tensor
) -> None:
    """A sequence's tokens, in blocks of queries: attend to [cached | chunk], then write the chunk.

    A block has the positions from one multiple of QUERIES to the next, and the keys that these can see, whichever of
    them the chunk brings: so the shapes of its products follow from the positions alone.
    """
    q_TED, *new = heads
    tokens, cached_count = slice(prefill.begin, prefill.end), prefill.cached
    total, past = cached_count + prefill.end - prefill.begin, len(prefill.past_C)
    first, last = cached_count // QUERIES * QUERIES, -(-total // QUERIES) * QUERIES
    start = _seen_from(first, window)
    around = 0, 0, cached_count - past - start, last - total  # zeros where positions are not known
    k_JCD, v_JCD = (
        nn.functional.pad(
            torch.cat((store_JRD.index_select(1, prefill.past_C), each[tokens].transpose(0, 1)), 1), around
        )
        for store_JRD, each in zip(cached, new, strict=True)
    )
    q_NJMD = _blocks(nn.functional.pad(q_TED[tokens], (0, 0, 0, 0, cached_count - first, last - total)), len(k_JCD))
    sink_JM = sink_E.view(len(k_JCD), -1).repeat_interleave(QUERIES, dim=1)
    seen_MC = _seen(k_JCD.shape[1], window, q_TED.device).repeat(sink_JM.shape[1] // QUERIES, 1)
    outs_JMD = []
    for begin, q_JMD in zip(range(first, last, QUERIES), q_NJMD, strict=True):
        columns = slice(_seen_from(begin, window) - start, begin + QUERIES - start)
        seen_1MC = seen_MC[
            None, :, columns.start - columns.stop :
        ]  # of the last columns, as far back as there are some
        outs_JMD.append(attend(q_JMD, k_JCD[:, columns], v_JCD[:, columns], seen_1MC, sink_JM))
    out_QED = _queries(torch.stack(outs_JMD)).flatten(0, 1)
    out_TED[tokens] = out_QED[cached_count - first : total - first]
    for store_JRD, each in zip(cached, new, strict=True):
        store_JRD.index_copy_(1, prefill.row_R, each[tokens].transpose(0, 1))


def _blocks(q_QED: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[N, J, M, D] of N blocks: a row is a query head of a group's, and a query of the block."""
    return q_QED.unflatten(0, (-1, QUERIES)).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _queries(out_NJMD: torch.Tensor) -> torch.Tensor:
    """[N, QUERIES, E, D]: the inverse of `_blocks`."""
    return out_NJMD.unflatten(2, (-1, QUERIES)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _seen(columns: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [QUERIES, C]: which positions a block's queries see; their own are the last ones."""
    ago_QC = torch.arange(columns - QUERIES, columns, device=device)[:, None] - torch.arange(columns, device=device)
    return ago_QC >= 0 if window is None else (ago_QC >= 0) & (ago_QC < window)


def _seen_from(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


class Attention(nn.Module):
    """One layer's attention, with the norm before it. Queries share key/value heads: head j·G + g reads head j's.

    Of all heads, or, once it has a `share`, of this rank's: then its call is a collective of the ranks that share.
    """

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool, eps: float) -> None:
        super().__init__()
        self.hidden, self.head_dim = hidden, head_dim
        self.norm = AddNorm(hidden, eps)
        self.o = nn.Linear(heads * head_dim, hidden, bias)
        self._take(HeadPart.of(heads, kv_heads), bias)
        self.join: Callable[[torch.Tensor], torch.Tensor] | None = None  # with other ranks' heads

    def share(self, share: Share) -> None:
        """Have these heads alone, for which weights are still to come."""
        self._take(share.heads, self.qkv.bias is not None)
        self.join = share.join

    def _take(self, heads: HeadPart, bias: bool) -> None:
        self.heads, self.kv_heads, self.among = heads.query.size, heads.kv.size, heads.among
        self.qkv = Runs(self.hidden, self.heads + 2 * self.kv_heads, self.head_dim, bias)  # all in one product
        self.sinks = nn.Parameter(torch.empty(self.heads))

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
        out_TED = attention.cached_attention(heads, where.cos_sin, where.cached, where.plan, self.sinks, self.among)
        out_TX = out_TED.flatten(1)
        out_OX = out_TX if where.wanted_O is None else out_TX[where.wanted_O]
        if self.join is not None:
            out_OX = self.join(out_OX)
        out_OH: torch.Tensor = twin("linear", out_OX).linear(out_OX, self.o)
        return out_OH
