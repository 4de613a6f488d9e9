"""What fits: the gate is found by trying; each reason that speaks against a module is said."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from moe_families import FAMILIES, make
from torch import nn

from epmoe.integrations.transformers.fit import UnfitError, layout_of
from epmoe.moe.experts import GatedActivation


def plain(alpha: float, limit: float, offset: float) -> Any:
    """A gate with all gates first."""

    def gate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + offset)

    return gate


class Made(nn.Module):
    """An experts module as transformers' decorator leaves it."""

    def __init__(self, gate: Any, **changes: Any) -> None:
        super().__init__()
        self.has_gate = self.is_concatenated = True
        self.has_bias = self.is_transposed = self.has_post_expert_norm = False
        self.act_fn = nn.GELU()
        self.gate_up_proj = nn.Parameter(torch.empty(2, 64, 32, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(2, 32, 32, device="meta"))
        self._apply_gate = gate
        for name, value in changes.items():
            setattr(self, name, value)


@dataclass(frozen=True)
class Case:
    name: str
    module: Made
    reason: str


CASES = (
    Case("another gate", Made(lambda x: nn.functional.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]), "GELU"),
    Case("gate clamped after", Made(lambda x: nn.functional.silu(x.chunk(2, -1)[0]).clamp(max=7), limit=7.0), "SwiGLU"),
    Case("a limit that it does not say", Made(plain(1, 5, 0)), "not SwiGLU"),
    Case("no gate", Made(plain(1, math.inf, 0), has_gate=False), "no gate"),
    Case("a norm", Made(plain(1, math.inf, 0), has_post_expert_norm=True), "a norm after each expert"),
    Case("a matrix is missing", Made(plain(1, math.inf, 0), down_proj=None), "no matrix down_proj"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_does_not_fit_says_why(case: Case) -> None:
    with pytest.raises(UnfitError, match=case.reason):
        layout_of(case.module)


@pytest.mark.parametrize("activation", [(1.0, math.inf, 0.0), (1.702, 7.0, 1.0), (1.0, 10.0, 0.0), (1.5, 3.0, 1.0)])
def test_a_gate_is_found_by_trying(activation: tuple[float, float, float]) -> None:
    alpha, limit, offset = activation
    named = {"swiglu_alpha": alpha, **({} if math.isinf(limit) else {"swiglu_limit": limit})}
    found = layout_of(Made(plain(alpha, limit, offset), **named))
    assert found.activation == GatedActivation(alpha, limit, offset)
    assert not found.interleaved and not found.of_gpt_oss


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    experts = [module for module in make(family).modules() if hasattr(module, "is_transposed")]
    assert experts and {layout_of(module).of_gpt_oss for module in experts} == {family == "gpt_oss"}


def test_a_module_of_somebody_else() -> None:
    with pytest.raises(UnfitError, match="not made for transformers' experts interface"):
        layout_of(nn.Linear(2, 2))


def test_while_a_model_is_being_made() -> None:
    """Its dtype is the default one then, and its weights are nowhere."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = layout_of(Made(plain(1.702, 7, 1), alpha=1.702, limit=7.0))
    finally:
        torch.set_default_dtype(kept)
    assert found.activation == GatedActivation()
