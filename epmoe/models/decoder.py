"""The decoder: a stack of pre-norm layers, each attention and a mixture of experts. The step pass, in three lines:

    x, owed = embedding(ids), nothing
    for layer in layers:   x, owed = layer.attention(x, owed, where);   x, owed = layer.moe(x, owed)
    logits = vocabulary(norm(x + owed))

A sublayer owns the norm in front of it, and leaves its own sum to the next one (epmoe/layers/owed.py). A family is a
config and the names of its tensors (gpt_oss.py); it has no forward of its own.

Letters: T tokens of a step · O of them whose logits are wanted · H hidden · V vocabulary.
"""

import sys
from collections.abc import Set
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from epmoe import kernels
from epmoe.batch import Step
from epmoe.cache.cache import Cache
from epmoe.cache.plan import Plan
from epmoe.layers.attention import Attention, Where
from epmoe.layers.heads import HeadPart, Share
from epmoe.layers.norm import AddNorm, add_rows
from epmoe.layers.owed import Owed
from epmoe.layers.rotary import Rope, Rotary
from epmoe.layers.twin import twin
from epmoe.moe.experts import GatedActivation
from epmoe.moe.layer import MoE
from epmoe.rehearsal import is_brief


@dataclass(frozen=True)
class DecoderConfig:
    """The architecture, every number of it from a checkpoint's config.json."""

    layers: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # one a layer; None = full attention
    rms_eps: float
    rope: Rope
    activation: GatedActivation
    attention_bias: bool
    tied: bool  # the vocabulary projection is the embedding
    max_positions: int


@dataclass(frozen=True)
class Limits:
    """Sizes at which the step takes another way."""

    # A step of so many tokens runs as two micro-batches, so that the rows of one travel between the ranks while the
    # other computes. The products with the experts lose by it: where 8 of 32 are here, 8192 tokens take 812 µs at once
    # and 2 · 443 in halves. The all-reduce of those tokens' rows takes 640 µs on 2 GPUs. For half as many tokens the
    # loss is about the same and the gain half; for fewer there is little to win. The limit is an estimate by these
    # figures. One rank would only lose, 2 · 1579 µs for 3043 where it has all 32 experts: its steps go whole.
    halves_from: int = 4096
    # Ids that a library's product computes at a time, and of which ranks share whole chunks (layers/vocabulary.py):
    # small enough that they share evenly, large enough to be read at full speed (94 MB).
    vocab_chunk: int = 16384


class Layer(nn.Module):
    """Two sublayers, each with the norm in front of it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        heads = config.heads, config.kv_heads, config.head_dim
        self.attention = Attention(config.hidden, *heads, bias=config.attention_bias, eps=config.rms_eps)
        self.moe = MoE(config.hidden, config.num_experts, config.top_k, eps=config.rms_eps)


@dataclass(eq=False)
class MicroBatch:
    """A step, or one of its halves, on its way through the layers."""

    tokens: int
    x_TH: torch.Tensor
    owed: Owed
    plans: dict[int | None, Plan]
    cos_sin: tuple[torch.Tensor, torch.Tensor]
    wanted_O: torch.Tensor | None  # tokens whose logits are wanted; None: all

    def where(self, window: int | None, cached: tuple[torch.Tensor, torch.Tensor], *, last: bool) -> Where:
        """For the attention of one layer. The last one goes on with those tokens alone whose logits are wanted."""
        return Where(self.cos_sin, cached, self.plans[window], self.wanted_O if last else None)


class Decoder(nn.Module):
    """The whole model. It knows neither ranks nor collectives nor backends; what its layers need of those is installed
    by the loader.

    Args:
        limits: see `Limits`; tests take smaller ones.
    """

    def __init__(self, config: DecoderConfig, limits: Limits | None = None) -> None:
        super().__init__()
        self.config, self.limits = config, limits or Limits()
        self.heads = HeadPart.of(config.heads, config.kv_heads)
        # The weight is given because the module would draw one, and torch's normal_ on the meta device imports all of
        # torch._dynamo: 1.5 s of every start.
        weight_VH = torch.empty(config.vocab, config.hidden)
        self.embedding = nn.Embedding(config.vocab, config.hidden, _weight=weight_VH)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = AddNorm(config.hidden, config.rms_eps)
        self.feature_layers: tuple[int, ...] = ()  # the residual stream in front of these is what a draft model reads
        self.feature_TX: torch.Tensor | None = None  # of the last step's tokens, side by side
        if not config.tied:
            self.unembedding = nn.Linear(config.hidden, config.vocab, bias=False)
        self.rotary = Rotary(config.rope)

    def share_heads(self, share: Share) -> None:
        """Have these heads alone in each layer, while its parameters are on meta. Calls are collectives then."""
        self.heads = share.heads
        for layer in cast(list[Layer], list(self.layers)):
            layer.attention.share(share)

    @property
    def own_kv_heads(self) -> int:
        """Key/value heads of a layer on this rank, whose keys and values the cache holds."""
        return self.heads.kv.size

    def forward(self, step: Step, cache: Cache) -> torch.Tensor:
        """Logits of the tokens that the step wants, [O, V] float32: `hidden` and `logits` in one."""
        return self.logits(self.hidden(step, cache), None)

    def hidden(self, step: Step, cache: Cache) -> torch.Tensor:
        """The last norm of the tokens whose logits are wanted, [O, H]; the step's keys and values are in `cache` then.

        On a GPU nothing waits and no size depends on a value, where the step's don't, so it can be captured.

        A large step of several ranks goes through each layer as two halves. While the ranks exchange the rows of the
        first, they compute the second, and the first's next layer while they exchange the second's:

            compute    A₀  B₀  A₁  B₁  A₂ …      A, B: the halves; 0, 1, 2 …: the layers
            wire           A₀  B₀  A₁  B₁ …

        The last layer makes keys and values of all tokens, and goes on with those whose logits are wanted.

        A collective through its layers: every rank of the expert group calls it, with the same step, and gets the
        same bits; where ranks have requests of their own, with its own step, of the same sizes or with `Step.beside`.
        """
        halves = [self._embed(half, cache) for half in step.halves(self.halves_from)]
        layers = cast(list[Layer], list(self.layers))
        features, sizes = self._new_features(halves), [half.tokens for half in halves]
        for index in self._of_each_kind() if is_brief() else range(len(layers)):
            layer = layers[index]
            window, cached, last = self.config.windows[index], cache.layer(index), index == self.config.layers - 1
            for half in halves:
                feature_TH = features[index].split(sizes)[halves.index(half)] if index in features else None
                if feature_TH is not None and last:  # of which attention keeps the wanted tokens alone
                    rows_TKH = half.owed.wait()
                    feature_TH.copy_(half.x_TH if rows_TKH is None else half.x_TH + add_rows(rows_TKH))
                half.x_TH, half.owed = layer.attention(half.x_TH, half.owed, half.where(window, cached, last=last))
                if feature_TH is not None and not last:
                    feature_TH.copy_(half.x_TH)
                counts = step.beside and (step.beside.outputs if last else step.beside.tokens)
                half.x_TH, half.owed = layer.moe(half.x_TH, half.owed, counts=counts, overlap=len(halves) > 1)
        x_OH, owed = _join(halves, step)
        norm_OH: torch.Tensor = owed.add_to(x_OH, self.norm)[1]
        return norm_OH

    def _new_features(self, halves: list[MicroBatch]) -> dict[int, torch.Tensor]:
        """Memory for what a draft model reads: by layer [T, H], a column of `feature_TX` each."""
        self.feature_TX = None
        if not self.feature_layers:
            return {}
        tokens, hidden = sum(half.tokens for half in halves), self.config.hidden
        self.feature_TX = halves[0].x_TH.new_empty(tokens, len(self.feature_layers) * hidden)
        return dict(zip(self.feature_layers, self.feature_TX.split(hidden, dim=1), strict=True))

    def _of_each_kind(self) -> list[int]:
        """A layer for each set of kernels that a layer launches."""
        last = self.config.layers - 1
        kinds = {(window, index == 0, index == last): index for index, window in enumerate(self.config.windows)}
        return sorted(kinds.values())

    def logits(self, norm_OH: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
        """[O, V] float32, or a part of V, which begins at a multiple of `vocab_chunk`."""
        weight_VH = self.embedding.weight if self.config.tied else self.unembedding.weight
        whole = (0, len(weight_VH))
        logits_OV: torch.Tensor = twin("vocabulary", norm_OH).part_logits(
            norm_OH, weight_VH, part or whole, self.limits.vocab_chunk
        )
        return logits_OV

    def _embed(self, step: Step, cache: Cache) -> MicroBatch:
        plans, cos_sin = cache.plan(step), self.rotary(step.position_T)
        return MicroBatch(len(step.token_T), self.embedding(step.token_T), Owed(), plans, cos_sin, step.output_O)

    @property
    def halves_from(self) -> int:
        """Tokens from which on a step goes through the layers as two halves; one rank has nothing to wait for."""
        return self.limits.halves_from if any(layer.exchange.overlaps for layer in self.moe_layers()) else sys.maxsize

    def distinct(self, tokens: int, prompts: int) -> set[tuple[int, int]]:
        """Kinds of prefill that compile anew: tokens together, and tokens of one prompt at most.

        Of up to `tokens` tokens, and of up to `prompts` prompts with several tokens.
        """
        backends = (layer.distinct(tokens) for layer in self.moe_layers())
        return prefill_kinds(tokens, prompts, self.halves_from, set().union(*backends))

    @property
    def vocab_chunk(self) -> int:
        """Parts of the vocabulary that are asked for begin at multiples of this."""
        return self.limits.vocab_chunk

    def sublayers(self) -> list[tuple[str, nn.Module]]:
        """Its parts, as a message calls them, in the order in which numbers pass through them."""
        found: list[tuple[str, nn.Module]] = [("the embedding", self.embedding)]
        for index, layer in enumerate(cast(list[Layer], list(self.layers))):
            found += [(f"layer {index}'s attention", layer.attention), (f"layer {index}'s experts", layer.moe)]
        return [*found, ("the last norm", self.norm)]

    def moe_layers(self) -> list[MoE]:
        """The MoE layers, in layer order."""
        return [layer.moe for layer in cast(list[Layer], list(self.layers))]


def prefill_kinds(
    tokens: int, prompts: int, halves_from: int, backends: Set[int] = frozenset()
) -> set[tuple[int, int]]:
    """`Decoder.distinct` of a model that halves steps from so many tokens on; `backends` are its backends' sizes."""
    sizes = kernels.distinct(tokens) | backends
    # From there on kernels see a step's halves. Whole, the largest that 16 divides, and the largest.
    if tokens >= halves_from:
        sizes |= {halves_from - less for less in (1, 16)}
    return {(size, size) for size in sizes} | {(2 * count, 2) for count in kernels.powers(prompts)}


def _join(halves: list[MicroBatch], step: Step) -> tuple[torch.Tensor, Owed]:
    """Of the wanted tokens: the residual stream and what is owed to it."""
    first = halves[0]
    if len(halves) == 1:
        return first.x_TH, first.owed
    assert step.output_O is not None
    # Each half has a row for every wanted token, which means something in the token's own.
    own_O1 = (step.output_O < first.tokens)[:, None]
    return torch.where(own_O1, first.x_TH, halves[1].x_TH), Owed.join(own_O1[..., None], first.owed, halves[1].owed)
