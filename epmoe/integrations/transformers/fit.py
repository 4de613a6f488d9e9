"""Which experts modules of transformers epmoe can run, and how their weights lie.

transformers' experts classes say of themselves (`use_experts_implementation`) whether they have a gate, biases and
another norm, and which way their weights lie. What their gate computes they do not say: it is found by trying. So a
family whose gate is plain or clamped SwiGLU fits, whatever its name.

Letters: E experts · L experts on this rank · N output rows of a matrix · C its contraction columns · I intermediate ·
M rows of the trial.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import nn

from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.reference import gated

PROJECTIONS = ("gate_up_proj", "down_proj")
_SAYS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_ALPHAS, _LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")  # attributes in which classes keep them


class UnfitError(ValueError):
    """epmoe cannot run this module; says why."""


@dataclass(frozen=True)
class Layout:
    """How the weights of one experts module lie."""

    activation: GatedActivation
    transposed: bool  # matrices are [E, C, N], not [E, N, C]
    interleaved: bool  # gate_up's rows are gate, up, gate, up …, not all gates and then all ups
    bias: bool

    @property
    def of_gpt_oss(self) -> bool:
        """Whether the blocks and scales of these experts are what an MXFP4 checkpoint of gpt-oss holds."""
        return self.transposed and self.interleaved and self.bias and self.activation == GatedActivation()

    def rows(self, projection: str, value: torch.Tensor) -> torch.Tensor:
        """A parameter of `projection` as [L, N, C], gate_up's rows interleaved; a view where that moves nothing."""
        value_LNC = value.transpose(1, 2) if self.transposed else value
        return self.interleave(value_LNC) if projection == PROJECTIONS[0] else value_LNC

    def interleave(self, value: torch.Tensor) -> torch.Tensor:
        """gate_up's rows or biases, [L, N, …], in the order gate, up, gate, up, …"""
        if self.interleaved:
            return value
        gate, up = value.chunk(2, dim=1)
        return torch.stack((gate, up), dim=2).flatten(1, 2)


def layout_of(module: nn.Module) -> Layout:
    """How this experts module's weights lie. Reads no weight, so they may be on the meta device.

    Raises:
        UnfitError: epmoe cannot run it.
    """
    lacking = [name for name in _SAYS if not hasattr(module, name)]
    if lacking:
        raise UnfitError("is not made for transformers' experts interface")
    if not module.has_gate:
        raise UnfitError("has no gate")
    if getattr(module, "has_post_expert_norm", False):
        raise UnfitError("has a norm after each expert")
    for name in PROJECTIONS:
        if getattr(getattr(module, name, None), "ndim", 0) != 3:
            raise UnfitError(f"has no matrix {name} of all experts")
    return Layout(
        activation_of(module),
        transposed=bool(module.is_transposed),
        interleaved=not module.is_concatenated,
        bias=bool(module.has_bias),
    )


def activation_of(module: nn.Module) -> GatedActivation:
    """What the module's gate computes, found by trying it on numbers that cross every bound.

    Raises:
        UnfitError: no `GatedActivation` gives the same.
    """
    given = _given(module, _ALPHAS), _given(module, _LIMITS)
    gate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate  # type: ignore[assignment]
    span = max((8.0, *(2 * limit for limit in given[1])))
    # Where a model is being made, the default dtype is its own and the default device may be meta.
    gate_M, up_M = (torch.linspace(-span, span, count, dtype=torch.float32, device="cpu") for count in (97, 101))
    gate_up_M2 = torch.cartesian_prod(gate_M, up_M)  # I = 1: gate and up stand side by side in either layout
    with torch.no_grad():
        out_M1 = gate(gate_up_M2)
    for alpha, limit, offset in product((*given[0], 1.0), (*given[1], math.inf), (0.0, 1.0)):
        tried = GatedActivation(alpha, limit, offset)
        if torch.allclose(out_M1, gated(gate_up_M2, tried), rtol=1e-5, atol=1e-5):
            return tried
    function = getattr(module, "act_fn", None)
    raise UnfitError(f"has a gate ({type(function or module).__name__}) that is not SwiGLU, clamped or plain")


def _given(module: nn.Module, names: tuple[str, ...]) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, int | float)]
