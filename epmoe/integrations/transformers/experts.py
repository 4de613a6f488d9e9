"""`experts_implementation="epmoe"`: epmoe's reference products, straight from the weights that the model has.

A slot's row follows from its token and its expert alone, and a token's K rows are added in the order k = 0 … K-1 in
float32. Any dtype and device. It is the definition, not fast: it waits for the device and multiplies in float32.
`EpmoeConfig` puts experts in MXFP4 in the modules' place, which other backends run.

Letters: T tokens · H hidden · K experts per token · L experts on this rank · N output rows of a matrix · C its
contraction columns · S = T·K slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from epmoe.errors import UserError
from epmoe.formats import ExpertWeights
from epmoe.integrations.transformers.fit import PROJECTIONS, Layout, UnfitError, layout_of
from epmoe.layers.norm import add_rows
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.router import Dispatch
from epmoe.moe.router.reference import index

NAME = "epmoe"


@dataclass(frozen=True)
class PlainMatrix:
    """A module's own parameter as the matrix [L, N, C] of its experts, in any floating-point dtype; copies nothing.

    What `ReferenceExperts` asks of an `ExpertMatrix`: an expert's values, whenever a slot has chosen it.
    """

    format: ClassVar[str] = "plain"

    value: torch.Tensor
    projection: str
    layout: Layout

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, N, C)."""
        experts, rows, columns = self.value.shape
        return (experts, columns, rows) if self.layout.transposed else (experts, rows, columns)

    def select(self, experts: slice) -> Self:
        """Some of the L experts, as a view."""
        return type(self)(self.value[experts], self.projection, self.layout)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values [L, N, C]."""
        return self.layout.rows(self.projection, self.value).to(dtype)


class _NoBackward(torch.autograd.Function):
    """A function without gradients that says so when one is asked for, where autograd would go on without it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise UserError(
            "epmoe's experts have no gradients: run the model under torch.no_grad(), or train with another "
            "experts_implementation"
        )


def without_gradients(run: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`run(*tensors)`; a backward pass through it raises a UserError."""
    result: torch.Tensor = _NoBackward.apply(run, *tensors)
    return result


def dispatch_of(index_TK: torch.Tensor, weight_TK: torch.Tensor, num_local: int, num_experts: int) -> Dispatch:
    """The slots of routes that transformers' router chose. Ids outside [0, num_local) are other ranks'.

    Args:
        index_TK: integers, ids of this rank's experts.
        weight_TK: floating point.
        num_local: L.
        num_experts: E, of all ranks.
    """
    local_TK = torch.where((index_TK >= 0) & (index_TK < num_local), index_TK, -1).int()
    return Dispatch(index_TK.int(), weight_TK.float(), *index(local_TK.flatten(), num_local), num_experts)


def plain_rows(module: nn.Module, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """Slot rows [T, K, H] of an experts module with its own weights; zeros where an id is another rank's.

    Raises:
        UserError: a module that epmoe cannot run.
    """
    layout = _known_layout(module)
    first, second = (PlainMatrix(getattr(module, name), name, layout) for name in PROJECTIONS)
    weights = ExpertWeights(first, _bias(module, first), second, _bias(module, second))  # type: ignore[arg-type]
    local = first.shape[0]
    experts = ReferenceExperts(weights, layout.activation, held_bytes=0)
    return experts.forward(x_TH, dispatch_of(index_TK, weight_TK, local, local))


def epmoe_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[T, H] → [T, H] in its dtype: an experts module's forward, as transformers' interface wants it."""

    def run(x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        return add_rows(plain_rows(module, x_TH, index_TK, weight_TK))

    return without_gradients(run, hidden_states, top_k_index, top_k_weights)


def slot_rows(
    forward: Callable[..., torch.Tensor], x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """Slot rows [T, K, H] of any experts implementation: each slot is a token of its own with one expert."""
    tokens, top_k = index_TK.shape
    y_SH = forward(x_TH.repeat_interleave(top_k, 0), index_TK.reshape(-1, 1), weight_TK.reshape(-1, 1))
    return y_SH.view(tokens, top_k, x_TH.shape[1])


def _known_layout(module: nn.Module) -> Layout:
    found = module.__dict__.get("_epmoe_layout")
    if found is None:
        try:
            found = layout_of(module)
        except UnfitError as error:
            raise UserError(
                f"experts_implementation={NAME}: {type(module).__name__} {error}: choose another one, such as eager"
            ) from error
        module.__dict__["_epmoe_layout"] = found
    assert isinstance(found, Layout)
    return found


def _bias(module: nn.Module, matrix: PlainMatrix) -> torch.Tensor:
    """[L, N], zeros where the family has none."""
    experts, rows, _ = matrix.shape
    if not matrix.layout.bias:
        return torch.zeros((), dtype=torch.float32, device=matrix.value.device).expand(experts, rows)
    bias_LN: torch.Tensor = getattr(module, f"{matrix.projection}_bias")
    return matrix.layout.interleave(bias_LN) if matrix.projection == PROJECTIONS[0] else bias_LN


ALL_EXPERTS_FUNCTIONS.register(NAME, epmoe_experts)
