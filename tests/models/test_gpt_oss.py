"""gpt-oss's configuration, YaRN table and parameter names; the forward pass itself is test_parity.py's matter."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loading import rank_of
from steps import make_step

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.errors import UserError
from epmoe.formats.bf16 import Bf16Matrix
from epmoe.layers.rotary import Rope
from epmoe.models import MODELS, Family, ModelConfig, Target
from epmoe.models.decoder import Decoder, Limits
from epmoe.models.gpt_oss import GptOss, GptOssConfig
from epmoe.moe.exchange.slots import Slots
from epmoe.moe.experts import ExpertWeights
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.placement import contiguous
from epmoe.moe.router.reference import ReferenceRouter
from epmoe.tables import lookup

YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
PUBLISHED: dict[str, Any] = {  # the architecture keys of openai/gpt-oss-20b's config.json
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN,
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def changed(**changes: Any) -> dict[str, Any]:
    """PUBLISHED with some keys set, or removed where the value is `...`; `rope_scaling__factor` reaches inside."""
    config = copy.deepcopy(PUBLISHED)
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = config[outer[0]] if outer else config
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return config


def new_spelling(**changes: Any) -> dict[str, Any]:
    """The same with `rope_parameters`, as transformers 5 writes it."""
    config = changed(rope_scaling=..., rope_theta=...)
    config["rope_parameters"] = {**YARN, "rope_theta": 150000, **changes}
    return config


def test_published_numbers() -> None:
    """Protects the reading: each field from its key."""
    config = GptOssConfig.from_json(PUBLISHED)
    assert (config.layers, config.hidden, config.intermediate, config.vocab) == (24, 2880, 2880, 201088)
    assert (config.heads, config.kv_heads, config.head_dim) == (64, 8, 64)
    assert (config.num_experts, config.top_k) == (32, 4)
    assert config.windows == (128, None) * 12
    assert (config.activation.alpha, config.activation.limit, config.activation.up_offset) == (1.702, 7.0, 1.0)
    assert config.rms_eps == 1e-5 and config.attention_bias and not config.tied and config.max_positions == 131072
    assert config.rope == Rope(64, 150000.0, 32.0, 32.0, 1.0, 4096, False, 0.1 * math.log(32) + 1)


def test_both_spellings_agree() -> None:
    """Protects checkpoints saved by either generation of transformers, and those that carry both."""
    expected = GptOssConfig.from_json(PUBLISHED)
    assert GptOssConfig.from_json(new_spelling()) == expected
    assert GptOssConfig.from_json(PUBLISHED | new_spelling()) == expected
    assert GptOssConfig.from_json(new_spelling() | {"rope_theta": 150000}) == expected
    assert GptOssConfig.from_json(changed(rope_scaling__rope_type=..., rope_scaling__type="yarn")) == expected


def test_every_number_is_read() -> None:
    """Protects other checkpoints than the published: no field keeps gpt-oss's value when config.json says another."""
    config = GptOssConfig.from_json(
        changed(
            sliding_window=96,
            layer_types=["full_attention"] * 23 + ["sliding_attention"],
            swiglu_alpha=1.5,
            swiglu_limit=5,
            attention_bias=False,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            rope_scaling__beta_fast=16,
            rope_scaling__beta_slow=2,
            rope_scaling__factor=8,
            rope_scaling__truncate=True,
            rope_scaling__original_max_position_embeddings=512,
            rope_scaling__attention_factor=1.25,
        )
    )
    assert config.windows == (None,) * 23 + (96,)
    assert (config.activation.alpha, config.activation.limit) == (1.5, 5.0)
    assert not config.attention_bias and config.tied and config.rms_eps == 1e-6
    assert config.rope == Rope(64, 10000.0, 8.0, 16.0, 2.0, 512, True, 1.25)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, 0.1 * math.log(32) + 1),
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.7, "mscale_all_dim": 1.3}, (0.07 * math.log(32) + 1) / (0.13 * math.log(32) + 1)),
        ({"mscale": 0.7}, 0.1 * math.log(32) + 1),
    ],
)
def test_concentration(extra: dict[str, float], expected: float) -> None:
    """Protects the factor on cos and sin: from `factor`, unless the configuration gives it."""
    assert GptOssConfig.from_json(new_spelling(**extra)).rope.concentration == pytest.approx(expected, rel=1e-12)


REQUIRED = [  # the rest has a standard value (tests/models/test_gpt_oss_config.py)
    "rope_scaling__factor",
    "rope_scaling__original_max_position_embeddings",
    "rope_scaling__rope_type",
]


@pytest.mark.parametrize("value", [..., None], ids=["absent", "null"])
@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys_are_named(key: str, value: Any) -> None:
    """Protects users of incomplete checkpoints: the message names the key."""
    with pytest.raises(UserError, match=rf"config\.json: .*\b{key.split('__')[-1]}\b.* is missing"):
        GptOssConfig.from_json(changed(**{key: value}))


WRONG = [
    ({"hidden_size": "2880"}, "hidden_size='2880'"),
    ({"hidden_size": True}, "hidden_size=True"),
    ({"vocab_size": 0}, "vocab_size=0"),
    ({"vocab_size": 2**62}, "vocab_size=4611686018427387904 must be a whole number above 0 and below 2^31"),
    ({"rms_norm_eps": 10**400}, "must be a number from 1.18e-38 to 3.4e+38, as float32 holds them"),
    ({"rms_norm_eps": 1e-50}, "rms_norm_eps=1e-50 must be a number from 1.18e-38"),
    ({"swiglu_limit": 1e308}, "swiglu_limit=1e+308 must be a number from"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"swiglu_limit": -7.0}, "swiglu_limit=-7.0"),
    ({"attention_bias": "yes"}, "attention_bias='yes'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"head_dim": 63}, "head_dim=63"),
    ({"num_experts": 64}, "num_local_experts=32 contradicts num_experts=64"),
    ({"num_key_value_heads": 7}, "num_key_value_heads=7 must divide num_attention_heads=64"),
    ({"num_experts_per_tok": 33, "experts_per_token": 33}, "num_experts_per_tok=33 exceeds num_local_experts=32"),
    ({"experts_per_token": 2}, "num_experts_per_tok=4 contradicts experts_per_token=2"),
    ({"layer_types": "sliding_attention"}, "layer_types='sliding_attention' must be a list"),
    ({"num_hidden_layers": 23}, "layer_types has 24 entries for num_hidden_layers=23"),
    ({"layer_types": ["full_attention"] * 23 + ["chunked_attention"]}, "layer_types has 'chunked_attention'"),
    ({"sliding_window": 0}, "sliding_window=0"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an object"),
    ({"rope_scaling__rope_type": "llama3"}, "rope_scaling.rope_type='llama3' is not supported"),
    ({"rope_scaling__truncate": 0}, "rope_scaling.truncate=0"),
    ({"rope_scaling__factor": "32"}, "rope_scaling.factor='32'"),
    ({"rope_scaling__partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor=0.5"),
    ({"rope_theta": 1}, "rope_theta=1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ({"rope_parameters": {"factor": 16.0}}, "rope_parameters.factor=16.0 contradicts rope_scaling.factor=32.0"),
    ({"rope_parameters": {"rope_theta": 10000}}, "rope_theta=150000 contradicts rope_parameters.rope_theta=10000"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_and_contradictory_keys_are_named(changes: dict[str, Any], message: str) -> None:
    """Protects against a model that runs with a number nobody meant: one line with the key and its value."""
    with pytest.raises(UserError) as caught:
        GptOssConfig.from_json(changed(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def small(**changes: Any) -> GptOssConfig:
    base = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "vocab_size": 40,
    }
    return GptOssConfig.from_json(changed(**base | changes))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": False}], ids=str)
def test_every_parameter_has_one_name(changes: dict[str, Any]) -> None:
    """Protects loading: the map covers all parameters, none twice, and follows `tied` and `attention_bias`."""
    config = small(**changes)
    with torch.device("meta"):
        model = GptOss(config)
    names = model.shared_tensors()
    assert {target.parameter for target in names.values()} == {name for name, _ in model.named_parameters()}
    assert len(set(names.values())) == len(names)
    rows = [names[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert rows == [Target("layers.1.attention.qkv.weight", each) for each in ((0, 32), (32, 48), (48, 64))]
    assert ("lm_head.weight" in names) == (not config.tied)
    assert ("model.layers.1.self_attn.o_proj.bias" in names) == config.attention_bias
    assert names["model.layers.1.mlp.router.bias"] == Target("layers.1.moe.router.bias")
    assert not list(model.buffers())  # nothing that the loader could forget to assign
    assert GptOss.expert_names(1)[3] == "model.layers.1.mlp.experts.down_proj_bias"


def build(config: GptOssConfig) -> GptOss:
    """A model with random weights, assigned the way the loader does: built on meta, then materialised."""
    with torch.device("meta"):
        model = GptOss(config)
    torch.manual_seed(0)
    values = {name: torch.randn(parameter.shape) * 0.3 for name, parameter in model.named_parameters()}
    model.load_state_dict(values, assign=True)
    experts, inner, hidden = config.num_experts, config.intermediate, config.hidden
    for moe in model.moe_layers():
        weights = ExpertWeights(
            Bf16Matrix.quantize(torch.randn(experts, 2 * inner, hidden) * 0.1),
            torch.randn(experts, 2 * inner) * 0.1,
            Bf16Matrix.quantize(torch.randn(experts, hidden, inner) * 0.1),
            torch.randn(experts, hidden) * 0.1,
        )
        here = contiguous(experts, 1).here(0, torch.device("cpu"))
        packed = ReferenceExperts.pack(weights, config.activation)
        moe.install(packed, ReferenceRouter(), Slots(rank_of(0, 1)), here)
    return model.requires_grad_(False).eval()


def cache_of(config: GptOssConfig) -> Cache:
    sizes: dict[str, Any] = {"tokens": 64, "sequences": 3, "page": 4}
    return Cache(CacheConfig(config.windows, config.kv_heads, config.head_dim, **sizes, dtype=torch.float32), "cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_the_wanted_rows(tied: bool) -> None:
    """Protects the output: rows and their order as asked, float32, and chunks of the vocabulary are invisible."""
    config = small(tie_word_embeddings=tied)
    model = build(config)

    def logits(rows: list[int] | None) -> torch.Tensor:
        cache = cache_of(config)
        a, b = cache.admit(20), cache.admit(20)
        step = make_step([(a, list(range(9)), 0), (b, [5], 0)])
        if rows is not None:
            step = replace(step, output_O=torch.tensor(rows, dtype=torch.int64))
        return model(step, cache)

    whole = logits(None)
    assert whole.shape == (10, 40) and whole.dtype == torch.float32
    torch.testing.assert_close(logits([9, 3]), whole[[9, 3]])
    assert logits([]).shape == (0, 40)
    model.limits = Limits(vocab_chunk=7)
    torch.testing.assert_close(logits(None), whole)
    assert torch.equal(logits(None), logits(None))  # deterministic


@pytest.mark.parametrize("least", [1000, 1], ids=["whole", "halves"])
def test_the_last_layer_works_for_the_wanted_rows_only(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a prefill's speed; and later steps, which find the keys and values of all tokens in the cache."""
    config = small()
    model = build(config)
    monkeypatch.setattr(Decoder, "halves_from", least)  # as on several ranks
    tokens: list[int] = []
    for moe in model.moe_layers():
        moe.register_forward_pre_hook(lambda module, arguments: tokens.append(len(arguments[0])))

    def logits(wanted: list[int]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        cache = cache_of(config)
        handle = cache.admit(20)
        step = make_step([(handle, list(range(8)), 0)])
        first = model(replace(step, output_O=torch.tensor(wanted, dtype=torch.int64)), cache)
        worked = tokens.copy()
        tokens.clear()
        second = model(make_step([(handle, [7, 3], 8)]), cache)
        tokens.clear()
        return first, worked, second

    for wanted in ([7], [], [2, 6, 0]):
        first, worked, second = logits(wanted)
        halves = 2 if least == 1 else 1
        assert worked == [8 // halves] * halves * (config.layers - 1) + [len(wanted)] * halves
        every, _, after = logits(list(range(8)))
        torch.testing.assert_close(first, every[wanted])
        assert torch.equal(second, after)


def test_prompt_rows_do_not_see_the_future() -> None:
    """Protects causality through all layers: a later token changes no earlier logits."""
    config = small()
    model = build(config)
    rows = []
    for last in (1, 2):
        cache = cache_of(config)
        rows.append(model(make_step([(cache.admit(20), [3, 1, 4, 1, 5, 9, last], 0)]), cache))
    assert torch.equal(rows[0][:-1], rows[1][:-1]) and not torch.equal(rows[0][-1], rows[1][-1])


def test_the_table_names_it() -> None:
    """Protects the lookup: model_type of config.json → the class with all that a model offers (mypy looks at that)."""
    family: type[Family] = GptOss
    config: type[ModelConfig] = GptOssConfig
    assert lookup("model_type", MODELS, "gpt_oss") is family and family.Config is config


def test_decode_step_equals_step() -> None:
    """Protects the step that fits a CUDA graph: the logits of a Step bit for bit, with and without filling rows."""
    config = small()
    model = build(config)
    both: list[list[torch.Tensor]] = []
    for filled in (None, 0, 1):
        cache = cache_of(config)
        a, b, out = cache.admit(20), cache.admit(20), []
        model(make_step([(a, list(range(9)), 0), (b, [5, 3], 0)]), cache)
        for turn in range(5):
            if filled is None:
                out.append(model(make_step([(a, [turn], 9 + turn), (b, [7], 2 + turn)]), cache))
                continue
            spare = [cache.spare] * filled
            token_B, position_B = torch.tensor([turn, 7, *spare]), torch.tensor([9 + turn, 2 + turn, *[0] * filled])
            logits_BV = model(Step(token_B, position_B, torch.tensor([a, b, *spare])), cache)
            assert logits_BV.shape == (2 + filled, config.vocab) and logits_BV.dtype == torch.float32
            out.append(logits_BV[:2])
        both.append(out)
    for step, decode, filled_up in zip(*both, strict=True):
        assert torch.equal(step, decode)
        assert torch.equal(filled_up, step)
