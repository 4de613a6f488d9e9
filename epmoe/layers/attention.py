"""Attention over the paged cache: grouped queries, a learned sink a head, sliding windows, rotary positions with YaRN.

Letters: T tokens of a step · H hidden · B sequences · C positions attended to · Q queries of a block · E query heads ·
J key/value heads · G = E/J query heads a key/value head · D head dimension · F = D/2 frequencies · R rows of a cache.
"""

from collections.abc import Callable

import torch
from torch import nn

from epmoe.cache.plan import Gather, Plan, Prefill
from epmoe.layers.linear import linear, product_f32
from epmoe.layers.rotary import rotate

# True: the torch implementation on every device, for comparison. It is slow on a GPU, and a DecodeStep then waits for
# its positions, so that it cannot be captured in a graph.
REFERENCE_ONLY = False

# A prefill's float32 scores are made in blocks of queries of at most this many elements (256 MiB; about three times
# that is alive at once), however long the prompt and the chunk are.
SCORE_ELEMENTS = 2**26
# With a window W a block of Q queries meets Q + W positions, of which each query uses W: a small block wastes little.
WINDOW_QUERIES = 128


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
    q_TED: torch.Tensor,
    k_TJD: torch.Tensor,
    v_TJD: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    cached: tuple[torch.Tensor, torch.Tensor],
    plan: Plan,
    sink_E: torch.Tensor,
) -> torch.Tensor:
    """Rotate queries and keys, attend to [cached | new] as `plan` says, and write keys and values into `cached`.

    The reference, for any device and dtype; attention_triton.py has the fast one.

    Args:
        cos_sin: float32 [T, F] each.
        cached: the layer's keys and values, [J, R, D] each.
        sink_E: a logit a query head.
    Returns:
        [T, E, D] in q's dtype.
    """
    q_TED, k_TJD = rotate(q_TED, *cos_sin), rotate(k_TJD, *cos_sin)
    out_TED = torch.empty_like(q_TED)
    for gather in plan.decode.gathers if plan.decode else ():
        _decode(q_TED, k_TJD, v_TJD, cached, gather, sink_E, out_TED)
    for prefill in plan.prefills:
        _prefill(q_TED, k_TJD, v_TJD, cached, prefill, plan.window, sink_E, out_TED)
    return out_TED


def _decode(
    q_TED: torch.Tensor,
    k_TJD: torch.Tensor,
    v_TJD: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
    gather: Gather,
    sink_E: torch.Tensor,
    out_TED: torch.Tensor,
) -> None:
    """All sequences of `gather` at once: write each one's token, gather what it sees, attend."""
    (sequences, columns), (_, kv_heads, head_dim) = gather.row_BC.shape, k_TJD.shape
    gathered: list[torch.Tensor] = []
    for store_JRD, new_TJD in zip(cached, (k_TJD, v_TJD), strict=True):
        store_JRD.index_copy_(1, gather.row_B, new_TJD[gather.token_B].transpose(0, 1))
        picked_JBCD = store_JRD.index_select(1, gather.row_BC.flatten())
        gathered.append(picked_JBCD.view(kv_heads * sequences, columns, head_dim))
    q_BJGD = q_TED[gather.token_B].unflatten(1, (kv_heads, -1))
    sink_JBG = sink_E.view(kv_heads, 1, -1).expand(-1, sequences, -1)
    out = attend(
        q_BJGD.transpose(0, 1).flatten(0, 1),
        gathered[0],
        gathered[1],
        gather.valid_BC.repeat(kv_heads, 1)[:, None],
        sink_JBG.flatten(0, 1),
    )
    out_BJGD = out.unflatten(0, (kv_heads, sequences)).transpose(0, 1)
    out_TED.index_copy_(0, gather.token_B, out_BJGD.flatten(1, 2))


def _prefill(
    q_TED: torch.Tensor,
    k_TJD: torch.Tensor,
    v_TJD: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
    prefill: Prefill,
    window: int | None,
    sink_E: torch.Tensor,
    out_TED: torch.Tensor,
) -> None:
    """One sequence, in blocks of queries: attend to [cached | chunk], then write what the layer keeps of it."""
    tokens = slice(prefill.begin, prefill.end)
    k_JCD, v_JCD = (
        torch.cat((store_JRD.index_select(1, prefill.past_C), new_TJD[tokens].transpose(0, 1)), dim=1)
        for store_JRD, new_TJD in zip(cached, (k_TJD, v_TJD), strict=True)
    )
    new, total = prefill.end - prefill.begin, k_JCD.shape[1]
    block = max(1, SCORE_ELEMENTS // (q_TED.shape[1] * total))
    if window is not None:
        block = min(block, max(window, WINDOW_QUERIES))
    for first in range(0, new, block):
        last = min(first + block, new)
        end = total - new + last  # columns 0 : end are the positions up to the block's last query
        begin = 0 if window is None else max(0, total - new + first - window + 1)
        rows = slice(prefill.begin + first, prefill.begin + last)
        out_TED[rows] = _block(q_TED[rows], k_JCD[:, begin:end], v_JCD[:, begin:end], window, sink_E)
    for store_JRD, context_JCD in zip(cached, (k_JCD, v_JCD), strict=True):
        store_JRD.index_copy_(1, prefill.row_R, context_JCD[:, total - len(prefill.row_R) :])


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


def implementation(device: torch.device) -> Callable[..., torch.Tensor]:
    """The cached_attention that runs on a device."""
    if device.type != "cuda" or REFERENCE_ONLY:
        return cached_attention
    from epmoe.kernels.attention import launch as attention_triton  # only here: a CPU machine need not have triton

    return attention_triton.cached_attention


class Attention(nn.Module):
    """One layer's attention. Queries share key/value heads: head j·G + g reads key/value head j."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * head_dim, bias)  # all in one product
        self.o = nn.Linear(heads * head_dim, hidden, bias)
        self.sinks = nn.Parameter(torch.empty(heads))

    def forward(
        self,
        x_TH: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cached: tuple[torch.Tensor, torch.Tensor],
        plan: Plan,
        wanted_O: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, H] → [T, H], or [O, H]: of the tokens `wanted_O` only.

        Writes all new keys and values into `cached`, the layer's [J, R, D] pair, as `plan` says.
        """
        heads_TXD = linear(x_TH, self.qkv).unflatten(-1, (-1, self.head_dim))
        q_TED, k_TJD, v_TJD = heads_TXD.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        attended = implementation(x_TH.device)
        out_TED = attended(q_TED, k_TJD, v_TJD, cos_sin, cached, plan, self.sinks)
        out_TX = out_TED.flatten(1)
        return linear(out_TX if wanted_O is None else out_TX[wanted_O], self.o)
