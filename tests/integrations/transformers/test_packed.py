"""PackedExperts: a backend takes the weights over, and gives back the same bytes wherever they are asked for."""

from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from interpret import interpreted
from moe_families import load, logits, make, saved, stored

from epmoe.errors import UserError
from epmoe.formats import ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.integrations.transformers import EpmoeConfig, PackedExperts, replace_with_epmoe_experts
from epmoe.integrations.transformers.experts import plain_rows
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.router import Dispatch

FOREIGN = f"{__name__}:Turned"


class Turned:
    """A backend with a layout of its own: every byte is turned over."""

    formats: ClassVar[frozenset[str]] = frozenset({"mxfp4"})
    waits: ClassVar[bool] = True

    def __init__(self, weights: ExpertWeights, activation: GatedActivation) -> None:
        self.weights, self.activation = turned(weights), activation

    @classmethod
    def serves(cls, device: torch.device) -> bool:
        return True

    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        return ()

    @classmethod
    def pack(cls, weights: ExpertWeights, activation: GatedActivation) -> Self:
        return cls(weights, activation)

    def unpack(self) -> ExpertWeights:
        return turned(self.weights)

    @property
    def nbytes(self) -> int:
        return 0

    def forward(self, x_TH: torch.Tensor, dispatch: Dispatch, y_TKH: torch.Tensor | None = None) -> torch.Tensor:
        return ReferenceExperts(turned(self.weights), self.activation).forward(x_TH, dispatch, y_TKH)


def turned(weights: ExpertWeights) -> ExpertWeights:
    gate_up, down = (
        Mxfp4Matrix(255 - matrix.blocks_LNG16, matrix.scales_LNG.clone())  # type: ignore[attr-defined]
        for matrix in (weights.gate_up, weights.down)
    )
    return ExpertWeights(gate_up, weights.gate_up_bias_LN, down, weights.down_bias_LH)


def blocks_of(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith(("_blocks", "_scales"))]


def test_a_layout_of_its_own(tmp_path: Path) -> None:
    source = saved(make("qwen3_moe"), tmp_path / "plain")
    expected = load(source, quantization_config=EpmoeConfig(experts="reference"))
    model = load(source, quantization_config=EpmoeConfig(experts=FOREIGN))
    assert not blocks_of(model) and len(blocks_of(expected)) == 8  # they are in memory once
    assert torch.equal(logits(model), logits(expected))
    first, second = (stored(saved(each, tmp_path / str(i))) for i, each in enumerate((expected, model)))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert not blocks_of(model) and torch.equal(logits(model), logits(expected))  # saving moved nothing
    moved = model.to(torch.device("cpu"))
    assert not blocks_of(moved) and torch.equal(logits(moved), logits(expected))


def test_other_weights_are_loaded_into_it() -> None:
    for name in ("reference", FOREIGN):
        first, second = (make("olmoe"), make("olmoe", num_experts_per_tok=2))
        for parameter in second.model.layers[0].mlp.experts.parameters():
            parameter.data.mul_(2)
        for model in (first, second):
            replace_with_epmoe_experts(model, EpmoeConfig(experts=name))
        before = logits(first)
        state = second.model.layers[0].mlp.experts.state_dict()
        first.model.layers[0].mlp.experts.load_state_dict(state)
        assert not torch.equal(logits(first), before)
        found = first.model.layers[0].mlp.experts.state_dict()
        assert found.keys() == state.keys() and all(torch.equal(found[each], state[each]) for each in state)


def test_without_values(tmp_path: Path) -> None:
    from epmoe.integrations.transformers.fit import layout_of

    experts = make("olmoe").model.layers[0].mlp.experts
    packed = PackedExperts(experts, layout_of(experts))
    with pytest.raises(UserError, match="OlmoeExperts: its experts have no values: load the model"):
        packed(torch.zeros(1, 64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


def test_gates_first_with_biases_and_transposed() -> None:
    """A layout that only one family has: the rows of the same values in the module's own parameters, bit for bit."""
    from transformers.models.openai_privacy_filter import modeling_openai_privacy_filter as family

    torch.manual_seed(0)
    config = family.OpenAIPrivacyFilterConfig(hidden_size=64, intermediate_size=32, num_local_experts=4)
    model = torch.nn.ModuleDict({"experts": family.OpenAIPrivacyFilterExperts(config).requires_grad_(False)})
    for parameter in model.parameters():
        parameter.normal_()
    plain = model["experts"]
    for name in ("gate_up_proj", "down_proj"):
        value = getattr(plain, name)
        value.copy_(Mxfp4Matrix.quantize(value.transpose(1, 2)).dequantize(torch.float32).transpose(1, 2))
    given = torch.randn(5, 64), torch.tensor([[0, 3], [1, 2], [3, 0], [2, 2], [4, 1]]), torch.rand(5, 2)
    expected = plain_rows(plain, *given)
    assert replace_with_epmoe_experts(model, EpmoeConfig()) == 1
    packed = model["experts"]
    assert isinstance(packed, PackedExperts) and torch.equal(packed.rows(*given), expected)


def triton_and_reference() -> None:
    """Loaded values in Triton's layout: the kernels' rows beside the reference's, and the same bytes back."""
    from epmoe.integrations.transformers.fit import layout_of

    torch.manual_seed(0)
    experts = make("gpt_oss").model.layers[0].mlp.experts
    made = {}
    for name in ("reference", "triton"):
        made[name] = PackedExperts(experts, layout_of(experts), name)
        for projection in ("gate_up_proj", "down_proj"):
            for stored_name, value in made[name].quantize(projection, getattr(experts, projection)).items():
                made[name].register_parameter(stored_name, torch.nn.Parameter(value, requires_grad=False))
            made[name].placeholder_gone(projection)
        made[name].settle()
    assert not list(blocks_of(made["triton"])) and len(blocks_of(made["reference"])) == 4
    x_TH, index_TK, weight_TK = torch.randn(3, 64), torch.tensor([[0, 5], [3, 1], [2, 0]]), torch.rand(3, 2)
    found, expected = (made[name](x_TH, index_TK, weight_TK) for name in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    states = made["triton"].state_dict(), made["reference"].state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_triton_takes_the_weights_over() -> None:
    interpreted(triton_and_reference)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The embedded model, in bfloat16: Triton's experts hold the weights, and say what the reference says there."""
    import epmoe

    path = Path(epmoe.__file__).parent / "demo"
    ids = torch.arange(2, 66, device="cuda")[None]

    def said(experts: str, dtype: torch.dtype) -> torch.Tensor:
        model = load(path, quantization_config=EpmoeConfig(experts=experts), dtype=dtype, device_map="cuda")
        assert bool(blocks_of(model)) == (experts == "reference")
        return logits(model, ids).float()

    exact = said("reference", torch.float32)
    ours, reference = (said(experts, torch.bfloat16) - exact for experts in ("triton", "reference"))
    # Sums in two orders; here and there a token close between two experts goes to the other one, in either.
    assert ours.square().mean() < 1.5 * reference.square().mean()
