"""Other weights into a loaded model: the answers of the checkpoint that they come from, in the same memory."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from interpret import interpreted
from loading import stored
from spawn import run_ranks

from epmoe.config.compose import from_keys
from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.formats import ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix, decode
from epmoe.llm import LLM
from epmoe.moe.experts import GatedActivation
from epmoe.ranks.mesh import Ranks
from epmoe.weights import update
from epmoe.weights.synthetic import make_checkpoint

KEYS: dict[str, Any] = {"runtime": {"device": "cpu", "dtype": "float32"}, "chat": "off", "max_new_tokens": 10}
PROMPTS: list[Any] = [[1, 2, 3], [7], list(range(20))]
PARAMS = [SamplingParams(logprobs=2, ignore_eos=True), SamplingParams(), SamplingParams(temperature=1.0, seed=3)]
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoints that differ in every weight."""
    folder = tmp_path_factory.mktemp(request.param)
    return tuple(  # type: ignore[return-value]
        make_checkpoint(folder / str(seed), seed=seed, experts=5, dtype_experts=request.param, max_position=64)
        for seed in (1, 2)
    )


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mxfp4")
    return make_checkpoint(folder / "1", seed=1, max_position=64), make_checkpoint(
        folder / "2", seed=2, max_position=64
    )


def answers(llm: LLM) -> list[Any]:
    return [(each.ids, each.logprobs) for each in llm.generate(PROMPTS, PARAMS)]


def answers_of(path: Path, **keys: Any) -> list[Any]:
    with LLM(path, **KEYS, **keys) as llm:
        return answers(llm)


def test_answers_are_the_other_checkpoints_bit_for_bit(two: tuple[Path, Path]) -> None:
    old, new = two
    tensors = stored(new)
    with LLM(old, **KEYS) as llm:
        before, places = answers(llm), [each.data_ptr() for _, each in llm.model.named_parameters()]
        llm.update_weights(iter(tensors.items()))
        for value in tensors.values():
            value.zero_()  # the caller's memory is its own again
        assert answers(llm) == answers_of(new) != before == answers_of(old)
        llm.update_weights(stored(old))
        assert answers(llm) == before
        assert [each.data_ptr() for _, each in llm.model.named_parameters()] == places


@pytest.mark.gpu
def test_captured_graphs_read_the_new_weights(two: tuple[Path, Path]) -> None:
    """On a GPU, where decode steps were captured before; in bf16 with the packed experts of its backend."""
    old, new = two
    keys = {**KEYS, "runtime": {"device": "cuda"}}
    with LLM(new, **keys) as llm:
        wanted = answers(llm)
    with LLM(old, **keys) as llm:
        before = answers(llm)
        captured = dict(llm.engine.graphs.graphs)
        llm.update_weights({name: value.cuda() for name, value in stored(new).items()})
        assert answers(llm) == wanted != before
        assert llm.engine.graphs.graphs == captured  # the same ones: nothing was captured anew
        llm.update_weights(stored(old))
        assert answers(llm) == before


def updated(ranks: Ranks, old: Path, new: Path, attention: str) -> list[Any]:
    llm = LLM.opened(from_keys({"checkpoint": str(old), "mesh.attention": attention, **KEYS}), ranks)
    llm.load()
    before = answers(llm)
    with pytest.raises(UserError, match="of expert 4 holds NaN"):  # rank 1's alone, and said on both
        llm.update_weights(spoiled(stored(new), f"{GATE_UP}_bias", lambda value: value[4].fill_(torch.nan)))
    assert answers(llm) == before
    llm.update_weights(stored(new))
    return answers(llm)


@pytest.mark.parametrize(
    "attention", ["tensor", *(pytest.param(each, marks=pytest.mark.slow) for each in ("replicate", "data"))]
)
def test_each_rank_takes_its_experts_and_its_heads(attention: str, two: tuple[Path, Path]) -> None:
    """What is in a cache is not found again, in any rank's."""
    wanted = answers_of(two[1])
    assert run_ranks(updated, 2, *two, attention, timeout=120) == [wanted, wanted]


def test_some_tensors_leave_the_others_as_they_are(mxfp4: tuple[Path, Path]) -> None:
    """A layer at a time, halves of a layer, and in any order it comes to the same."""
    old, new = mxfp4
    tensors = stored(new)
    parts: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        parts.setdefault(name.replace("_blocks", "").replace("_scales", ""), {})[name] = value
    with LLM(old, **KEYS) as llm:
        seen = [answers(llm)]
        for name in (GATE_UP, f"{GATE_UP}_bias", "model.layers.0.self_attn.k_proj.weight"):
            llm.update_weights(parts.pop(name))
            seen.append(answers(llm))
        assert all(a != b for a, b in pairwise(seen))
        for part in reversed(parts.values()):
            llm.update_weights(part)
        assert answers(llm) == answers_of(new)


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as a trainer has them: bfloat16, [E, C, N]."""
    found = {name: value for name, value in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")):
        found[name] = decode(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], torch.bfloat16).mT.contiguous()
    return found


@pytest.mark.parametrize("quant", ["auto", "bf16"])
def test_plain_experts_are_quantised_and_packed_ones_decoded(mxfp4: tuple[Path, Path], quant: str) -> None:
    """As by the loader; values that come from MXFP4 are exact in both."""
    old, new = mxfp4
    wanted = answers_of(new, quant=quant)
    for tensors in (plain(stored(new)), stored(new)):
        with LLM(old, **KEYS, quant=quant) as llm:
            llm.update_weights(tensors)
            assert answers(llm) == wanted


def test_plain_experts_are_rounded_as_the_model_was_told_to(mxfp4: tuple[Path, Path]) -> None:
    old, _ = mxfp4
    blocks = stored(old)[f"{GATE_UP}_blocks"]
    value = torch.randn(len(blocks), 32 * blocks.shape[2], blocks.shape[1], generator=torch.Generator().manual_seed(3))
    value = value.bfloat16()
    with LLM(old, **KEYS, quant_scale="best") as llm:
        llm.update_weights({GATE_UP: value})
        experts = llm.model.moe_layers()[1].experts
        assert experts is not None
        found = experts.unpack().gate_up
    wanted, other = (Mxfp4Matrix.quantize(value.mT.contiguous(), scale) for scale in ("best", "ocp"))
    assert isinstance(found, Mxfp4Matrix) and torch.equal(found.scales_LNG, wanted.scales_LNG)
    assert torch.equal(found.blocks_LNG16, wanted.blocks_LNG16)
    assert not torch.equal(wanted.scales_LNG, other.scales_LNG)


def spoiled(tensors: dict[str, Any], name: str, change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    changed = tensors[name].clone()
    change(changed)
    return {**tensors, name: changed}


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no tensors": lambda t: {},
    r"an item \(tuple\) is no pair of a name and a tensor": lambda t: [("norm", 1), torch.ones(1)],
    f"{NORM} comes twice": lambda t: [(NORM, t[NORM]), (NORM, t[NORM])],
    r"the model has no model\.nom\.weight: give .*did you mean model\.norm\.weight": lambda t: {
        **t,
        "model.nom.weight": t[NORM],
    },
    r"experts\.3\.gate_up_proj is of one expert": lambda t: {"model.layers.0.mlp.experts.3.gate_up_proj": t[NORM]},
    rf"{NORM} has shape \[3\], and the model's has \[": lambda t: {**t, NORM: torch.ones(3)},
    f"{NORM} is int64: give bfloat16 or float16 or float32": lambda t: {**t, NORM: t[NORM].long()},
    f"{GATE_UP}_blocks is int32: give uint8": lambda t: {**t, f"{GATE_UP}_blocks": t[f"{GATE_UP}_blocks"].int()},
    f"{GATE_UP}_scales is missing: give all of": lambda t: {f"{GATE_UP}_blocks": t[f"{GATE_UP}_blocks"]},
    f"{GATE_UP} comes in two formats": lambda t: {**t, GATE_UP: plain(t)[GATE_UP]},
    f"{Q} holds NaN or an infinity: nothing was changed": lambda t: spoiled(t, Q, lambda v: v[3, 4].fill_(torch.inf)),
    f"{GATE_UP}_bias of expert 2 holds NaN": lambda t: spoiled(
        t, f"{GATE_UP}_bias", lambda v: v[2, 0].fill_(torch.nan)
    ),
    "gate_up_proj_blocks of expert 1 holds NaN": lambda t: spoiled(
        t, f"{GATE_UP}_scales", lambda v: v[1, 0].fill_(255)
    ),
    f"{GATE_UP} of expert 0 holds NaN": lambda t: spoiled(plain(t), GATE_UP, lambda v: v[0, 0].fill_(torch.nan)),
}


def test_what_cannot_be_is_refused_and_changes_nothing(mxfp4: tuple[Path, Path]) -> None:
    old, new = mxfp4
    with LLM(old, **KEYS) as llm:
        before = answers(llm)
        for message, change in WRONG.items():
            with pytest.raises(UserError, match=f"^update_weights: .*{message}") as error:
                llm.update_weights(change(stored(new)))
            assert "\n" not in str(error.value)
        stream = llm.stream([1, 2, 3], SamplingParams(ignore_eos=True))
        next(stream)
        with pytest.raises(UserError, match=r"^update_weights was called within a stream"):
            llm.update_weights(stored(new))
        stream.close()  # type: ignore[attr-defined]
        assert answers(llm) == before
    with pytest.raises(UserError, match=r"^update_weights was called after close"):
        llm.update_weights(stored(new))


class Layer:
    """What `_install` asks of one."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts


def installed(largest_scale: int) -> None:
    """In Triton's layout: in place, unless the scales need another kernel."""
    from epmoe.moe.experts.triton import TritonExperts

    def packed(scale: int) -> TritonExperts:
        def matrix(rows: int) -> Mxfp4Matrix:
            scales = torch.full((2, rows, 2), scale, dtype=torch.uint8)
            return Mxfp4Matrix(torch.randint(0, 256, (2, rows, 2, 16), dtype=torch.uint8), scales)

        weights = ExpertWeights(matrix(128), torch.randn(2, 128), matrix(64), torch.randn(2, 64))
        return TritonExperts.pack(weights, GatedActivation())

    old, new = packed(120), packed(largest_scale)
    layer: Any = Layer(old)
    stays = largest_scale <= 128
    assert update._install(layer, new) == stays and (layer.experts is old) == stays
    assert torch.equal(layer.experts.gate_up.word_LZX, new.gate_up.word_LZX)
    assert torch.equal(layer.experts.down.scale_LZVB, new.down.scale_LZVB)
    assert torch.equal(layer.experts.down_bias_LH, new.down_bias_LH)


@pytest.mark.parametrize("largest_scale", [121, 200])
def test_a_packed_layout_is_overwritten_where_its_kernels_stay_the_same(largest_scale: int) -> None:
    interpreted(installed, largest_scale)
