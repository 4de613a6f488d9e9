"""gpt-oss, differentiable: what train_demo.py trains. epmoe.models.gpt_oss is the same function for inference.

No cache, no ranks: whole windows go through at once. Module names are the checkpoint's names, so `state_dict` is
already the checkpoint but for the experts' packing. The experts' matrices are read through MXFP4 (`fake_mxfp4`), so
that the model learns with the values that will be stored.

Letters: B windows · S tokens of a window · T = B·S tokens · H hidden · I intermediate · E experts · K experts per
token · N query heads · M key/value heads · Q = N/M · D head_dim · V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from epmoe.formats.mxfp4 import decode, encode


@dataclass(frozen=True)
class Shape:
    """The architecture; the defaults are the embedded model's, about 15.5 MB."""

    vocab: int = 3072
    hidden: int = 256
    intermediate: int = 256
    layers: int = 6
    experts: int = 16
    top_k: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    window: int = 64  # of the even layers; the odd ones see everything
    context: int = 512
    rope_theta: float = 10000.0
    rope_factor: float = 4.0
    rms_eps: float = 1e-5
    alpha: float = 1.702
    limit: float = 7.0

    def windows(self) -> list[int | None]:
        return [self.window if layer % 2 == 0 else None for layer in range(self.layers)]

    def config(self, eos: int) -> dict:
        """config.json, with the keys of openai/gpt-oss-20b."""
        return {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": eos,
            "experts_per_token": self.top_k,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initial_context_length": int(self.context / self.rope_factor),
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in self.windows()],
            "max_position_embeddings": self.context,
            "model_type": "gpt_oss",
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "output_router_logits": False,
            "pad_token_id": eos,
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": self.rms_eps,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": self.rope_factor,
                "original_max_position_embeddings": int(self.context / self.rope_factor),
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.01,
            "sliding_window": self.window,
            "swiglu_limit": self.limit,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab,
        }


def fake_mxfp4(weight: Tensor) -> Tensor:
    """decode(encode(weight)); the gradient passes as if that were the identity (straight-through estimator)."""
    with torch.no_grad():
        error = decode(*encode(weight), torch.float32) - weight
    return weight + error


def yarn(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, [S, D/2], both times the concentration factor 0.1·ln(factor) + 1. Source: YaRN, arXiv 2309.00071.

    Between the dimensions that turn 32 times and once within the original context the frequencies go over from
    unchanged to divided by `factor`; the two bounds are not rounded (`truncate` false).
    """
    half, original = shape.head_dim // 2, shape.context / shape.rope_factor

    def dimension(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(shape.rope_theta)

    low, high = max(dimension(32.0), 0.0), min(dimension(1.0), shape.head_dim - 1.0)
    index = torch.arange(half, device=device, dtype=torch.float32)
    frequency = shape.rope_theta ** (-index / half)
    interpolated = ((index - low) / (high - low)).clamp(0, 1)
    frequency = frequency * (1 - interpolated) + frequency / shape.rope_factor * interpolated
    angle = torch.arange(shape.context, device=device, dtype=torch.float32)[:, None] * frequency
    concentration = 0.1 * math.log(shape.rope_factor) + 1
    return angle.cos() * concentration, angle.sin() * concentration


class RMSNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden))
        self.eps = shape.rms_eps

    def forward(self, x_BSH: Tensor) -> Tensor:
        return F.rms_norm(x_BSH.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden)
        self.sinks = nn.Parameter(torch.zeros(shape.heads))

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor, bias_SS: Tensor) -> Tensor:
        """`bias_SS` is 0 where a query may look and -inf where it may not."""
        B, S, _ = x_BSH.shape
        M, Q, D = self.shape.kv_heads, self.shape.heads // self.shape.kv_heads, self.shape.head_dim

        def rotate(x_BSND: Tensor) -> Tensor:
            first, second = x_BSND.float().chunk(2, -1)
            cos, sin = cos_SD[:S, None], sin_SD[:S, None]
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSND.dtype)

        q = rotate(self.q_proj(x_BSH).view(B, S, -1, D)).transpose(1, 2).reshape(B, M, Q * S, D)
        k = rotate(self.k_proj(x_BSH).view(B, S, -1, D)).transpose(1, 2)
        v = self.v_proj(x_BSH).view(B, S, M, D).transpose(1, 2)
        score = (q * D**-0.5 @ k.transpose(2, 3)).float().view(B, M, Q, S, S) + bias_SS
        sink = self.sinks.float().view(1, M, Q, 1, 1).expand(B, M, Q, S, 1)
        # The sink takes its share of the softmax and has no value; it stands first so that the slice stays simple.
        share = torch.cat((sink, score), -1).softmax(-1)[..., 1:]
        y = share.to(v.dtype).reshape(B, M, Q * S, S) @ v
        return self.o_proj(y.view(B, M * Q, S, D).transpose(1, 2).reshape(B, S, -1))


class Experts(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        E, H, N = shape.experts, shape.hidden, 2 * shape.intermediate
        self.gate_up_proj = nn.Parameter(torch.randn(E, N, H) * H**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(E, N))
        self.down_proj = nn.Parameter(torch.randn(E, H, N // 2) * (N * shape.layers) ** -0.5)
        self.down_proj_bias = nn.Parameter(torch.zeros(E, H))
        self.quantized = True  # False reads the matrices as they are, for the comparison with bf16 experts

    def forward(self, x_TH: Tensor, weight_TE: Tensor) -> Tensor:
        """Σ_e weight[t, e] · expert_e(x[t]); weight is zero where expert e was not chosen."""
        read = fake_mxfp4 if self.quantized else Tensor.float
        gate_up, down = read(self.gate_up_proj), read(self.down_proj)
        return (self._dense if x_TH.is_cuda else self._routed)(x_TH, weight_TE, gate_up, down)

    def _dense(self, x_TH: Tensor, weight_TE: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Every expert runs every token: E/K times the arithmetic, but three large products and no synchronisation."""
        experts, hidden, inner = down.shape
        columns = experts * inner
        bias = self.gate_up_proj_bias
        gate = F.linear(x_TH, gate_up[:, 0::2].reshape(columns, hidden), bias[:, 0::2].reshape(columns))
        up = F.linear(x_TH, gate_up[:, 1::2].reshape(columns, hidden), bias[:, 1::2].reshape(columns))
        weighted_TEI = self._activate(gate, up).view(-1, experts, inner) * weight_TE[..., None].to(gate.dtype)
        y_TH = F.linear(weighted_TEI.view(-1, columns), down.transpose(0, 1).reshape(hidden, columns))
        return y_TH + weight_TE.to(y_TH.dtype) @ self.down_proj_bias.to(y_TH.dtype)

    def _routed(self, x_TH: Tensor, weight_TE: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Each expert runs its own tokens."""
        y_TH = torch.zeros_like(x_TH)
        for expert in range(self.shape.experts):
            token_R = weight_TE[:, expert].nonzero().squeeze(1)
            both = F.linear(x_TH[token_R], gate_up[expert], self.gate_up_proj_bias[expert])
            y_RH = F.linear(self._activate(both[:, 0::2], both[:, 1::2]), down[expert], self.down_proj_bias[expert])
            y_TH = y_TH.index_add(0, token_R, y_RH * weight_TE[token_R, expert, None])
        return y_TH

    def _activate(self, gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=self.shape.limit)
        up = up.clamp(-self.shape.limit, self.shape.limit)
        return gate * torch.sigmoid(self.shape.alpha * gate) * (up + 1)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Linear(shape.hidden, shape.experts)
        self.experts = Experts(shape)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, its load-balancing loss, and how many tokens chose each expert, [E].

        Balance: E·Σ_e (share of choices e got) · (mean probability of e); 1 when even. Source: Switch Transformer,
        arXiv 2101.03961, with K choices a token.
        """
        x_TH = x_BSH.view(-1, self.shape.hidden)
        with torch.autocast(x_TH.device.type, enabled=False):  # routing in float32
            logit_TE = F.linear(x_TH.float(), self.router.weight, self.router.bias)
        top_TK, expert_TK = logit_TE.topk(self.shape.top_k)
        weight_TE = torch.zeros_like(logit_TE).scatter(1, expert_TK, top_TK.softmax(-1))
        count_E = torch.zeros_like(logit_TE).scatter(1, expert_TK, 1.0).sum(0)
        balance = self.shape.experts * (count_E / count_E.sum() * logit_TE.softmax(-1).mean(0)).sum()
        return self.experts(x_TH, weight_TE).view_as(x_BSH), balance, count_E


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        self.mlp = MLP(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, bias_SS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BSH = x_BSH + self.dropout(self.self_attn(self.input_layernorm(x_BSH), cos, sin, bias_SS))
        y_BSH, balance, count_E = self.mlp(self.post_attention_layernorm(x_BSH))
        return x_BSH + self.dropout(y_BSH), balance, count_E


class Model(nn.Module):
    """The container that the checkpoint names `model`."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.norm = RMSNorm(shape)


class TrainableGptOss(nn.Module):
    """Windows of tokens → logits. Dropout stands behind the embedding and each branch of the residual stream."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Model(shape, dropout)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.dropout = nn.Dropout(dropout)
        self._tables: dict[torch.device, tuple[Tensor, Tensor, dict[int | None, Tensor]]] = {}
        for name, parameter in self.named_parameters():
            if name.endswith((".bias", "sinks")):
                nn.init.zeros_(parameter)
            elif "embed_tokens" in name:
                nn.init.normal_(parameter, std=0.1)
            elif name.endswith(("router.weight", "lm_head.weight")):  # near zero: all experts, all tokens alike
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("_proj.weight"):
                branch_out = 2 * shape.layers if "o_proj" in name else 1
                nn.init.normal_(parameter, std=(parameter.shape[1] * branch_out) ** -0.5)

    def read_experts_as(self, format: str) -> None:
        """`mxfp4` (as stored) or `bf16` (the matrices as they are)."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.quantized = format == "mxfp4"

    def forward(self, token_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, S, V]; the mean load-balancing loss of the layers; choices of each expert, [layers, E]."""
        cos, sin, bias = self._positions(token_BS.device)
        S = token_BS.shape[1]
        x_BSH = self.dropout(self.model.embed_tokens(token_BS))
        balances, counts = [], []
        for layer, window in zip(self.model.layers, self.shape.windows(), strict=True):
            x_BSH, balance, count_E = layer(x_BSH, cos, sin, bias[window][:S, :S])
            balances.append(balance)
            counts.append(count_E)
        return self.lm_head(self.model.norm(x_BSH)), torch.stack(balances).mean(), torch.stack(counts)

    def _positions(self, device: torch.device) -> tuple[Tensor, Tensor, dict[int | None, Tensor]]:
        if device not in self._tables:
            index = torch.arange(self.shape.context, device=device)
            behind_SS = index[:, None] - index  # 0 is the token itself, which the window includes
            bias = {
                window: torch.zeros(behind_SS.shape, device=device).masked_fill_(
                    (behind_SS < 0) | (behind_SS >= (window or self.shape.context)), -math.inf
                )
                for window in set(self.shape.windows())
            }
            self._tables[device] = (*yarn(self.shape, device), bias)
        return self._tables[device]
