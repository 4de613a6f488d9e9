"""Checkpoints as others write them: run as they are, or one line that says what is there and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load_rank, rewrite_config, rewrite_tensors, weights_of
from safetensors.torch import load_file, save_file

from epmoe.errors import UserError, warn
from epmoe.weights.checkpoint import INDEX, SINGLE, WHOLE, Checkpoint
from epmoe.weights.hub import missing
from epmoe.weights.synthetic import make_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 27868174\n"


def written(path: Path, name: str, text: str = "{}") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(text)
    return path / name


def lost(path: Path, name: str) -> Path:
    (path / name).unlink()
    return path / name


def renamed(path: Path, new: Callable[[str], str]) -> None:
    tensors = {new(name): value.clone() for name, value in load_file(path / SINGLE).items()}
    save_file(tensors, path / SINGLE)


def original(path: Path) -> None:
    """OpenAI's own: no model_type, other names."""
    rewrite_config(path, model_type=None)
    renamed(path, lambda name: name.replace("model.layers.", "block."))


def one_by_one(path: Path) -> None:
    def split(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            stem, leaf = name.split(".experts.")
            for expert, value in enumerate(tensors.pop(name)):
                tensors[f"{stem}.experts.{expert}.{leaf}"] = value.clone()

    rewrite_tensors(path, split)


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a LoRA adapter": (
        lambda p: (p / "config.json").rename(p / "adapter_config.json"),
        "holds a LoRA adapter .* merge it into its base model and give the result",
    ),
    "an adapter beside the model": (
        lambda p: written(p, "adapter_config.json", '{"base_model_name_or_path": "openai/gpt-oss-20b"}'),
        "holds a LoRA adapter .* merge it into openai/gpt-oss-20b and give the result",
    ),
    "original/ alone": (
        lambda p: (written(p / "original", "config.json"), lost(p, "config.json")),
        "has no config.json but original/, OpenAI's own layout: download the files beside",
    ),
    "within original/": (
        original,
        r"is OpenAI's own layout \(a repository's folder original/\): give the folder above",
    ),
    "GGUF": (
        lambda p: (written(p, "model-q4.gguf"), lost(p, "config.json")),
        "holds model-q4.gguf, a GGUF file, which is not read: download the safetensors",
    ),
    "experts one by one": (one_by_one, r"holds model.layers.0.mlp.experts.0.\S+, so experts one by one; .* convert it"),
    "config.json is a pointer": (lambda p: written(p, "config.json", POINTER), "config.json is a git-lfs pointer"),
    "weights are a pointer": (lambda p: written(p, SINGLE, POINTER), "model.safetensors is a git-lfs pointer"),
    "the index is a pointer": (
        lambda p: (lost(p, SINGLE), written(p, INDEX, POINTER)),
        "index.json is a git-lfs pointer",
    ),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_there_is_told(what: str, tmp_path: Path) -> None:
    spoil, says = STRANGE[what]
    spoil(make_checkpoint(tmp_path))
    with pytest.raises(UserError, match=says) as told:
        load_rank(tmp_path)
    assert str(tmp_path) in str(told.value)


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / WHOLE)
    assert Checkpoint.open(tmp_path).files == (tmp_path / WHOLE,) and missing(tmp_path) == []
    shutil.copy(tmp_path / WHOLE, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"no model.safetensors.index.json: download the index too"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_experts_in_another_dtype_are_rounded_and_that_is_told(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warn.cache_clear()
    make_checkpoint(tmp_path, dtype_experts="bf16")
    fine = torch.randn(5, 96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    name = "model.layers.0.mlp.experts.gate_up_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] = fine.clone() if key == name else tensors[key].to(dtype)

    rewrite_tensors(tmp_path, change)
    model, report = load_rank(tmp_path)
    assert report.quant == "bf16"
    value: Any = weights_of(model)[0].gate_up
    assert torch.equal(value.value_LNC, fine.bfloat16().mT) and not torch.equal(value.value_LNC.to(dtype), fine.mT)
    words = f"stores experts in {str(dtype).removeprefix('torch.')}: they are rounded to bfloat16 (quant=bf16)"
    assert capsys.readouterr().err.count(words) == 1


def test_experts_by_their_other_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    count = json.loads((tmp_path / "config.json").read_text())["num_local_experts"]
    rewrite_config(tmp_path, num_local_experts=None, num_experts=count)
    assert len(weights_of(load_rank(tmp_path)[0])) > 0
