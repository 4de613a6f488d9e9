"""What the tests of loading share: a rank without peers, what a checkpoint holds, ways to spoil one."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from epmoe.formats import ExpertWeights
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import SINGLE, Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.load import LoadReport, load

EXPERTS = "model.layers.{}.mlp.experts."


def rank_of(rank: int, size: int, device: str = "cpu") -> Ranks:
    """A rank without its peers: loading needs no collective."""
    return Ranks(
        rank=rank, size=size, local_rank=rank, nodes=1, device=torch.device(device),
        expert_rank=rank, expert_size=size, expert_group=None,
    )  # fmt: skip


def load_rank(path: Path, rank: int = 0, size: int = 1, device: str = "cpu", **options: Any) -> tuple[Any, LoadReport]:
    """`options` are of Choices, or `progress` and `limits` of `load`."""
    more = {key: options.pop(key) for key in ("progress", "limits") if key in options}
    return load(Checkpoint.open(path), rank_of(rank, size, device), Choices(**options), **more)


def weights_of(model: Any) -> list[ExpertWeights]:
    return [layer.experts.unpack() for layer in model.moe_layers()]


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def rewrite_config(path: Path, **changes: Any) -> None:
    """Change config.json; a key that becomes None is removed."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of a one-file checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / SINGLE).items()}  # load_file maps the file
    change(tensors)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})  # transformers insists on the format


def share_of(path: Path, local: int, experts: int) -> int:
    """What a rank with `local` experts has to read, from the files themselves."""
    expert_bytes = sum(value.nbytes for name, value in stored(path).items() if ".experts." in name)
    everything = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return everything - expert_bytes + expert_bytes // experts * local


def same(a: ExpertWeights, b: ExpertWeights) -> bool:
    pairs = [(a.gate_up_bias_LN, b.gate_up_bias_LN), (a.down_bias_LH, b.down_bias_LH)]
    for x, y in ((a.gate_up, b.gate_up), (a.down, b.down)):
        assert x.format == y.format
        pairs += [(getattr(x, field.name), getattr(y, field.name)) for field in fields(x)]  # type: ignore[arg-type]
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)
