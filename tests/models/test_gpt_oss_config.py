"""config.json as others write it: keys left out, null or under another name mean what they mean in transformers."""

import copy
from typing import Any

import pytest

from epmoe.models.gpt_oss import STANDARD, GptOssConfig
from tests.models.test_gpt_oss import PUBLISHED


def expected(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of it."""
    from transformers import GptOssConfig as Oracle

    theirs = Oracle(**copy.deepcopy(config))
    rope, window = theirs.rope_parameters, theirs.sliding_window
    return {
        "layers": theirs.num_hidden_layers,
        "hidden": theirs.hidden_size,
        "intermediate": theirs.intermediate_size,
        "num_experts": theirs.num_local_experts,
        "top_k": theirs.num_experts_per_tok,
        "vocab": theirs.vocab_size,
        "heads": theirs.num_attention_heads,
        "kv_heads": theirs.num_key_value_heads,
        "head_dim": theirs.head_dim,
        "windows": tuple(window if kind == "sliding_attention" else None for kind in theirs.layer_types),
        "rms_eps": theirs.rms_norm_eps,
        "limit": theirs.swiglu_limit,
        "alpha": theirs.swiglu_alpha,
        "attention_bias": theirs.attention_bias,
        "tied": theirs.tie_word_embeddings,
        "max_positions": theirs.max_position_embeddings,
        "theta": rope["rope_theta"],
        "factor": rope["factor"],
        "truncate": rope["truncate"],
        "original": rope["original_max_position_embeddings"],
    }


def found(config: dict[str, Any]) -> dict[str, Any]:
    ours = GptOssConfig.from_json(copy.deepcopy(config))
    wanted = {name: getattr(ours, name) for name in expected(PUBLISHED) if hasattr(ours, name)}
    rope, activation = ours.rope, ours.activation
    return wanted | {
        "limit": activation.limit,
        "alpha": activation.alpha,
        "theta": rope.theta,
        "factor": rope.factor,
        "truncate": rope.truncate,
        "original": rope.original_max_position,
    }


def without(*names: str, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name not in names} | more


@pytest.mark.parametrize(
    "config",
    [
        PUBLISHED,
        *(without(name) for name in PUBLISHED if name not in ("model_type", "num_hidden_layers")),
        without("num_hidden_layers", "layer_types"),
        without("rope_scaling", "rope_theta"),
        without(*PUBLISHED),
        without("num_local_experts", num_experts=64),
        without(num_experts=32),
        without(layer_types=None),
    ],
    ids=lambda config: ",".join(sorted(set(PUBLISHED) ^ set(config))) or "published",
)
def test_as_transformers_takes_it(config: dict[str, Any]) -> None:
    assert found(config) == expected(config)


def test_all_that_is_standard_is_read() -> None:
    assert set(STANDARD) <= set(PUBLISHED) | {"rope_parameters"}
