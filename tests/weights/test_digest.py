"""Digest: every bit and its place count, on any size and dtype; contents differ where checkpoints do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load_rank, rewrite_config, rewrite_tensors

from epmoe.bench.weights import RandomCheckpoint
from epmoe.weights import digest
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.digest import (
    BASE,
    FIRST,
    SECOND,
    STEP,
    contents,
    digests,
    expert_samples,
    head_samples,
    shared_digests,
)
from epmoe.weights.synthetic import make_checkpoint

M = 2**64


def of(tensor: torch.Tensor) -> int:
    return digests({"x": tensor})["x"]


def by_hand(tensor: torch.Tensor, chunk: int) -> int:
    """The definition, in Python's integers."""
    data = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    end = [words.pop()] if len(data) % 8 else []
    value = 0
    for part in [*(words[i : i + chunk] for i in range(0, len(words), chunk)), *([end] if end else [])]:
        total = 0
        for i, word in enumerate(part, 1):
            z = (word + i * STEP) % M
            z = (z ^ z >> 32) * FIRST % M
            total += SECOND * (z ^ z >> 32)
        value = (value * BASE + total) % M
    return value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 101])
def test_is_its_definition(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "CHUNK", 5)
    x = torch.randint(256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    assert of(x) == by_hand(x, 5)


def test_rows_of_a_matrix_are_as_good_as_a_tensor() -> None:
    """The projections of an attention lie in one matrix, from any row on."""
    x = torch.randn(9, 5).bfloat16()
    for begin in range(9):
        assert of(x[begin:]) == of(x[begin:].clone())


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "lowest bit": lambda x: x.view(torch.int16)[7].bitwise_xor_(1),
    "sign": lambda x: x[-1].neg_(),
    "two signs": lambda x: x[::64].neg_(),
    "neighbours change places": lambda x: x[:2].copy_(x[:2].flip(0)),
    "far ones change places": lambda x: x[3::32768].copy_(x[3::32768].flip(0)),
    "words change places": lambda x: x[:8].copy_(x[:8].roll(4)),
    "chunks change places": lambda x: x.copy_(x.roll(len(x) // 2)),
    "all in another order": lambda x: x.copy_(x[torch.randperm(len(x))]),
    "zero of the other sign": lambda x: x[99].fill_(-0.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that differ in their highest bits only, far apart, too: sums of products miss those."""
    monkeypatch.setattr(digest, "CHUNK", 1 << 14)
    sign = torch.where(torch.rand(1 << 17) < 0.5, -1.0, 1.0)
    for x in (torch.randn(1 << 17).bfloat16(), sign.bfloat16()):
        x[0], x[1], x[99] = 1.0, 2.0, 0.0
        y = x.clone()
        CHANGES[change](y)
        if torch.equal(x.view(torch.int16), y.view(torch.int16)):
            continue  # signs that are the same at both places
        assert of(x) != of(y)


def test_signs_that_change_places_give_digests_of_their_own() -> None:
    """The highest bit of a word is the hardest to mix: it stays the highest through a product."""
    x = torch.where(torch.rand(4096) < 0.5, -1.0, 1.0).bfloat16()
    found = set()
    different = set()
    for a, b in torch.randint(4096, (500, 2)).tolist():
        y = x.clone()
        y[a], y[b] = x[b], x[a]
        found.add(of(y))
        different.add(bytes(y.view(torch.uint8).tolist()))
    assert len(found) == len(different) > 100


@pytest.mark.gpu
def test_a_gpu_finds_the_same() -> None:
    x = torch.randn(3, 1 << 23).bfloat16()
    assert of(x.cuda()) == of(x)


def test_loaded_weights_are_named_by_the_checkpoint(tmp_path: Path) -> None:
    """A change of an expert is no rank's business but its own; of all else, that tensor's digest alone differs."""
    paths = [make_checkpoint(tmp_path / name) for name in ("a", "b")]
    name = "model.layers.1.self_attn.k_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] += 1
        tensors["model.layers.0.mlp.experts.down_proj_bias"][0, 0] += 1

    rewrite_tensors(paths[1], change)
    ours, theirs = (shared_digests(load_rank(path, rank=rank, size=2)[0]) for rank, path in enumerate(paths))
    assert [key for key in ours if ours[key] != theirs[key]] == [f"digest({name})"] and ours.keys() == theirs.keys()
    experts = {each for each in Checkpoint.open(paths[0]).tensors if ".experts." in each}
    assert {f"digest({each})" for each in Checkpoint.open(paths[0]).tensors if each not in experts} == set(ours)


def spoil_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda path: rewrite_config(path, swiglu_limit=6.0), ["config.json's swiglu_limit"]),
        (lambda path: rewrite_config(path, new={"x": [1] * 99}), ["config.json's new"]),
        (
            lambda path: rewrite_tensors(
                path, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()})
            ),
            ["digest(names, shapes and dtypes of model.norm.weight)"],
        ),
        (
            lambda path: rewrite_tensors(path, lambda tensors: tensors.pop("model.layers.1.self_attn.sinks")),
            ["digest(names, shapes and dtypes of model.layers.1)"],
        ),
        (spoil_tokenizer, ["digest(tokenizer.json)"]),
    ],
)
def test_contents_differ(change: Callable[[Path], Any], keys: list[str], tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "a")
    before = contents(Checkpoint.open(path))
    assert before == contents(Checkpoint.open(make_checkpoint(tmp_path / "b", seed=1)))  # its values alone differ
    change(path)
    after = contents(Checkpoint.open(path))
    assert [key for key in {**before, **after} if before.get(key) != after.get(key)] == keys
    assert max(map(len, after.values())) <= 60 and json.dumps(after)


EXPERTS = "model.layers.1.mlp.experts."


@pytest.mark.parametrize("tensor", ["gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_bias"])
def test_experts_in_another_order_are_seen_in_the_files(tensor: str, tmp_path: Path) -> None:
    """Of one layer alone; nothing of them is read but a few bytes, which the report of what was read does not count."""
    path = make_checkpoint(tmp_path, experts=20, top_k=2)
    source = Checkpoint.open(path)
    read = source.bytes_read
    before = expert_samples(source)
    assert source.bytes_read == read and list(before) == [
        f"digest(a sample of the experts of model.layers.{layer})" for layer in (0, 1)
    ]
    generator = torch.Generator().manual_seed(0)
    other = {EXPERTS + tensor: lambda value: torch.randint(0, 119, value.shape, generator=generator).to(value.dtype)}
    rewrite_tensors(path, lambda tensors: tensors.update({name: new(tensors[name]) for name, new in other.items()}))
    after = expert_samples(Checkpoint.open(path))
    assert [key for key in before if before[key] != after[key]] == ["digest(a sample of the experts of model.layers.1)"]


def test_shared_heads_are_compared_by_samples(tmp_path: Path) -> None:
    """mesh.attention=tensor: another training's heads are seen, though no rank has them all."""
    path = make_checkpoint(tmp_path)
    source, model = Checkpoint.open(path), load_rank(path, 1, 2, attention="tensor")[0]
    assert not head_samples(source, load_rank(path, 1, 2)[0])
    before, name = head_samples(source, model), "model.layers.1.self_attn.k_proj.weight"
    assert list(before) == [f"digest(a sample of the heads of model.layers.{layer})" for layer in (0, 1)]
    assert not [key for key in shared_digests(model) if "q_proj" in key or "k_proj" in key or "sinks" in key]
    rewrite_tensors(path, lambda tensors: tensors[name].neg_())
    after = head_samples(Checkpoint.open(path), model)
    assert [key for key in before if before[key] != after[key]] == ["digest(a sample of the heads of model.layers.1)"]


def test_random_weights_have_no_files() -> None:
    assert expert_samples(RandomCheckpoint.of("tiny")) == {}
