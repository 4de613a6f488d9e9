"""EAGLE3 (arXiv 2503.01840): a head of one Llama layer that proposes what its target, the model, will say next.

    feature     the target's residual stream before three of its layers, side by side, through `fc`; where the target
                has not been yet, the head's own residual stream of the position before
    layer       [norm(embedding of the token after the position) | norm(feature)] → q, k, v; then as any Llama layer:
                x = feature + attention;  x = x + mlp(norm(x))
    proposal    the largest of lm_head(norm(x)), over a vocabulary of the head's own, whose ids `d2t` translates

Position t holds the feature of position t and the token after it, t + 1; it sees the positions up to t, and proposes
token t + 2. Keys and values lie in a paged cache like the target's. What a head proposes is verified: its bits change
how long an answer takes, and nothing else.

Letters: T positions of a step · B sequences · H hidden · X = H times the layers that features come from ·
I intermediate · D draft vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import nn

from epmoe.cache.plan import Plan
from epmoe.layers.attention import Pair
from epmoe.layers.norm import AddNorm
from epmoe.layers.rotary import Llama3Rope, Rope, Rotary
from epmoe.layers.twin import twin
from epmoe.models import Target
from epmoe.models.decoder import DecoderConfig
from epmoe.models.keys import Keys, read_rope

ARCHITECTURE = "LlamaForCausalLMEagle3"
MIDLAYER, LAYER = "midlayer.", "layers.0."  # what files call the layer; the first is EAGLE's own
FEATURES = 3
NOTHING = -1e30  # a sink's logit that weighs nothing, and that no kernel makes a NaN of
CHUNK = 16384  # ids that a library's product computes at a time (layers/vocabulary.py)


@dataclass(frozen=True)
class HeadConfig:
    """The architecture, from a head's config.json."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # of the target
    draft_vocab: int
    layers: tuple[int, ...]  # of the target: the residual stream before each of them is a part of the feature
    rope: Rope
    rms_eps: float
    attention_bias: bool
    norm_before_residual: bool  # the layer's residual stream begins with the norm of the feature, not with the feature

    @classmethod
    def from_json(cls, config: Mapping[str, Any], model: DecoderConfig) -> Self:
        """Read a config.json, for a head beside `model`.

        Raises:
            UserError: a key is of the wrong type, or says what this head or this model does not have; it names the key.
        """
        keys = Keys(config, "config.json")
        if keys.strings("architectures") != [ARCHITECTURE]:
            raise keys.error("architectures", f"is no EAGLE3 head that is known; known: [{ARCHITECTURE!r}]")
        _refuse_others(keys)
        hidden, vocab = keys.positive("hidden_size"), keys.positive("vocab_size")
        for name, model_has in {
            "hidden_size": model.hidden,
            "target_hidden_size": model.hidden,
            "vocab_size": model.vocab,
        }.items():
            if keys.has(name) and keys.positive(name) != model_has:
                raise keys.error(name, f"is not the model's, {model_has}: take a head that was trained for this model")
        draft_vocab = keys.positive("draft_vocab_size") if keys.has("draft_vocab_size") else vocab
        if draft_vocab > vocab:
            raise keys.error("draft_vocab_size", f"exceeds vocab_size={vocab}")
        heads, kv_heads, head_dim = _heads(keys, hidden)
        return cls(
            hidden=hidden,
            intermediate=keys.positive("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=vocab,
            draft_vocab=draft_vocab,
            layers=_layers(keys, model.layers),
            rope=_rope(keys, head_dim),
            rms_eps=keys.number("rms_norm_eps", 1e-6),
            attention_bias=keys.flag("attention_bias", False),
            norm_before_residual=keys.flag("norm_before_residual", False),
        )


def _refuse_others(keys: Keys) -> None:
    """Raises UserError for what Eagle3 does not compute."""
    if keys.positive("num_hidden_layers") != 1:
        raise keys.error("num_hidden_layers", "is not supported; a head has 1")
    if keys.text("hidden_act", "silu") != "silu":
        raise keys.error("hidden_act", "is not supported; known: silu")
    if keys.flag("mlp_bias", False):
        raise keys.error("mlp_bias", "is not supported; known: false")
    if not _eagle(keys).flag("use_aux_hidden_state", True):
        raise _eagle(keys).error(
            "use_aux_hidden_state", f"is not supported: a head reads {FEATURES} layers; known: true"
        )


def _eagle(keys: Keys) -> Keys:
    """The object `eagle_config`; empty where there is none."""
    found = keys.values["eagle_config"] if keys.has("eagle_config") else {}
    if not isinstance(found, dict):
        raise keys.error("eagle_config", "must be an object")
    return Keys(found, keys.file, "eagle_config.")


def _heads(keys: Keys, hidden: int) -> tuple[int, int, int]:
    """Query heads, key/value heads and their size."""
    heads = keys.positive("num_attention_heads")
    kv_heads = keys.positive("num_key_value_heads") if keys.has("num_key_value_heads") else heads
    if heads % kv_heads:
        raise keys.error("num_key_value_heads", f"must divide num_attention_heads={heads}")
    head_dim = keys.positive("head_dim") if keys.has("head_dim") else hidden // heads
    if head_dim % 2 or not 0 < head_dim <= 16 * hidden:
        complaint = f"must be even and at most {16 * hidden}: rotary positions turn pairs of what {hidden} numbers give"
        raise keys.error("head_dim", complaint)
    return heads, kv_heads, head_dim


def _layers(keys: Keys, count: int) -> tuple[int, ...]:
    """The layers of the model before which features are taken.

    What trains heads (SpecForge, NVIDIA's Model Optimizer) writes into `eagle_config` which layers' *outputs* they are,
    so the next layers' inputs. The same key outside of it, vLLM's, counts inputs: 0 is the embedding. Where neither is
    there, all of them mean inputs 2, L/2 and L - 3.
    """
    name, eagle = "eagle_aux_hidden_state_layer_ids", _eagle(keys)
    outside = keys.has(name)
    where = keys if outside else eagle
    if not where.has(name) or where.values[name] == []:
        if count < 7:
            complaint = f"is missing, and the model's {count} layers are too few for the usual ones"
            raise where.error(name, complaint, shown=False)
        return 2, count // 2, count - 3
    found = where.values[name]
    if not isinstance(found, list) or len(found) != FEATURES or not all(type(layer) is int for layer in found):
        raise where.error(name, f"must be a list of {FEATURES} whole numbers")
    if sorted(set(found)) != found:
        raise where.error(name, "must ascend")
    layers = tuple(layer if outside else layer + 1 for layer in found)
    if layers[0] < 0 or layers[-1] >= count:
        most = count - 1 if outside else count - 2
        raise where.error(
            name, f"must be layers of the model, which has {count}: from {0 if outside else -1} to {most}"
        )
    return layers


def _rope(keys: Keys, head_dim: int) -> Rope:
    """The rotary settings: plain ones, as a Llama has them, of YaRN, or of Llama 3."""
    name = "rope_parameters" if keys.has("rope_parameters") else "rope_scaling"
    scaling = keys.values[name] if keys.has(name) else {}
    if not isinstance(scaling, dict):
        raise keys.error(name, "must be an object")
    outside = {"rope_theta": keys.values["rope_theta"]} if keys.has("rope_theta") else {}
    rope = Keys({**outside, **scaling}, keys.file, f"{name}.")
    kind = rope.text("rope_type" if rope.has("rope_type") else "type", "default")
    if kind == "yarn":
        return read_rope(keys, head_dim)
    theta = rope.number("rope_theta", 10000.0)
    if theta <= 1:
        raise rope.error("rope_theta", "must be above 1")
    if kind == "default":
        return Rope.plain(head_dim, theta)
    if kind != "llama3":
        raise rope.error("rope_type", "is not supported; known: default, llama3, yarn")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise rope.error("low_freq_factor", f"must be below high_freq_factor={high}")
    original = rope.positive("original_max_position_embeddings")
    return Llama3Rope(head_dim, theta, rope.number("factor"), high, low, original, truncate=False, concentration=1.0)


class Eagle3(nn.Module):
    """The head. The loader assigns every parameter and buffer, and the embedding, which is the target's or its own.

    On a GPU nothing here waits, and no size follows from a value: it can be captured.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        hidden, eps, bias = config.hidden, config.rms_eps, config.attention_bias
        # The weight is given, as in decoder.py: on the meta device nn.Embedding would import torch._dynamo to draw one.
        self.embedding = nn.Embedding(config.vocab, hidden, _weight=torch.empty(config.vocab, hidden))
        self.fc = nn.Linear(len(config.layers) * hidden, hidden, bias=False)
        self.token_norm, self.feature_norm, self.mlp_norm, self.norm = (AddNorm(hidden, eps) for _ in range(4))
        self.qkv = nn.Linear(2 * hidden, (config.heads + 2 * config.kv_heads) * config.head_dim, bias)
        self.o = nn.Linear(config.heads * config.head_dim, hidden, bias)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate, bias=False)
        self.down = nn.Linear(config.intermediate, hidden, bias=False)
        self.unembedding = nn.Linear(hidden, config.draft_vocab, bias=False)
        self.sinks: torch.Tensor
        self.register_buffer("sinks", torch.empty(config.heads), persistent=False)
        self.target_D: (
            torch.Tensor
        )  # int64, the target's id of each of the head's; one more: of a row that is not finite
        self.register_buffer("target_D", torch.empty(config.draft_vocab + 1, dtype=torch.int64), persistent=False)
        self.rotary = Rotary(config.rope)

    @property
    def values(self) -> int:
        """Weights that it reads for a token: all but the embedding."""
        own = (each for name, each in self.named_parameters() if not name.startswith("embedding."))
        return sum(each.numel() for each in own)

    def fuse(self, feature_TX: torch.Tensor) -> torch.Tensor:
        """The target's residual streams before `config.layers`, side by side → features [T, H]."""
        return _linear(feature_TX, self.fc)

    def forward(
        self, token_T: torch.Tensor, feature_TH: torch.Tensor, position_T: torch.Tensor, cached: Pair, plan: Plan
    ) -> torch.Tensor:
        """The residual stream behind the layer, [T, H]; keys and values are in `cached` then, as `plan` says.

        Args:
            token_T: int64, the token *after* each position.
            feature_TH: `fuse` of the position; or, where the target has not been there, what this function gave for the
                position before.
            position_T: int64, as `plan` has them.
            cached: keys and values of the head's layer, [J, R, D] each.
        """
        embedded_TH, _ = self._normed(self.embedding(token_T), self.token_norm)
        norm_TH, _ = self._normed(feature_TH, self.feature_norm)
        x_TH = norm_TH if self.config.norm_before_residual else feature_TH
        attended_TH = self._attended(torch.cat((embedded_TH, norm_TH), dim=1), position_T, cached, plan)
        norm_TH, x_TH = self._normed(x_TH, self.mlp_norm, attended_TH)
        gate_TI, up_TI = _linear(norm_TH, self.gate_up).chunk(2, dim=1)
        return x_TH + _linear(nn.functional.silu(gate_TI) * up_TI, self.down)

    def propose(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """int64 [B], ids of the target's vocabulary, of what `forward` gave; of equal logits the lower draft id.

        A row that is not finite proposes id 0.
        """
        norm_BH, _ = self._normed(hidden_BH, self.norm)
        weight_DH, whole = self.unembedding.weight, (0, self.config.draft_vocab)
        logits_BD = twin("vocabulary", norm_BH).part_logits(norm_BH, weight_DH, whole, CHUNK)
        greedy = twin("greedy", logits_BD)
        return self.target_D[greedy.join_largest(greedy.largest(logits_BD, 0), self.config.draft_vocab)]

    def _attended(self, both_TX: torch.Tensor, position_T: torch.Tensor, cached: Pair, plan: Plan) -> torch.Tensor:
        """Norms of tokens and features, [T, 2H] → [T, H]."""
        config = self.config
        heads_TXD = _linear(both_TX, self.qkv).unflatten(-1, (-1, config.head_dim))
        heads = heads_TXD.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
        attention = twin("attention", both_TX)
        out_TED = attention.cached_attention(heads, self.rotary(position_T), cached, plan, self.sinks)
        return _linear(out_TED.flatten(1), self.o)

    @staticmethod
    def _normed(
        x_TH: torch.Tensor, norm: AddNorm, more_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + more, and that sum."""
        sum_TH, norm_TH = norm(x_TH, None if more_TH is None else more_TH[:, None])
        return norm_TH, sum_TH

    def stored_tensors(self, layer: str) -> dict[str, Target]:
        """{name in the file: its target} of every tensor but `d2t`, `t2d` and an embedding.

        Args:
            layer: MIDLAYER or LAYER, as the file has it.
        """
        config = self.config
        parts = {
            "hidden_norm": "feature_norm",
            "input_layernorm": "token_norm",
            "post_attention_layernorm": "mlp_norm",
            "mlp.down_proj": "down",
        }
        targets = {f"{name}.weight": Target(f"{own}.weight") for name, own in {"fc": "fc", "norm": "norm"}.items()}
        targets["lm_head.weight"] = Target("unembedding.weight")
        targets |= {f"{layer}{name}.weight": Target(f"{own}.weight") for name, own in parts.items()}
        heads = (config.heads, config.kv_heads, config.kv_heads)
        qkv_rows = list(pairwise(accumulate((0, *(count * config.head_dim for count in heads)))))
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            for part, rows in zip("qkv", qkv_rows, strict=True):
                targets[f"{layer}self_attn.{part}_proj.{kind}"] = Target(f"qkv.{kind}", rows)
            targets[f"{layer}self_attn.o_proj.{kind}"] = Target(f"o.{kind}")
        for index, part in enumerate(("gate", "up")):
            rows = index * config.intermediate, (index + 1) * config.intermediate
            targets[f"{layer}mlp.{part}_proj.weight"] = Target("gate_up.weight", rows)
        return targets


def _linear(x_TH: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    out_TN: torch.Tensor = twin("linear", x_TH).linear(x_TH, layer)
    return out_TN
