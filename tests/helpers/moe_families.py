"""Tiny models of transformers' families with experts, random weights, for tests of epmoe/integrations/transformers.

Six experts, so that 1, 2 and 3 ranks divide them, as transformers asks.
"""

from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch

SHARED = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {  # model_type → what its config has beyond SHARED
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3_moe": {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 6},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 6},
    "glm4_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 6,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 6,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "olmoe": {"intermediate_size": 32, "num_experts": 6},
}
IDS = torch.tensor([[3, 1, 41, 59, 26, 53, 58, 9, 7, 32], [38, 46, 2, 6, 43, 38, 32, 7, 9, 50]])


def config_of(family: str, **changes: Any) -> Any:
    """A tiny config of the family."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SHARED, **FAMILIES[family], **changes})


def make(family: str, **changes: Any) -> Any:
    """A tiny model of the family, in float32, every weight random: routers disagree, biases count."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def saved(model: Any, folder: Path) -> Path:
    """The folder, with the model in it."""
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    """from_pretrained, in float32, with transformers' eager experts unless another implementation is asked for."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "experts_implementation": "eager", **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """[B, T, V] in float32."""
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.float()
    return found


def tokens(model: Any, count: int = 4) -> list[list[int]]:
    """What `generate` says greedily."""
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=count, do_sample=False)
    return out[:, IDS.shape[1] :].tolist()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's files."""
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"


def examples() -> list[str]:
    """The pieces of Python of docs/transformers.md."""
    return [block.partition("```")[0] for block in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]]


def printed(text: str) -> str:
    """What such a piece prints, run in this process, where transformers has been imported already."""
    with redirect_stdout(StringIO()) as out:
        exec(compile(text, str(PAGE), "exec"), {"__name__": "__main__"})
    return out.getvalue()


@dataclass(frozen=True)
class Ran:
    """What a checkpoint's model says with epmoe's experts."""

    packed: torch.Tensor  # logits of EpmoeConfig
    plain: torch.Tensor  # of experts_implementation="epmoe"
    tokens: list[list[int]]  # of EpmoeConfig

    def differences(self, other: "Ran") -> list[str]:
        """What is not the same, bit for bit."""
        same = {
            "packed": torch.equal(self.packed, other.packed),
            "plain": torch.equal(self.plain, other.plain),
            "tokens": self.tokens == other.tokens,
        }
        return [name for name, equal in same.items() if not equal]


def run(path: Path, out: Path, **options: Any) -> Ran:
    """Both models of a checkpoint; each is saved again under `out`."""
    from epmoe.integrations.transformers import EpmoeConfig

    packed = load(path, quantization_config=EpmoeConfig(), **options)
    plain = load(path, experts_implementation="epmoe", **options)
    ran = Ran(logits(packed), logits(plain), tokens(packed))
    packed.save_pretrained(out / "packed")
    plain.save_pretrained(out / "plain")
    return ran
