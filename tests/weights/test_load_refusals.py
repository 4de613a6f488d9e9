"""Load: what contradicts config.json, the tables or the memory is refused by one line, before any weight is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from loading import EXPERTS, load_rank, rank_of, rewrite_config, rewrite_tensors

from epmoe.errors import UserError
from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.checkpoint import INDEX, Checkpoint
from epmoe.weights.load import load
from epmoe.weights.synthetic import make_checkpoint


@dataclass(frozen=True)
class Case:
    name: str
    spoil: Callable[[Path], object]
    says: str  # a regular expression of the message


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda path: rewrite_config(path, **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda path: rewrite_tensors(path, change)


ROUTER, BLOCKS = "model.layers.1.mlp.router.weight", EXPERTS.format(1) + "down_proj_blocks"
CASES = [
    Case(
        "model_type unknown", config(model_type="llama"), "config.json: model_type='llama' is unknown; known: gpt_oss"
    ),
    Case("model_type missing", config(model_type=None), "has no model_type"),
    Case(
        "more experts",
        config(num_local_experts=7),
        r"router.weight has shape \[5, 96\], .*num_local_experts=7.* gives \[7, 96\]",
    ),
    Case(
        "fewer experts",
        config(num_local_experts=4),
        r"router.weight has shape \[5, 96\], .*num_local_experts=4.* gives \[4, 96\]",
    ),
    Case(
        "more layers",
        config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"lacks model.layers.2\..* and \d+ more",
    ),
    Case(
        "fewer layers",
        config(num_hidden_layers=1, layer_types=["full_attention"]),
        r"holds model.layers.1\..* and \d+ more",
    ),
    Case(
        "other vocabulary",
        config(vocab_size=321),
        r"embed_tokens.weight has shape \[320, 96\].*vocab_size=321.*\[321, 96\]",
    ),
    Case("other hidden", config(hidden_size=128), r"has shape \[320, 96\].*hidden_size=128"),
    Case(
        "other intermediate",
        config(intermediate_size=96),
        r"gate_up_proj_blocks has shape \[5, 128, 3, 16\].*\[5, 192, 3, 16\]",
    ),
    Case("hidden no multiple of 32", config(hidden_size=100), "gate_up_proj: 100 columns cannot be stored in mxfp4"),
    Case(
        "tied although not",
        config(tie_word_embeddings=True),
        "holds lm_head.weight, which a model of its config.json does not have",
    ),
    Case("tensor missing", tensors(lambda t: t.pop(ROUTER)), f"lacks {ROUTER}, which"),
    Case("expert tensor missing", tensors(lambda t: t.pop(BLOCKS)), f"lacks {BLOCKS}, which"),
    Case("tensor too many", tensors(lambda t: t.update(more=torch.zeros(1))), "model.safetensors holds more, which"),
    Case(
        "wrong rank",
        tensors(lambda t: t.update({ROUTER: t[ROUTER][None].clone()})),
        r"has shape \[1, 5, 96\].*gives \[5, 96\]",
    ),
    Case(
        "wrong dtype",
        tensors(lambda t: t.update({ROUTER: t[ROUTER].to(torch.int64)})),
        f"{ROUTER} has dtype int64, expected bfloat16 or",
    ),
    Case(
        "wrong dtype of blocks",
        tensors(lambda t: t.update({BLOCKS: t[BLOCKS].view(torch.int8)})),
        f"{BLOCKS} has dtype int8, expected uint8",
    ),
    Case(
        "no quantization_config",
        config(quantization_config=None),
        "gate_up_proj_blocks, so mxfp4 experts, but .* says bf16",
    ),
    Case(
        "quant_method unknown",
        config(quantization_config={"quant_method": "awq"}),
        "quant_method='awq' is unknown; known: mxfp4, bf16",
    ),
    Case(
        "sizes that fill a machine", config(vocab_size=2**31 - 32, hidden_size=2**31 - 32), "hidden size is 2147483616,"
    ),
    Case("heads of half a table of 16 GB", config(head_dim=2**31 - 2), "times head size is 4294967292, which the"),
    Case(
        "layers without end",
        config(num_hidden_layers=10**5, layer_types=["full_attention"] * 10**5),
        "number of layers is 100000, which the checkpoint's 41 tensors",
    ),
    Case(
        "patterns without end",
        config(quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["a*"] * 1001}),
        "modules_to_not_convert has more than 1000 entries",
    ),
    Case(
        "quantization_config is text",
        config(quantization_config="mxfp4"),
        "quantization_config='mxfp4' must be an object",
    ),
    Case(
        "list of modules is text",
        config(quantization_config={"modules_to_not_convert": "a"}),
        "modules_to_not_convert='a' must be a list of strings",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_contradiction_is_refused_before_any_weight_is_read(case: Case, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    case.spoil(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    headers = checkpoint.bytes_read
    with pytest.raises(UserError, match=case.says) as caught:
        load(checkpoint, rank_of(0, 1))
    assert "\n" not in str(caught.value) and checkpoint.bytes_read == headers


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Bytes changed, lost, inserted in a JSON file or a header: one line or nothing, never another exception."""
    make_checkpoint(tmp_path, shards=2)
    whole = {file: file.read_bytes() for file in sorted(tmp_path.iterdir())}
    rng, refused = Random(0), 0
    for _ in range(300):
        file = rng.choice(list(whole))
        data = bytearray(whole[file])
        at = rng.randrange(min(len(data), 3000))
        data[at : at + rng.choice([0, 1, 30])] = rng.choice(
            [b"", b"\xff", b'"', b"[", b"null", b"-", 30 * b"9", b"1e999"]
        )
        file.write_bytes(data)
        try:
            checkpoint = Checkpoint.open(tmp_path)
            Tokenizer.of(checkpoint)
            load(checkpoint, rank_of(0, 1))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        file.write_bytes(whole[file])
    assert refused > 200


def test_bf16_experts_under_an_mxfp4_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype_experts="bf16")
    rewrite_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UserError, match=r"gate_up_proj, so bf16 experts, but .* says mxfp4"):
        load_rank(tmp_path)


@pytest.mark.parametrize("key", ["quant", "experts", "router", "combine", "placement", "dtype"])
def test_an_unknown_name_lists_the_known_ones(key: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    asked: dict[str, Any] = {key: "nope"}
    with pytest.raises(UserError, match=f"{key}='nope' is unknown; known: "):
        load_rank(tmp_path, **asked)


def test_more_ranks_than_experts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(UserError, match="6 expert ranks cannot share 5 experts"):
        load_rank(tmp_path, rank=0, size=6)


def test_quantising_sizes_that_mxfp4_cannot_hold(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype_experts="bf16", intermediate=40)
    load_rank(tmp_path)
    with pytest.raises(UserError, match="down_proj: 40 columns"):
        load_rank(tmp_path, quant="mxfp4")


def test_too_little_memory_names_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setattr("epmoe.weights.load.free_bytes", lambda device: 1000)
    checkpoint = Checkpoint.open(tmp_path)
    headers = checkpoint.bytes_read
    with pytest.raises(
        UserError, match=r"too little memory on cpu: this rank's weights need [\d,]{7} bytes .* 1,000 are free"
    ):
        load(checkpoint, rank_of(0, 1))
    assert checkpoint.bytes_read == headers


def test_a_shard_lost_after_opening(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    checkpoint = Checkpoint.open(tmp_path)
    assert (tmp_path / INDEX).exists()
    checkpoint.files[1].unlink()
    with pytest.raises(UserError, match=r"00002.*cannot be (opened|read).*No such file"):
        load(checkpoint, rank_of(0, 1))
