"""An EAGLE3 head, differentiable: what train_eagle3.py trains. epmoe.models.eagle3 is the same function for inference.

The head is trained as it will be used (EAGLE3's training-time test, arXiv 2503.01840): after its first step, at every
position of a window at once, it goes on from its own residual stream, a few steps far. The chain that starts at
position s sees the window's positions up to s, and its own:

    step 0    position s        features of the target         attends to 0 … s
    step j    position s + j    what step j - 1 gave at s       attends to 0 … s of step 0, s of steps 1 … j

so that a step's own keys and values are wanted at one place each. Tokens are the text's in all steps; what is learned
is the target's distribution over its next token, as far as the head has the ids.

Module names are those of the published layout, so `state_dict` is the file's.

Letters: B windows · S positions of a window · H hidden · X = 3H · E query heads · D head dimension · F = D/2 ·
V vocabulary · A draft vocabulary · C columns that a position attends to.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from epmoe.formats.mxfp4 import decode
from scripts.train.model import RMSNorm, Shape, TrainableGptOss

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class HeadShape:
    """The architecture; the defaults are those of the embedded model's head, under 2 MB. Sizes that are not here are
    the target's."""

    intermediate: int = 384
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    draft_vocab: int = 1280
    layers: tuple[int, ...] = (1, 3, 5)  # features: the residual stream before these
    rope_theta: float = 10000.0

    def config(self, target: TrainableGptOss) -> dict[str, Any]:
        """config.json. It names the layers whose outputs are the inputs of `layers`."""
        shape = target.shape
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "attention_bias": False,
            "draft_vocab_size": self.draft_vocab,
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in self.layers],
                "use_aux_hidden_state": True,
            },
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": shape.context,
            "mlp_bias": False,
            "model_type": "llama",
            "norm_before_residual": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": 1,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": shape.rms_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "vocab_size": shape.vocab,
        }


class Attention(nn.Module):
    """Queries, keys and values of tokens and features, side by side."""

    def __init__(self, hidden: int, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        width, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(2 * hidden, rows, bias=False) for rows in (width, narrow, narrow)
        )
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, both_BSX: Tensor, cos_sin: Pair, before: list[Pair]) -> Tensor:
        """One step, whose place in the chain is the number of those `before`; adds its keys and values to them."""
        q_BESD, k_BESD, v_BESD = (
            self._heads(projected(both_BSX)) for projected in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BESD = turned(q_BESD, cos_sin) * self.shape.head_dim**-0.5
        before.append((turned(k_BESD, cos_sin), v_BESD))
        (k_BESD, v_BESD), own, count = before[0], before[1:], q_BESD.shape[2]
        later_SS = torch.ones(count, count, dtype=torch.bool, device=q_BESD.device).triu(1)
        score_BESS = (q_BESD @ k_BESD.mT).masked_fill(later_SS, -math.inf)
        own_BES = [(q_BESD * own_k).sum(-1, keepdim=True) for own_k, _ in own]
        weight_BESC = torch.cat((score_BESS, *own_BES), -1).float().softmax(-1).to(q_BESD.dtype)
        out_BESD = weight_BESC[..., :count] @ v_BESD
        for index, (_, own_v) in enumerate(own):
            out_BESD = out_BESD + weight_BESC[..., count + index, None] * own_v
        return self.o_proj(out_BESD.transpose(1, 2).flatten(2))

    def _heads(self, x_BSX: Tensor) -> Tensor:
        """[B, E, S, D]; key/value heads repeated for their queries."""
        heads_BXSD = x_BSX.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        return heads_BXSD.repeat_interleave(self.shape.heads // heads_BXSD.shape[1], 1)


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BSH)) * self.up_proj(x_BSH))


class MidLayer(nn.Module):
    def __init__(self, shape: HeadShape, target: Shape) -> None:
        super().__init__()
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm = (RMSNorm(target) for _ in range(3))
        self.self_attn, self.mlp = Attention(target.hidden, shape), MLP(target.hidden, shape.intermediate)

    def forward(self, embedded_BSH: Tensor, feature_BSH: Tensor, cos_sin: Pair, before: list[Pair]) -> Tensor:
        both_BSX = torch.cat((self.input_layernorm(embedded_BSH), self.hidden_norm(feature_BSH)), -1)
        x_BSH = feature_BSH + self.self_attn(both_BSX, cos_sin, before)
        return x_BSH + self.mlp(self.post_attention_layernorm(x_BSH))


class TrainableHead(nn.Module):
    """The head of a target. It begins as a reader of the target's last feature: fc copies it, attention and mlp add
    little, norm and lm_head are the target's own.

    Args:
        id_A: int64, ascending, the target's ids of the draft vocabulary.
    """

    def __init__(self, shape: HeadShape, target: TrainableGptOss, id_A: Tensor) -> None:
        super().__init__()
        hidden = target.shape.hidden
        assert id_A.shape == (shape.draft_vocab,)
        self.shape = shape
        self.fc = nn.Linear(len(shape.layers) * hidden, hidden, bias=False)
        self.midlayer = MidLayer(shape, target.shape)
        self.norm = RMSNorm(target.shape)
        self.lm_head = nn.Linear(hidden, shape.draft_vocab, bias=False)
        self.id_A: Tensor
        self.register_buffer("id_A", id_A, persistent=False)
        for name, parameter in self.named_parameters():
            if name.endswith("_proj.weight"):
                nn.init.normal_(
                    parameter, std=(0.1 if "o_proj" in name or "down" in name else 1.0) * parameter.shape[1] ** -0.5
                )
        with torch.no_grad():
            nn.init.normal_(self.fc.weight, std=0.02 * self.fc.in_features**-0.5)
            self.fc.weight[:, -hidden:] += torch.eye(hidden)
            self.lm_head.weight.copy_(target.lm_head.weight[id_A])
            self.norm.weight.copy_(target.model.norm.weight)

    def forward(self, embedded_BSH: Tensor, feature_BSX: Tensor, steps: int) -> list[Tensor]:
        """Logits [B, S, A] of each of `steps`, whose tokens are the text's.

        Args:
            embedded_BSH: of the tokens *after* positions 0 … S + steps - 2.
            feature_BSX: of positions 0 … S - 1, the target's.
        """
        count, before, found = feature_BSX.shape[1], list[Pair](), []
        x_BSH = self.fc(feature_BSX)
        for step in range(steps):
            x_BSH = self._step(embedded_BSH[:, step : step + count], x_BSH, before)
            found.append(self.lm_head(self.norm(x_BSH)))
        return found

    @torch.no_grad()
    def drafts(self, embedding: nn.Embedding, token_BS: Tensor, feature_BSX: Tensor, depth: int) -> Tensor:
        """int64 [B, S, depth], what the head drafts at each position, with its own tokens.

        Args:
            token_BS: the token *after* each position.
        """
        before, found = list[Pair](), []
        x_BSH = self.fc(feature_BSX)
        for _ in range(depth):
            x_BSH = self._step(embedding(token_BS), x_BSH, before)
            token_BS = self.id_A[self.lm_head(self.norm(x_BSH)).argmax(-1)]
            found.append(token_BS)
        return torch.stack(found, -1)

    def _step(self, embedded_BSH: Tensor, x_BSH: Tensor, before: list[Pair]) -> Tensor:
        cos_sin = positions(self.shape, len(before), x_BSH.shape[1], x_BSH.device)
        return self.midlayer(embedded_BSH, x_BSH, cos_sin, before)

    def stored(self, vocab: int) -> dict[str, Tensor]:
        """The file's tensors: weights in bfloat16, and the maps between the vocabularies."""
        id_A = self.id_A.cpu()
        tensors = {name: value.to(torch.bfloat16).cpu().contiguous() for name, value in self.state_dict().items()}
        tensors["d2t"] = id_A - torch.arange(len(id_A))
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, id_A, True)
        return tensors


def positions(shape: HeadShape, first: int, count: int, device: torch.device) -> Pair:
    """cos and sin of positions first … first + count - 1, [S, F]."""
    half = shape.head_dim // 2
    frequency_F = shape.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle_SF = torch.arange(first, first + count, device=device, dtype=torch.float32)[:, None] * frequency_F
    return angle_SF.cos(), angle_SF.sin()


def turned(x_BESD: Tensor, cos_sin: Pair) -> Tensor:
    """Rotate the pairs (i, i + D/2)."""
    cos_SF, sin_SF = cos_sin
    first, second = x_BESD.float().chunk(2, -1)
    return torch.cat((first * cos_SF - second * sin_SF, second * cos_SF + first * sin_SF), -1).to(x_BESD.dtype)


@torch.no_grad()
def features(target: TrainableGptOss, layers: tuple[int, ...], token_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(the residual streams before `layers` side by side [B, S, X], logits [B, S, V]) of the target."""
    found: dict[int, Tensor] = {}
    hooks = [
        target.model.layers[layer].register_forward_pre_hook(
            lambda _, inputs, layer=layer: found.__setitem__(layer, inputs[0])
        )
        for layer in layers
    ]
    try:
        logits_BSV, _, _ = target(token_BS)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([found[layer] for layer in layers], -1), logits_BSV


def read_target(directory: Path) -> TrainableGptOss:
    """A checkpoint that train_demo.py has written, with the values that its readers see; without gradients."""
    config = json.loads((directory / "config.json").read_text())
    stored = load_file(directory / "model.safetensors")
    state = {}
    for name, value in stored.items():
        if name.endswith("_blocks"):
            scales = stored[name.removesuffix("blocks") + "scales"]
            state[name.removesuffix("_blocks")] = decode(value, scales, torch.float32)
        elif not name.endswith("_scales"):
            state[name] = value.float()
    shape = Shape(
        vocab=config["vocab_size"], hidden=config["hidden_size"], intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"], experts=config["num_local_experts"], top_k=config["num_experts_per_tok"],
        heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"], head_dim=config["head_dim"],
        window=config["sliding_window"], context=config["max_position_embeddings"],
    )  # fmt: skip
    assert shape.config(config["eos_token_id"]) == config, f"{directory} is no checkpoint of scripts/train_demo.py"
    target = TrainableGptOss(shape)
    target.load_state_dict(state)
    target.read_experts_as("bf16")  # the state already holds the values that a reader of MXFP4 sees
    return target.eval().requires_grad_(False)
