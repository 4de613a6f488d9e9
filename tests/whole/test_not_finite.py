"""A weight that is not finite, wherever it stands: an error that names layer and position, or what the model says.

Never text in which somebody's NaN was passed over.
"""

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import rewrite_tensors
from spawn import commands

from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.weights.synthetic import make_checkpoint

LAYER = "model.layers.1."
IDS = [1, 2, 3, 4, 5, 6, 7, 8]
LAST = len(IDS) - 1
ATTENTION, EXPERTS = "layer 1's attention at position 7", "layer 1's experts at position 7"
# What is told of a tensor that holds one bad number; the last layer goes on with the last position alone.
PLACES = {
    "lm_head.weight": "it is the projection to the vocabulary",
    "model.norm.weight": "the last norm at position 7 (its weight holds",
    LAYER + "input_layernorm.weight": f"{ATTENTION} (its norm.weight holds",
    **{LAYER + f"self_attn.{part}_proj.{kind}": f"{ATTENTION} (its qkv.{kind} holds"
       for part in "qkv" for kind in ("weight", "bias")},
    **{LAYER + f"self_attn.o_proj.{kind}": f"{ATTENTION} (its o.{kind} holds" for kind in ("weight", "bias")},
    LAYER + "self_attn.sinks": f"{ATTENTION} (its sinks holds",
    LAYER + "post_attention_layernorm.weight": f"{EXPERTS} (its norm.weight holds",
    LAYER + "mlp.router.weight": f"{EXPERTS} (its router.weight holds",
    LAYER + "mlp.router.bias": f"{EXPERTS} (its router.bias holds",
    LAYER + "mlp.experts.gate_up_proj_bias": "gate_up_proj_bias of expert",
    LAYER + "mlp.experts.down_proj_bias": "down_proj_bias of expert",
}  # fmt: skip
ALLOWED = {(LAYER + "self_attn.sinks", -math.inf)}  # a head without a sink
SCALES = [f"{LAYER}mlp.experts.{name}_proj_scales" for name in ("gate_up", "down")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {
        "hidden": 64,
        "intermediate": 32,
        "experts": 4,
        "top_k": 2,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 32,
    }
    return make_checkpoint(tmp_path_factory.mktemp("finite"), layers=2, vocab=300, **sizes)


def answer(path: Path, device: str = "cpu", dtype: str = "float32", **params: Any) -> tuple[int, ...]:
    with LLM(path, chat="off", runtime={"device": device, "dtype": dtype, "progress": False}) as llm:
        asked = SamplingParams(max_new_tokens=4, ignore_eos=True, **params)
        return llm.generate([IDS], asked)[0].ids


def spoilt(checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = shutil.copytree(checkpoint, tmp_path / "spoilt", dirs_exist_ok=True)
    rewrite_tensors(path, change)
    return path


def put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """One number of a tensor; of a router the whole first row, which some position is sure to meet."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if name.endswith("router.weight"):
            tensors[name][0, :2] = value
        else:
            tensors[name].view(-1)[tensors[name].numel() // 3] = value

    return change


def put_scale(name: str, scale: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """One group's."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = scale

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf, pytest.param(-math.inf, marks=pytest.mark.slow)])
def test_each_tensor(checkpoint: Path, tmp_path: Path, value: float) -> None:
    clean = answer(checkpoint)
    for name, place in PLACES.items():
        path = spoilt(checkpoint, tmp_path, put(name, value))
        if (name, value) in ALLOWED:
            assert len(answer(path)) == len(clean), name
            continue
        with pytest.raises(UserError) as told:
            answer(path)
        assert place in str(told.value), (name, value)
        if "expert" not in place:
            assert f"not finite at position {LAST} of prompt 1" in str(told.value)


def test_scales_that_are_nan(checkpoint: Path, tmp_path: Path) -> None:
    for name in SCALES:
        stem = name.removesuffix("_scales")
        for scale in (253, 254, 255):  # the last is NaN, of the others some values are infinite
            change = put_scale(name, scale)
            with pytest.raises(UserError, match=rf"model.safetensors: {stem} of expert 0 holds NaN or an infinity"):
                answer(spoilt(checkpoint, tmp_path, change))
        assert answer(spoilt(checkpoint, tmp_path, put_scale(name, 120)))


def test_the_first_position_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """The embedding of the fifth token: found at its own position, asked for at the last. Another's says nothing."""

    def embed(id: int) -> Path:
        return spoilt(
            checkpoint, tmp_path, lambda tensors: tensors["model.embed_tokens.weight"][id, 3:4].fill_(math.inf)
        )

    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "logprobs": 2}, {"repetition_penalty": 1.2}]
    for params in kinds:
        with pytest.raises(
            UserError, match=r"logits are not finite at position 7 .* the embedding at position 4 \(its"
        ):
            answer(embed(IDS[4]), **params)
    assert answer(embed(299)) == answer(checkpoint)


def test_an_overflow_is_told_as_one(checkpoint: Path, tmp_path: Path) -> None:
    """Finite weights whose squares are not: no NaN anywhere, and the norm alone would make zeros of them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].mul_(1e25)

    with pytest.raises(UserError, match="layer 0's attention at position 0: the checkpoint is damaged, or its numbers"):
        answer(spoilt(checkpoint, tmp_path, change))


def generate(*keys: str) -> None:
    from epmoe.generate import generate as body

    sys.argv[1:] = ["runtime.device=cpu", "chat=off", *keys]
    body()


@pytest.mark.parametrize("attention", ["replicate", "data"])
def test_ranks_tell_it_once(attention: str, checkpoint: Path, tmp_path: Path) -> None:
    """Experts of rank 1 alone, whose finite weights overflow; the logits that both have are their doing."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[SCALES[1]][2:] = 252

    path, output = spoilt(checkpoint, tmp_path, change), tmp_path / "o.jsonl"
    keys = [f"checkpoint={path}", "prompt=Hello Hello", f"output={output}", f"mesh.attention={attention}"]
    with commands(generate, 2, *keys, folder=tmp_path) as started:
        assert [each.wait(60) for each in started] == [2, 2]
        lines = [line for each in started for line in each.stderr.splitlines() if "error" in line]
        assert len(lines) == 1 and "the last norm at position" in lines[0]
        assert not any(each.stdout for each in started) and not output.exists()


def test_a_head_that_rank_0_does_not_have(checkpoint: Path, tmp_path: Path) -> None:
    """Its weight is named all the same."""
    name = LAYER + "self_attn.q_proj.bias"
    path = spoilt(checkpoint, tmp_path, lambda tensors: tensors[name][-1:].fill_(math.inf))
    keys = [f"checkpoint={path}", "prompt=Hello Hello", "mesh.attention=tensor"]
    with commands(generate, 2, *keys, folder=tmp_path) as started:
        assert [each.wait(60) for each in started] == [2, 2]
        lines = [line for each in started for line in each.stderr.splitlines() if "error" in line]
        assert len(lines) == 1 and "layer 1's attention at position" in lines[0]
        assert "(its qkv.bias holds an infinity)" in lines[0] and not any(each.stdout for each in started)


@pytest.mark.parametrize("quant", ["bf16", "mxfp4"])
def test_plain_experts(quant: str, tmp_path: Path) -> None:
    """An infinity in a column of `up`, which the clamp would make 7 of."""
    path = make_checkpoint(tmp_path, vocab=300, dtype_experts="bf16")
    rewrite_tensors(path, lambda tensors: tensors[LAYER + "mlp.experts.gate_up_proj"][2, 0, 1:2].fill_(math.inf))
    with pytest.raises(UserError, match="gate_up_proj of expert 2 holds NaN or an infinity: download the checkpoint"):
        LLM(path, chat="off", quant=quant, runtime={"device": "cpu", "progress": False})


@pytest.mark.gpu
def test_each_tensor_on_a_gpu(tmp_path: Path) -> None:
    """With the kernels, in graphs, and rows enough that the router's product is the library's."""
    sizes: dict[str, Any] = {
        "hidden": 256,
        "intermediate": 128,
        "experts": 8,
        "top_k": 4,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
    }
    checkpoint = make_checkpoint(tmp_path / "whole", layers=2, vocab=512, **sizes)
    clean = answer(checkpoint, "cuda", "bfloat16")
    for value in (math.nan, math.inf):
        for name, place in PLACES.items():
            with pytest.raises(UserError) as told:
                answer(spoilt(checkpoint, tmp_path, put(name, value)), "cuda", "bfloat16")
            assert place in str(told.value), (name, value)
    for name in SCALES:
        with pytest.raises(UserError, match="of expert 0 holds NaN or an infinity"):
            answer(spoilt(checkpoint, tmp_path, put_scale(name, 255)), "cuda", "bfloat16")
    with pytest.raises(UserError, match=r"layer 1's experts at|the last norm at"):
        answer(spoilt(checkpoint, tmp_path, lambda tensors: tensors[SCALES[1]].fill_(252)), "cuda", "bfloat16")
    assert answer(checkpoint, "cuda", "bfloat16") == clean
