"""The community `gpt-oss-triton-kernels` behind the interface of our experts, for benchmarks that compare with them.

Letters: T tokens · H hidden · I intermediate · L experts on this rank · K experts per token.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from epmoe.formats import ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.moe.experts import GatedActivation
from epmoe.moe.router import Dispatch


@cache
def _hub(repository: Path) -> Any:
    from kernels import get_local_kernel

    return get_local_kernel(repository)


@dataclass(frozen=True)
class Routing:
    """A Dispatch in the peer's words."""

    data: Any
    gather: Any
    scatter: Any


class HubExperts:
    """Packs MXFP4 weights for the peer's `matmul_ogs` and runs its two products, SwiGLU fused as it does in use."""

    def __init__(self, repository: Path, weights: ExpertWeights, activation: GatedActivation) -> None:
        self.hub = _hub(repository)
        assert activation.up_offset == 1.0, "the peer's SwiGLU adds 1"
        ogs = self.hub.matmul_ogs
        specs = ogs.FnSpecs("swiglu", self.hub.swiglu.swiglu_fn, ("alpha", "limit"))
        self.activation = ogs.FusedActivation(specs, (activation.alpha, activation.limit), 2)
        self.gate_up, self.gate_up_precision = self._packed(weights.gate_up)
        self.down, self.down_precision = self._packed(weights.down)
        self.gate_up_bias, self.down_bias = weights.gate_up_bias_LN.float(), weights.down_bias_LH.float()

    def _packed(self, matrix: Any) -> tuple[Any, Any]:
        assert isinstance(matrix, Mxfp4Matrix)
        hub, ogs = self.hub, self.hub.matmul_ogs
        local, rows, columns = matrix.shape
        layout, options = hub.tensor_details.layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        value = hub.tensor.wrap_torch_tensor(matrix.blocks_LNG16.flatten(2).transpose(1, 2), dtype=hub.tensor.FP4)
        value = hub.tensor.convert_layout(value, layout, **options)
        value.shape = torch.Size([local, columns, rows])
        scale = hub.tensor.wrap_torch_tensor(matrix.scales_LNG.transpose(1, 2))
        scale = hub.tensor.convert_layout(scale, hub.tensor_details.layout.StridedLayout)
        flex = ogs.FlexCtx(rhs_data=ogs.InFlexData())
        return value, ogs.PrecisionConfig(weight_scale=scale, flex_ctx=flex)

    def routing(self, dispatch: Dispatch) -> Routing:
        """Rows sorted by expert are what both have; only the marks of unused rows differ."""
        hub, slots = self.hub.routing, dispatch.slot_R.numel()
        count_L = dispatch.offset_L1.diff()
        slot_R = torch.where(dispatch.slot_R < slots, dispatch.slot_R, -1)
        weight_R = dispatch.weight_TK.flatten()[slot_R.clamp(min=0).long()]
        data = hub.compute_expt_data_torch(count_L, len(count_L), slots)
        return Routing(
            hub.RoutingData(weight_R, count_L, len(count_L), dispatch.expert_TK.shape[1], data),
            hub.GatherIndx(src_indx=slot_R, dst_indx=dispatch.row_S),
            hub.ScatterIndx(src_indx=dispatch.row_S, dst_indx=slot_R),
        )

    def forward(self, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[T, H] → [T, H]: the peer adds a token's K rows itself."""
        matmul = self.hub.matmul_ogs.matmul_ogs
        h = matmul(
            x_TH,
            self.gate_up,
            self.gate_up_bias,
            routing.data,
            gather_indx=routing.gather,
            precision_config=self.gate_up_precision,
            gammas=None,
            fused_activation=self.activation,
        )
        return matmul(
            h,
            self.down,
            self.down_bias,
            routing.data,
            scatter_indx=routing.scatter,
            precision_config=self.down_precision,
            gammas=routing.data.gate_scal,
        )
