"""gpt-oss: pre-norm blocks of attention with sinks and a mixture of experts (openai/gpt-oss-20b and -120b).

Letters: T tokens of a step · O of them whose logits are wanted · H hidden · J rows a token that are still to be added
to the residual stream (epmoe/layers/norm.py) · V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from epmoe.batch import DecodeStep, Step
from epmoe.cache.cache import Cache
from epmoe.cache.plan import Plan
from epmoe.layers.attention import Attention
from epmoe.layers.norm import AddNorm
from epmoe.layers.rotary import Rope, Rotary
from epmoe.layers.vocabulary import part_logits
from epmoe.models import Place
from epmoe.models.keys import Keys, read_rope
from epmoe.moe.exchange import Pending
from epmoe.moe.experts import GatedActivation
from epmoe.moe.layer import MoE
from epmoe.trace import named

# Ids that a library's product computes at a time, and of which ranks share whole chunks (epmoe/layers/vocabulary.py):
# small enough that they share evenly, large enough to be read at full speed (94 MB).
VOCAB_CHUNK = 16384


@dataclass(frozen=True)
class GptOssConfig:
    """The architecture, every number of it from config.json."""

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

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json.

        Raises:
            UserError: a key is missing, of the wrong type or contradicts another; the message names it.
        """
        keys = Keys(config, "config.json")
        heads, kv_heads, head_dim = (
            keys.positive(name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        )
        if heads % kv_heads:
            raise keys.error("num_key_value_heads", f"must divide num_attention_heads={heads}")
        if head_dim % 2:
            raise keys.error("head_dim", "must be even: rotary positions turn pairs")
        experts, top_k = keys.positive("num_local_experts"), keys.positive("num_experts_per_tok")
        if top_k > experts:
            raise keys.error("num_experts_per_tok", f"exceeds num_local_experts={experts}")
        keys.agree("num_experts_per_tok", "experts_per_token")
        if keys.text("hidden_act", "silu") != "silu":
            raise keys.error("hidden_act", "is not known for gpt_oss; it has 'silu'")
        layers = keys.positive("num_hidden_layers")
        return cls(
            layers=layers,
            hidden=keys.positive("hidden_size"),
            intermediate=keys.positive("intermediate_size"),
            num_experts=experts,
            top_k=top_k,
            vocab=keys.positive("vocab_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            windows=_windows(keys, layers),
            rms_eps=keys.number("rms_norm_eps"),
            rope=read_rope(keys, head_dim),
            # Published configurations leave alpha out; 1.702 is the value the weights were trained with.
            activation=GatedActivation(alpha=keys.number("swiglu_alpha", 1.702), limit=keys.number("swiglu_limit")),
            attention_bias=keys.flag("attention_bias"),
            tied=keys.flag("tie_word_embeddings", False),
            max_positions=keys.positive("max_position_embeddings"),
        )


def _windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    kinds = keys.strings("layer_types")
    if len(kinds) != layers:
        raise keys.error("layer_types", f"has {len(kinds)} entries for num_hidden_layers={layers}", shown=False)
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise keys.error("layer_types", f"has {unknown[0]!r}; known: sliding_attention, full_attention", shown=False)
    window = keys.positive("sliding_window") if "sliding_attention" in kinds else None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class Block(nn.Module):
    """x += attention(norm(x)); x += experts(norm(x)), each sum being left to the norm that comes after it."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.attention_norm = AddNorm(config.hidden, config.rms_eps)
        self.attention = Attention(config.hidden, config.heads, config.kv_heads, config.head_dim, config.attention_bias)
        self.moe_norm = AddNorm(config.hidden, config.rms_eps)
        self.moe = MoE(config.hidden, config.num_experts, config.top_k)

    def forward(
        self,
        x_TH: torch.Tensor,
        rows: Pending | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cached: tuple[torch.Tensor, torch.Tensor],
        plan: Plan,
        *,
        wanted_O: torch.Tensor | None = None,
        overlap: bool = False,
    ) -> tuple[torch.Tensor, Pending]:
        """The residual stream and the rows still to be added to it, [T, H] and [T, J, H] → the same after this block.

        `cos_sin`, `cached` and `plan` are those of `Attention.forward`, `overlap` is that of `MoE.forward`. After the
        last block only some tokens are wanted: [O, H] and [O, J, H].
        """
        with named("attention"):
            rows_TJH, clear = (None, False) if rows is None else rows.take()
            x_TH, norm_TH = self.attention_norm(x_TH, rows_TJH, clear=clear)
            attended_TH = self.attention(norm_TH, cos_sin, cached, plan, wanted_O)
        if wanted_O is not None:
            x_TH = x_TH[wanted_O]
        x_TH, norm_TH, logits_TE = self.moe_norm.with_linear(x_TH, attended_TH[:, None], self.moe.router)
        return x_TH, self.moe(norm_TH, logits_TE, overlap=overlap)


@dataclass
class MicroBatch:
    """A step, or one of its halves, on its way through the blocks."""

    tokens: int
    plans: dict[int | None, Plan]
    cos_sin: tuple[torch.Tensor, torch.Tensor]
    x_TH: torch.Tensor
    wanted_O: torch.Tensor | None  # tokens whose logits are wanted; None: all
    rows: Pending | None = None

    def end(self) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """After the last block, of the wanted tokens: the residual stream and what `Pending.take` gives."""
        assert self.rows is not None, "a model has layers"
        return self.x_TH, *self.rows.take()


class GptOss(nn.Module):
    """The whole model; see epmoe/models/__init__.py for what a model offers."""

    Config: ClassVar = GptOssConfig

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.config = config
        # The weight is given because the module would draw one, and torch's normal_ on the meta device imports all of
        # torch._dynamo: 1.5 s of every start.
        weight_VH = torch.empty(config.vocab, config.hidden)
        self.embedding = nn.Embedding(config.vocab, config.hidden, _weight=weight_VH)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = AddNorm(config.hidden, config.rms_eps)
        if not config.tied:
            self.unembedding = nn.Linear(config.hidden, config.vocab, bias=False)
        self.rotary = Rotary(config.rope)

    def forward(self, step: Step | DecodeStep, cache: Cache) -> torch.Tensor:
        """Logits of the rows `step.output_O`, [O, V] float32; the step's keys and values are in `cache` afterwards.

        A DecodeStep gives the logits of all its rows, [B, V] or the part of V that it asks for, which begins at a
        multiple of `vocab_chunk`; on a GPU nothing of it waits, so it can be captured.

        A large Step goes through each block as two halves. While the ranks exchange the rows of the first, they compute
        the second, and the first's next block while they exchange the second's:

            compute    A₀  B₀  A₁  B₁  A₂ …      A, B: the halves; 0, 1, 2 …: the blocks
            wire           A₀  B₀  A₁  B₁ …

        The last block makes keys and values of all tokens, and goes on with those whose logits are wanted.

        A collective through its MoE layers: every rank of the expert group calls it with the same step, and gets the
        same bits.
        """
        halves = (step,) if isinstance(step, DecodeStep) else step.halves()
        batches = [self._begin(half, cache) for half in halves]
        for index, (block, window) in enumerate(zip(self.blocks, self.config.windows, strict=True)):
            last = index == self.config.layers - 1
            for batch in batches:
                place = batch.cos_sin, cache.layer(index), batch.plans[window]
                batch.x_TH, batch.rows = block(
                    batch.x_TH,
                    batch.rows,
                    *place,
                    wanted_O=batch.wanted_O if last else None,
                    overlap=len(batches) > 1,
                )
        x_OH, rows_OJH, clear = batches[0].end()
        if len(batches) == 2 and isinstance(step, Step):
            # Each half has a row for every wanted token, which means something in the token's own.
            own_O11 = (step.output_O < batches[0].tokens)[:, None, None]
            later_OH, later_OJH, _ = batches[1].end()
            x_OH, rows_OJH = torch.where(own_O11[:, 0], x_OH, later_OH), torch.where(own_O11, rows_OJH, later_OJH)
        norm_OH = self.norm(x_OH, rows_OJH, clear=clear)[1]
        return self._logits(norm_OH, step.part if isinstance(step, DecodeStep) else None)

    def _begin(self, step: Step | DecodeStep, cache: Cache) -> MicroBatch:
        if isinstance(step, DecodeStep):
            token_T, position_T, wanted_O = step.token_B, step.position_B, None
        else:
            token_T, position_T, wanted_O = step.token_T, step.position_T, step.output_O
        plans, cos_sin = cache.plan(step), self.rotary(position_T)
        return MicroBatch(len(token_T), plans, cos_sin, self.embedding(token_T), wanted_O)

    @property
    def vocab_chunk(self) -> int:
        """Parts of the vocabulary that a DecodeStep asks for begin at multiples of this."""
        return VOCAB_CHUNK

    def _logits(self, norm_OH: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
        weight_VH = self.embedding.weight if self.config.tied else self.unembedding.weight
        return part_logits(norm_OH, weight_VH, part or (0, len(weight_VH)), VOCAB_CHUNK)

    def moe_layers(self) -> list[MoE]:
        """The MoE layers, in layer order."""
        return [block.moe for block in cast(list[Block], list(self.blocks))]

    @staticmethod
    def shared_tensors(config: GptOssConfig) -> dict[str, Place]:
        """{name in the checkpoint: its place} of every tensor but the experts'."""
        places = {"model.embed_tokens.weight": Place("embedding.weight"), "model.norm.weight": Place("norm.weight")}
        if not config.tied:
            places["lm_head.weight"] = Place("unembedding.weight")
        sizes = (0, config.heads, config.kv_heads, config.kv_heads)
        qkv_rows = list(pairwise(accumulate(heads * config.head_dim for heads in sizes)))
        for layer in range(config.layers):
            stored, own = f"model.layers.{layer}.", f"blocks.{layer}."
            places[stored + "input_layernorm.weight"] = Place(own + "attention_norm.weight")
            places[stored + "post_attention_layernorm.weight"] = Place(own + "moe_norm.weight")
            places[stored + "self_attn.sinks"] = Place(own + "attention.sinks")
            for kind in ("weight", "bias"):
                places[stored + f"mlp.router.{kind}"] = Place(own + f"moe.router.{kind}")
                if kind == "weight" or config.attention_bias:
                    for part, rows in zip("qkv", qkv_rows, strict=True):
                        places[stored + f"self_attn.{part}_proj.{kind}"] = Place(own + f"attention.qkv.{kind}", rows)
                    places[stored + f"self_attn.o_proj.{kind}"] = Place(own + f"attention.o.{kind}")
        return places

    @staticmethod
    def expert_names(layer: int) -> tuple[str, str | None, str, str | None]:
        """Names of the experts' gate_up, its bias, down and its bias in the checkpoint; a format adds its suffixes."""
        stem = f"model.layers.{layer}.mlp.experts."
        return stem + "gate_up_proj", stem + "gate_up_proj_bias", stem + "down_proj", stem + "down_proj_bias"
