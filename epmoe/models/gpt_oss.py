"""gpt-oss (openai/gpt-oss-20b and -120b): its config.json, and its tensors' names. The forward is decoder.py's."""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self

from epmoe.models import Target
from epmoe.models.decoder import Decoder, DecoderConfig
from epmoe.models.keys import Keys, read_rope
from epmoe.moe.experts import GatedActivation


class GptOssConfig(DecoderConfig):
    """The architecture, read from a published config.json."""

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
        found = cls(
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
        keys.end("quantization_config")
        return found


def _windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    kinds = keys.strings("layer_types")
    if len(kinds) != layers:
        raise keys.error("layer_types", f"has {len(kinds)} entries for num_hidden_layers={layers}", shown=False)
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise keys.error("layer_types", f"has {unknown[0]!r}; known: sliding_attention, full_attention", shown=False)
    window = keys.positive("sliding_window") if "sliding_attention" in kinds else None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class GptOss(Decoder):
    """The decoder, and what a checkpoint calls its tensors; see epmoe/models/__init__.py for what a model offers."""

    Config: ClassVar = GptOssConfig

    def shared_tensors(self) -> dict[str, Target]:
        """{name in the checkpoint: its target} of every tensor but the experts'."""
        config = self.config
        targets = {"model.embed_tokens.weight": Target("embedding.weight"), "model.norm.weight": Target("norm.weight")}
        if not config.tied:
            targets["lm_head.weight"] = Target("unembedding.weight")
        sizes = (0, config.heads, config.kv_heads, config.kv_heads)
        qkv_rows = list(pairwise(accumulate(heads * config.head_dim for heads in sizes)))
        for layer in range(config.layers):
            stored, own = f"model.layers.{layer}.", f"layers.{layer}."
            targets[stored + "input_layernorm.weight"] = Target(own + "attention.norm.weight")
            targets[stored + "post_attention_layernorm.weight"] = Target(own + "moe.norm.weight")
            targets[stored + "self_attn.sinks"] = Target(own + "attention.sinks")
            for kind in ("weight", "bias"):
                targets[stored + f"mlp.router.{kind}"] = Target(own + f"moe.router.{kind}")
                if kind == "weight" or config.attention_bias:
                    for part, rows in zip("qkv", qkv_rows, strict=True):
                        targets[stored + f"self_attn.{part}_proj.{kind}"] = Target(own + f"attention.qkv.{kind}", rows)
                    targets[stored + f"self_attn.o_proj.{kind}"] = Target(own + f"attention.o.{kind}")
        return targets

    @staticmethod
    def expert_names(layer: int) -> tuple[str, str | None, str, str | None]:
        """Names of the experts' gate_up, its bias, down and its bias in the checkpoint; a format adds its suffixes."""
        stem = f"model.layers.{layer}.mlp.experts."
        return stem + "gate_up_proj", stem + "gate_up_proj_bias", stem + "down_proj", stem + "down_proj_bias"
