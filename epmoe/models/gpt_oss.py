"""gpt-oss (openai/gpt-oss-20b and -120b): its config.json, and its tensors' names. The forward is decoder.py's."""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self

from epmoe.models import Target
from epmoe.models.decoder import Decoder, DecoderConfig
from epmoe.models.keys import Keys, read_rope
from epmoe.moe.experts import GatedActivation

# What transformers' GptOssConfig takes for keys that a config.json leaves out; published ones leave out none.
STANDARD = {
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}


class GptOssConfig(DecoderConfig):
    """The architecture, read from a published config.json."""

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Read a config.json; keys that are left out are what transformers takes, and one line says which.

        Raises:
            UserError: a key is of the wrong type or contradicts another; the message names it.
        """
        keys = Keys(config, "config.json", standard=STANDARD)
        heads, kv_heads, head_dim = _heads(keys)
        experts, top_k = _experts(keys)
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


def _heads(keys: Keys) -> tuple[int, int, int]:
    """Query heads, key/value heads and their size."""
    heads, kv_heads, head_dim = (
        keys.positive(name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"must divide num_attention_heads={heads}")
    if head_dim % 2:
        raise keys.error("head_dim", "must be even: rotary positions turn pairs")
    return heads, kv_heads, head_dim


def _experts(keys: Keys) -> tuple[int, int]:
    """Experts, and how many of them a token goes to; transformers knows the first by two names."""
    name = "num_experts" if keys.has("num_experts") and not keys.has("num_local_experts") else "num_local_experts"
    experts, top_k = keys.positive(name), keys.positive("num_experts_per_tok")
    keys.agree("num_local_experts", "num_experts")
    keys.agree("num_experts_per_tok", "experts_per_token")
    if top_k > experts:
        raise keys.error("num_experts_per_tok", f"exceeds {name}={experts}")
    return experts, top_k


def _windows(keys: Keys, layers: int) -> tuple[int | None, ...]:
    """Every other layer has a window, from the first on, where layer_types does not say it."""
    if keys.has("layer_types"):
        kinds = keys.strings("layer_types")
    else:
        kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(min(layers, 10**6))]
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
        """{name in the checkpoint: its target} of every tensor but the experts'; with a share of heads, the part."""
        config = self.config
        targets = {"model.embed_tokens.weight": Target("embedding.weight"), "model.norm.weight": Target("norm.weight")}
        if not config.tied:
            targets["lm_head.weight"] = Target("unembedding.weight")
        query, kv, dim = self.heads.query, self.heads.kv, config.head_dim
        qkv = dict(zip("qkv", (query, kv, kv), strict=True))
        qkv_rows = list(pairwise(accumulate((0, *(part.size * dim for part in qkv.values())))))
        for layer in range(config.layers):
            stored, own = f"model.layers.{layer}.", f"layers.{layer}."
            targets[stored + "input_layernorm.weight"] = Target(own + "attention.norm.weight")
            targets[stored + "post_attention_layernorm.weight"] = Target(own + "moe.norm.weight")
            targets[stored + "self_attn.sinks"] = Target(own + "attention.sinks", None, query.rows())
            for kind in ("weight", "bias"):
                targets[stored + f"mlp.router.{kind}"] = Target(own + f"moe.router.{kind}")
                if kind == "weight" or config.attention_bias:
                    for (name, part), rows in zip(qkv.items(), qkv_rows, strict=True):
                        target = Target(own + f"attention.qkv.{kind}", rows, part.rows(dim))
                        targets[stored + f"self_attn.{name}_proj.{kind}"] = target
                    targets[stored + f"self_attn.o_proj.{kind}"] = Target(own + f"attention.o.{kind}")
        return targets

    @staticmethod
    def expert_names(layer: int) -> tuple[str, str | None, str, str | None]:
        """Names of the experts' gate_up, its bias, down and its bias in the checkpoint; a format adds its suffixes."""
        stem = f"model.layers.{layer}.mlp.experts."
        return stem + "gate_up_proj", stem + "gate_up_proj_bias", stem + "down_proj", stem + "down_proj_bias"
