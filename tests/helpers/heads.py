"""Random EAGLE3 heads on disk, and what such a head computes: the layer over a whole sequence, in plain torch.

Letters: T positions · H hidden · E query heads · J key/value heads · D head dimension.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from epmoe.layers.rotary import Rope
from epmoe.models.decoder import DecoderConfig
from epmoe.moe.experts import GatedActivation

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class RandomHead:
    """Every number of a head; the defaults are as small as they may be and yet all different."""

    hidden: int = 48
    intermediate: int = 80
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 120
    draft_vocab: int = 40
    layers: tuple[int, ...] = (1, 3, 5)
    attention_bias: bool = False
    norm_before_residual: bool = False
    own_embedding: bool = False
    layer_name: str = "midlayer."
    seed: int = 0


def target_config(head: RandomHead, layers: int = 8) -> DecoderConfig:
    """A model that the head fits."""
    return DecoderConfig(
        layers=layers, hidden=head.hidden, intermediate=32, num_experts=4, top_k=2, vocab=head.vocab, heads=2,
        kv_heads=1, head_dim=16, windows=(None,) * layers, rms_eps=1e-5, rope=Rope.plain(16, 10000.0),
        activation=GatedActivation(alpha=1.702, limit=7.0), attention_bias=True, tied=False, max_positions=4096,
    )  # fmt: skip


def config_json(head: RandomHead) -> dict[str, Any]:
    """As SpecForge and NVIDIA write it."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": head.attention_bias,
        "draft_vocab_size": head.draft_vocab,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in head.layers],
            "use_aux_hidden_state": True,
        },
        "head_dim": head.head_dim,
        "hidden_act": "silu",
        "hidden_size": head.hidden,
        "intermediate_size": head.intermediate,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "norm_before_residual": head.norm_before_residual,
        "num_attention_heads": head.heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": head.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
        "vocab_size": head.vocab,
    }


def random_tensors(head: RandomHead) -> Tensors:
    """Weights of which each matters, float32, under the names of the file."""
    generator, hidden, layer = torch.Generator().manual_seed(head.seed), head.hidden, head.layer_name
    width, narrow = head.heads * head.head_dim, head.kv_heads * head.head_dim

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    tensors = {"fc.weight": matrix(hidden, 3 * hidden), "lm_head.weight": matrix(head.draft_vocab, hidden)}
    tensors["norm.weight"] = torch.rand(hidden, generator=generator) + 0.5
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        tensors[f"{layer}{name}.weight"] = torch.rand(hidden, generator=generator) + 0.5
    for part, rows in {"q": width, "k": narrow, "v": narrow}.items():
        tensors[f"{layer}self_attn.{part}_proj.weight"] = 1.5 * matrix(rows, 2 * hidden)
    tensors[f"{layer}self_attn.o_proj.weight"] = matrix(hidden, width)
    if head.attention_bias:
        for part, rows in {"q": width, "k": narrow, "v": narrow, "o": hidden}.items():
            tensors[f"{layer}self_attn.{part}_proj.bias"] = torch.randn(rows, generator=generator)
    for part in ("gate", "up"):
        tensors[f"{layer}mlp.{part}_proj.weight"] = matrix(head.intermediate, hidden)
    tensors[f"{layer}mlp.down_proj.weight"] = matrix(hidden, head.intermediate)
    ids_D = torch.randperm(head.vocab, generator=generator)[: head.draft_vocab].sort().values
    tensors["d2t"] = ids_D - torch.arange(head.draft_vocab)
    tensors["t2d"] = torch.zeros(head.vocab, dtype=torch.bool).index_fill(0, ids_D, True)
    if head.own_embedding:
        tensors["embed_tokens.weight"] = torch.randn(head.vocab, hidden, generator=generator)
    return tensors


def write_head(
    path: Path,
    head: RandomHead,
    change: Callable[[Tensors], object] | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Tensors:
    """A head's directory; `config` replaces keys of config.json, or removes those that are `...`."""
    path.mkdir(exist_ok=True)
    tensors = {name: value.to(dtype) if value.is_floating_point() else value
               for name, value in random_tensors(head).items()}  # fmt: skip
    if change is not None:
        change(tensors)
    keys = {name: value for name, value in (config_json(head) | config).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(keys))
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")
    return tensors


class ReferenceHead:
    """The head over one whole sequence, from the file's tensors: what EAGLE3's paper and vLLM's model say."""

    def __init__(self, head: RandomHead, tensors: Tensors, embedding_VH: Tensor) -> None:
        self.head, self.tensors = head, tensors
        self.embedding_VH = tensors.get("embed_tokens.weight", embedding_VH)

    def _norm(self, x_TH: Tensor, name: str) -> Tensor:
        return F.rms_norm(x_TH, (self.head.hidden,), self.tensors[name], eps=1e-5)

    def _project(self, x_TX: Tensor, name: str) -> Tensor:
        stem = f"{self.head.layer_name}{name}_proj"
        return F.linear(x_TX, self.tensors[f"{stem}.weight"], self.tensors.get(f"{stem}.bias"))

    def fuse(self, feature_TX: Tensor) -> Tensor:
        return feature_TX @ self.tensors["fc.weight"].T

    def layer(self, token_T: Tensor, feature_TH: Tensor) -> Tensor:
        """The residual stream behind the layer, of positions 0 … T - 1, each with those before it: [T, H]."""
        head, layer, count = self.head, self.head.layer_name, len(token_T)
        embedded_TH = self._norm(self.embedding_VH[token_T], f"{layer}input_layernorm.weight")
        norm_TH = self._norm(feature_TH, f"{layer}hidden_norm.weight")
        both_TX = torch.cat((embedded_TH, norm_TH), -1)
        q_ETD, k_JTD, v_JTD = (
            self._project(both_TX, f"self_attn.{part}").view(count, -1, head.head_dim).transpose(0, 1) for part in "qkv"
        )
        group = head.heads // head.kv_heads
        k_ETD, v_ETD = (each.repeat_interleave(group, 0) for each in (_turned(k_JTD), v_JTD))
        score_ETT = _turned(q_ETD) @ k_ETD.mT / math.sqrt(head.head_dim)
        score_ETT.masked_fill_(torch.ones(count, count, dtype=torch.bool).triu(1), -torch.inf)
        out_TX = (score_ETT.softmax(-1) @ v_ETD).transpose(0, 1).flatten(1)
        x_TH = (norm_TH if head.norm_before_residual else feature_TH) + self._project(out_TX, "self_attn.o")
        mlp_TH = self._norm(x_TH, f"{layer}post_attention_layernorm.weight")
        gated_TI = F.silu(self._project(mlp_TH, "mlp.gate")) * self._project(mlp_TH, "mlp.up")
        return x_TH + self._project(gated_TI, "mlp.down")

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Over the draft's vocabulary."""
        return self._norm(hidden_TH, "norm.weight") @ self.tensors["lm_head.weight"].T

    def propose(self, hidden_TH: Tensor) -> Tensor:
        draft_T = self.logits(hidden_TH).argmax(-1)
        return draft_T + self.tensors["d2t"][draft_T]


def _turned(x_XTD: Tensor) -> Tensor:
    """A Llama's rotary positions, of base 500: complex numbers of the first and second half."""
    count, half = x_XTD.shape[1], x_XTD.shape[2] // 2
    angle_TF = torch.arange(count)[:, None] * 500.0 ** (-torch.arange(half) / half)
    turned = torch.complex(*x_XTD.chunk(2, -1)) * torch.polar(torch.ones_like(angle_TF), angle_TF)
    return torch.cat((turned.real, turned.imag), -1)
