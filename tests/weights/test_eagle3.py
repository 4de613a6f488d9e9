"""Loading an EAGLE3 head: what a good one becomes, and that every damaged one is refused by one line."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import RandomHead, Tensors, config_json, target_config, write_head
from torch import nn

from epmoe.errors import UserError
from epmoe.layers.rotary import Llama3Rope, Rope
from epmoe.models.eagle3 import HeadConfig
from epmoe.weights.eagle3 import load_head, open_head

HEAD = RandomHead()
MODEL = target_config(HEAD)
IDS = "eagle_aux_hidden_state_layer_ids"


def target(head: RandomHead = HEAD, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    return nn.Embedding(head.vocab, head.hidden, _weight=torch.randn(head.vocab, head.hidden).to(dtype))


def test_every_number_is_read(tmp_path: Path) -> None:
    write_head(tmp_path, replace(HEAD, attention_bias=True, norm_before_residual=True), rms_norm_eps=1e-4)
    assert open_head(tmp_path, MODEL) == HeadConfig(
        hidden=48, intermediate=80, heads=4, kv_heads=2, head_dim=16, vocab=120, draft_vocab=40, layers=(1, 3, 5),
        rope=Rope.plain(16, 500.0), rms_eps=1e-4, attention_bias=True, norm_before_residual=True,
    )  # fmt: skip


def test_what_a_llama_leaves_out() -> None:
    """Heads of SpecForge say little: the rest is a Llama's."""
    left = ("attention_bias", "draft_vocab_size", "mlp_bias", "norm_before_residual", "rope_scaling", "rope_theta",
            "eagle_config", "num_key_value_heads", "head_dim")  # fmt: skip
    keys = {name: value for name, value in config_json(HEAD).items() if name not in left}
    config = HeadConfig.from_json(keys, MODEL)
    assert (config.draft_vocab, config.kv_heads, config.head_dim) == (120, 4, 12)
    assert config.rope == Rope.plain(12, 10000.0) and not config.attention_bias and not config.norm_before_residual
    assert config.layers == (2, 4, 5)  # of 8


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"eagle_config": {IDS: [1, 2, 6]}}, (2, 3, 7)),  # outputs of layers, so the next ones' inputs
        ({"eagle_config": {IDS: [-1, 2, 6]}}, (0, 3, 7)),
        ({IDS: [0, 3, 7]}, (0, 3, 7)),  # inputs of layers
        ({IDS: [1, 2, 3], "eagle_config": {IDS: [4, 5, 6]}}, (1, 2, 3)),
        ({"eagle_config": {IDS: []}}, (2, 4, 5)),
    ],
)
def test_where_features_come_from(keys: dict[str, Any], layers: tuple[int, ...]) -> None:
    assert HeadConfig.from_json(config_json(HEAD) | keys, MODEL).layers == layers


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def test_rotary_positions() -> None:
    def rope(**keys: Any) -> Rope:
        return HeadConfig.from_json(config_json(HEAD) | keys, MODEL).rope

    assert rope(rope_scaling={"rope_type": "default", "rope_theta": 500}) == Rope.plain(16, 500.0)
    assert rope(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 7e4}) == Rope.plain(16, 7e4)
    assert rope(rope_scaling=LLAMA3) == Llama3Rope(16, 500.0, 8.0, 4.0, 1.0, 8192, False, 1.0)
    yarn = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 2048, "attention_factor": 1.0}
    assert rope(rope_scaling=yarn) == Rope(16, 500.0, 32.0, 32.0, 1.0, 2048, True, 1.0)


@pytest.mark.parametrize("name", ["midlayer.", "layers.0."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_as_stored(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each tensor in its place, cast; the embedding is the target's own memory."""
    head = replace(HEAD, layer_name=name, attention_bias=True)
    stored = write_head(tmp_path, head, lambda t: t.update({f"{name}self_attn.rotary_emb.inv_freq": torch.rand(8)}))
    shared = target(dtype=dtype)
    loaded = load_head(tmp_path, open_head(tmp_path, MODEL), shared, "cpu", dtype)
    assert loaded.embedding is shared and not loaded.training
    assert all(not each.requires_grad and each.dtype == dtype for each in loaded.parameters())
    parts = {"fc": "fc.weight", "norm": "norm.weight", "unembedding": "lm_head.weight"}
    parts |= {"token_norm": f"{name}input_layernorm.weight", "feature_norm": f"{name}hidden_norm.weight"}
    parts |= {"mlp_norm": f"{name}post_attention_layernorm.weight", "down": f"{name}mlp.down_proj.weight"}
    for own, there in parts.items():
        assert torch.equal(loaded.get_parameter(f"{own}.weight"), stored[there].to(dtype)), own
    for kind in ("weight", "bias"):
        qkv = [stored[f"{name}self_attn.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(loaded.get_parameter(f"qkv.{kind}"), torch.cat(qkv).to(dtype))
        assert torch.equal(loaded.get_parameter(f"o.{kind}"), stored[f"{name}self_attn.o_proj.{kind}"].to(dtype))
    gate_up = [stored[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(loaded.gate_up.weight, torch.cat(gate_up).to(dtype))
    assert torch.equal(loaded.target_D[:40], torch.arange(40) + stored["d2t"])


def test_its_own_embedding(tmp_path: Path) -> None:
    stored = write_head(tmp_path, replace(HEAD, own_embedding=True))
    loaded = load_head(tmp_path, open_head(tmp_path, MODEL), target(), "cpu", torch.float32)
    assert torch.equal(loaded.embedding.weight, stored["embed_tokens.weight"])


def test_the_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    head = replace(HEAD, draft_vocab=HEAD.vocab)
    write_head(tmp_path, head, lambda t: (t.pop("d2t"), t.pop("t2d")))
    loaded = load_head(tmp_path, open_head(tmp_path, MODEL), target(), "cpu", torch.float32)
    assert torch.equal(loaded.target_D[:120], torch.arange(120))


@dataclass(frozen=True)
class Case:
    name: str
    says: str  # a regular expression of the message
    keys: dict[str, Any] | None = None  # of config.json
    tensors: Callable[[Tensors], object] | None = None
    file: Callable[[Path], object] | None = None


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def eagle(ids: object) -> dict[str, Any]:
    return {"eagle_config": {IDS: ids}}


Q, DOWN = "midlayer.self_attn.q_proj.weight", "midlayer.mlp.down_proj.weight"
CASES = [
    Case("no config.json", "no config.json", file=lambda path: (path / "config.json").unlink()),
    Case("no JSON", "not valid JSON", file=lambda path: (path / "config.json").write_text("{")),
    Case(
        "another architecture",
        r"architectures=\['LlamaForCausalLM'\] is no EAGLE3",
        {"architectures": ["LlamaForCausalLM"]},
    ),
    Case("no architecture", "architectures is missing", {"architectures": ...}),
    Case("two layers", "num_hidden_layers=2 is not supported", {"num_hidden_layers": 2}),
    Case("another activation", "hidden_act='gelu' is not supported", {"hidden_act": "gelu"}),
    Case("biases of the mlp", "mlp_bias=True is not supported", {"mlp_bias": True}),
    Case("no features", "use_aux_hidden_state=False is not", {"eagle_config": {"use_aux_hidden_state": False}}),
    Case("eagle_config no object", "eagle_config=3 must be an object", {"eagle_config": 3}),
    Case("another model's hidden", "hidden_size=64 is not the model's, 48", {"hidden_size": 64}),
    Case("another model's features", "target_hidden_size=64 is not the model's, 48", {"target_hidden_size": 64}),
    Case("another model's vocabulary", "vocab_size=121 is not the model's, 120", {"vocab_size": 121}),
    Case("a draft vocabulary too large", "draft_vocab_size=121 exceeds", {"draft_vocab_size": 121}),
    Case("heads that do not divide", "num_key_value_heads=3 must divide", {"num_key_value_heads": 3}),
    Case("an odd head", "head_dim=15 must be even", {"head_dim": 15}),
    Case("an absurd head", "head_dim=1073741824 must be even and at most", {"head_dim": 2**30}),
    Case("a layer too far", r"eagle_aux_hidden_state_layer_ids=\[1, 3, 7\].*from -1 to 6", eagle([1, 3, 7])),
    Case(
        "an input too far", r"layer_ids=\[1, 3, 8\] must be layers of the model, which has 8.*0 to 7", {IDS: [1, 3, 8]}
    ),
    Case("a negative layer", r"=\[-2, 3, 6\] must be layers", eagle([-2, 3, 6])),
    Case("two layers' features", r"=\[1, 2\] must be a list of 3", eagle([1, 2])),
    Case("layers in words", "must be a list of 3", eagle(["1", "2", "3"])),
    Case("layers out of order", "must ascend", eagle([3, 1, 5])),
    Case("linear rotary scaling", "rope_type='linear' is not supported", {"rope_scaling": {"rope_type": "linear"}}),
    Case("rotary scaling no object", "rope_scaling=2 must be an object", {"rope_scaling": 2}),
    Case(
        "Llama 3 the wrong way round",
        "low_freq_factor=5 must be below",
        {"rope_scaling": LLAMA3 | {"low_freq_factor": 5}},
    ),
    Case("Llama 3 without its factor", "factor is missing", {"rope_scaling": {**LLAMA3, "factor": None}}),
    Case("rope_theta 1", "rope_theta=1 must be above 1", {"rope_theta": 1}),
    Case(
        "another intermediate", r"down_proj.weight has shape \[48, 80\], .* gives \[48, 81\]", {"intermediate_size": 81}
    ),
    Case(
        "another draft vocabulary",
        r"lm_head.weight has shape \[40, 48\], .* gives \[39, 48\]",
        {"draft_vocab_size": 39},
    ),
    Case("biases that lack", "lacks midlayer.self_attn.q_proj.bias and 3 more", {"attention_bias": True}),
    Case("a tensor lacks", f"lacks {DOWN}, which", tensors=lambda t: t.pop(DOWN)),
    Case("d2t lacks", "lacks d2t, which", tensors=lambda t: t.pop("d2t")),
    Case("a tensor too many", "holds more, which a head", tensors=lambda t: t.update(more=torch.zeros(1))),
    Case(
        "both names of the layer",
        "lacks layers.0.",
        tensors=lambda t: t.update({Q.replace("midlayer", "layers.0"): t.pop(Q)}),
    ),
    Case(
        "q of H columns",
        r"q_proj.weight has shape \[64, 48\], .*\[64, 96\]",
        tensors=lambda t: t.update({Q: t[Q][:, 48:]}),
    ),
    Case(
        "an embedding of another size",
        r"embed_tokens.weight has shape \[119, 48\]",
        tensors=lambda t: t.update({"embed_tokens.weight": torch.zeros(119, 48)}),
    ),
    Case("d2t in int32", "d2t has dtype int32, expected int64", tensors=lambda t: t.update(d2t=t["d2t"].int())),
    Case("t2d too short", r"t2d has shape \[119\]", tensors=lambda t: t.update(t2d=t["t2d"][1:])),
    Case(
        "weights of whole numbers",
        "has dtype int64, expected bfloat16",
        tensors=lambda t: t.update({DOWN: t[DOWN].long()}),
    ),
    Case("a cut file", "truncated", file=lambda path: cut(path / "model.safetensors")),
    Case("a pickle", "pytorch_model.bin, which is not read: convert it", file=pickled),
    Case("no weights", "holds no safetensors weights", file=lambda path: (path / "model.safetensors").unlink()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damaged(case: Case, tmp_path: Path) -> None:
    write_head(tmp_path, HEAD, case.tensors, **(case.keys or {}))
    if case.file is not None:
        case.file(tmp_path)
    with pytest.raises(UserError, match=case.says) as error:
        open_head(tmp_path, MODEL)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_model_of_few_layers() -> None:
    """Where config.json does not say which layers, there must be the usual ones."""
    keys = {name: value for name, value in config_json(HEAD).items() if name != "eagle_config"}
    with pytest.raises(UserError, match="the model's 6 layers are too few"):
        HeadConfig.from_json(keys, target_config(HEAD, layers=6))
    assert HeadConfig.from_json(keys, target_config(HEAD, layers=7)).layers == (2, 3, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["d2t"].add_(100), "d2t gives draft id .*end at 119"),
        (lambda t: t["d2t"].sub_(60), "d2t gives draft id 0 the id -"),
        (lambda t: t["t2d"].logical_not_(), "d2t names ids that t2d does not"),
    ],
)
def test_ids_that_are_none_of_the_models(change: Callable[[Tensors], object], says: str, tmp_path: Path) -> None:
    write_head(tmp_path, HEAD, change)
    config = open_head(tmp_path, MODEL)
    with pytest.raises(UserError, match=says):
        load_head(tmp_path, config, target(), "cpu", torch.float32)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_head(tmp_path / "nowhere", MODEL)
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UserError, match="is a file, not"):
        open_head(tmp_path / "file", MODEL)
