"""The module that stands where a family's experts stood: the same experts in MXFP4, run by a backend of epmoe.

    gate_up_proj_blocks  uint8 [L, 2I, H/32, 16]     rows gate, up, gate, up …: as gpt-oss's checkpoints have them
    gate_up_proj_scales  uint8 [L, 2I, H/32]
    down_proj_blocks     uint8 [L, H, I/32, 16]
    down_proj_scales     uint8 [L, H, I/32]
    gate_up_proj_bias, down_proj_bias                where the family has biases

These are parameters, so loading, expert parallelism (which shards the first dimension) and saving treat them as any
other. A backend with a layout of its own takes them over in `settle`, so that they are not in memory twice; the state
dict still has them.

Letters: E experts · L experts on this rank · H hidden · I intermediate · T tokens · K experts per token · N output rows
of a matrix · C its contraction columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from epmoe.errors import UserError
from epmoe.formats import ExpertWeights
from epmoe.formats.mxfp4 import GROUP, Mxfp4Matrix
from epmoe.integrations.transformers.experts import dispatch_of, without_gradients
from epmoe.integrations.transformers.fit import PROJECTIONS, Layout, UnfitError
from epmoe.layers.norm import add_rows
from epmoe.moe.experts import EXPERTS, Experts
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.tables import lookup

BLOCKS, SCALES = "_blocks", "_scales"
STORED = tuple(name + suffix for name in PROJECTIONS for suffix in (BLOCKS, SCALES))


@dataclass(frozen=True)
class _Spread:
    """How a parameter lies over the ranks, to make the same again of what a backend gives back."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, value: torch.Tensor) -> "_Spread | None":
        """None: all of it is here."""
        if not isinstance(value, DTensor):
            return None
        return cls(value.device_mesh, value.placements, value.shape, value.stride())

    def wrap(self, local: torch.Tensor) -> torch.Tensor:
        """This rank's part as a tensor over the ranks."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


class PackedExperts(nn.Module):
    """The experts of `module`, in MXFP4, without values yet: on the meta device until they are loaded or `take`n.

    Args:
        module: of transformers, on any device; its weights may be on the meta device.
        layout: of it.
        experts: the backend: a name of EXPERTS, package.module:Class, or auto.
        stored: the checkpoint has blocks and scales. Else the module also has the parameters `gate_up_proj` and
            `down_proj` of the model, for its loader to find; they go as their values are quantised.

    Raises:
        UnfitError: rows that MXFP4's groups of 32 do not divide.
        UserError: an unknown backend.
    """

    def __init__(self, module: nn.Module, layout: Layout, experts: str = "auto", *, stored: bool = False) -> None:
        super().__init__()
        self.layout, self.backend_name = layout, experts
        self.of, self.config = type(module).__name__, module.config
        if experts != "auto":
            lookup("experts", EXPERTS, experts, Experts)
        self._packed: Experts | None = None
        self._made_of: tuple[tuple[int, int], ...] = ()  # whether what is packed is still what the parameters hold
        self._settled = False
        self._spread: dict[str, _Spread | None] = {}
        self.shapes = {name: _logical(getattr(module, name), layout) for name in PROJECTIONS}
        for name, (experts_E, rows, columns) in self.shapes.items():
            if columns % GROUP:
                raise UnfitError(f"has rows of {columns} values in {name}, and MXFP4 needs a multiple of {GROUP}")
            if not stored:
                like = getattr(module, name)
                empty = torch.empty(like.shape, dtype=like.dtype, device="meta")
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            lead = (experts_E, rows, columns // GROUP)
            self._set(name + BLOCKS, torch.empty((*lead, GROUP // 2), dtype=torch.uint8, device="meta"))
            self._set(name + SCALES, torch.empty(lead, dtype=torch.uint8, device="meta"))
            if layout.bias:
                bias = getattr(module, f"{name}_bias").detach()
                self.register_parameter(f"{name}_bias", nn.Parameter(bias, requires_grad=False))
        # Expert parallelism sets the first two to this rank's; `all_experts` stays.
        self.num_experts = self.all_experts = self.shapes[PROJECTIONS[0]][0]
        self._is_expert_parallel = False

    def quantize(self, projection: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter of the family's, or this rank's experts of it → {name here: tensor}; temporaries are bounded."""
        matrix = Mxfp4Matrix.quantize(self.layout.rows(projection, value.detach()))
        return {projection + BLOCKS: matrix.blocks_LNG16, projection + SCALES: matrix.scales_LNG}

    def placeholder_gone(self, projection: str) -> None:
        """The family's own parameter will not come: its values are here as blocks and scales."""
        self._parameters.pop(projection, None)

    def take(self, module: nn.Module) -> None:
        """Quantise the weights that `module` has, one matrix after the other; it is without them afterwards.

        Raises:
            UserError: they are spread over ranks.
        """
        if any(isinstance(value, DTensor) for value in module.parameters()):
            raise UserError(
                f"{self.of}: its experts are spread over ranks already: load the model with quantization_config"
            )
        for name in PROJECTIONS:
            for stored, value in self.quantize(name, getattr(module, name)).items():
                self._set(stored, value)
            setattr(module, name, None)
            self.placeholder_gone(name)

    def rows(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Slot rows [T, K, H] in x's dtype; zeros where an id is not in [0, L)."""
        packed = self.packed()
        return packed.forward(x_TH.contiguous(), dispatch_of(index_TK, weight_TK, self.num_experts, self.all_experts))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] → [T, H]: a token's rows added in the order of k, in float32."""

        def run(x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
            return add_rows(self.rows(x_TH, index_TK, weight_TK))

        return without_gradients(run, hidden_states, top_k_index, top_k_weights)

    # --- the backend's layout ----------------------------------------------------------------------------------------

    def backend(self, device: torch.device) -> type[Experts]:
        """The class that runs these experts there; auto is the first of the table that serves the device."""
        if self.backend_name != "auto":
            chosen: type[Experts] = lookup("experts", EXPERTS, self.backend_name, Experts)
            return chosen
        classes: list[type[Experts]] = [lookup("experts", EXPERTS, name, Experts) for name in EXPERTS]
        return next(each for each in classes if each.serves(device) and Mxfp4Matrix.format in each.formats)

    def packed(self) -> Experts:
        """The experts in their backend's layout, made anew where the parameters have changed."""
        if self._settled:
            assert self._packed is not None
            return self._packed
        values = {name: _local(value) for name, value in self.named_parameters(recurse=False)}
        if any(value.is_meta for value in values.values()):
            raise UserError(f"{self.of}: its experts have no values: load the model with from_pretrained")
        made_of = tuple((value.data_ptr(), _version(value)) for value in values.values())
        if self._packed is None or made_of != self._made_of:
            backend = self.backend(values[STORED[0]].device)
            self._packed, self._made_of = backend.pack(self._weights(values), self.layout.activation), made_of
        return self._packed

    def settle(self) -> None:
        """Leave the blocks and scales to a backend that has a layout of its own, so that they are in memory once."""
        first = _local(self._parameters[STORED[0]]) if not self._settled else None
        if first is None or first.is_meta or issubclass(self.backend(first.device), ReferenceExperts):
            return
        self.packed()
        given_up = {name: self._parameters.pop(name) for name in STORED}
        self._spread = {name: _Spread.of(value) for name, value in given_up.items() if value is not None}
        self._settled = True

    def unsettle(self) -> None:
        """The blocks and scales are parameters again, bit for bit what they were."""
        if self._settled:
            values = self._unpacked()
            self._settled, self._packed = False, None
            for name, value in values.items():
                self._set(name, value)

    def _unpacked(self) -> dict[str, torch.Tensor]:
        """What a backend has taken over, by the parameters' names."""
        assert self._packed is not None
        weights, found = self._packed.unpack(), {}
        for name, matrix in zip(PROJECTIONS, (weights.gate_up, weights.down), strict=True):
            assert isinstance(matrix, Mxfp4Matrix)
            for stored, value in ((name + BLOCKS, matrix.blocks_LNG16), (name + SCALES, matrix.scales_LNG)):
                spread = self._spread[stored]
                found[stored] = value if spread is None else spread.wrap(value)
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._settled:
            destination |= {prefix + name: value for name, value in self._unpacked().items()}

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unsettle()
        super()._load_from_state_dict(*args)
        self.settle()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        self.unsettle()
        super()._apply(fn, recurse)
        self.settle()
        return self

    def _set(self, name: str, value: torch.Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def _weights(self, values: dict[str, torch.Tensor]) -> ExpertWeights:
        gate_up, down = (Mxfp4Matrix(values[name + BLOCKS], values[name + SCALES]) for name in PROJECTIONS)
        return ExpertWeights(gate_up, self._bias(values, gate_up, 0), down, self._bias(values, down, 1))

    def _bias(self, values: dict[str, torch.Tensor], matrix: Mxfp4Matrix, which: int) -> torch.Tensor:
        """[L, N] in the order of the matrix's rows, zeros where the family has none."""
        bias_LN = values.get(f"{PROJECTIONS[which]}_bias")
        if bias_LN is None:
            return torch.zeros(matrix.shape[:2], dtype=torch.float32, device=matrix.device)
        return self.layout.interleave(bias_LN) if which == 0 else bias_LN

    def extra_repr(self) -> str:
        """The family's class, and the experts in words."""
        (experts, rows, hidden), name = self.shapes[PROJECTIONS[0]], self.backend_name
        return f"{self.of}: {experts} experts of {hidden}×{rows // 2} in MXFP4, experts={name}"


def _logical(value: torch.Tensor, layout: Layout) -> tuple[int, int, int]:
    """(E, N, C) of a family's parameter."""
    experts, rows, columns = value.shape
    return (experts, columns, rows) if layout.transposed else (experts, rows, columns)


def _local(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value.to_local() if isinstance(value, DTensor) else value


def _version(value: torch.Tensor) -> int:
    """How often it was written to in place; tensors of the inference mode do not count."""
    return 0 if value.is_inference() else value._version
