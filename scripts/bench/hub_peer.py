"""The community's kernels as others use them: the second product adds a token's K rows itself. For moe.py.

What experts=hub has beside that, rows of slots, is `HubExperts.forward`, which is measured there too.

Letters: T tokens · H hidden · K experts per token · R rows.
"""

from dataclasses import dataclass
from typing import Any

import torch

from epmoe.moe.experts.hub import HubExperts
from epmoe.moe.router import Dispatch


@dataclass(frozen=True)
class Routing:
    """A Dispatch in the package's words."""

    data: Any
    gather: Any
    scatter: Any


def routing(experts: HubExperts, dispatch: Dispatch) -> Routing:
    """Made outside of what is timed: others make it in their router."""
    words, slots = experts.package.routing, dispatch.slot_R.numel()
    count_L = dispatch.offset_L1.diff()
    slot_R = torch.where(dispatch.slot_R < slots, dispatch.slot_R, -1)
    weight_R = dispatch.weight_TK.flatten()[slot_R.clamp(min=0).long()]
    data = words.compute_expt_data(count_L, len(count_L), slots)
    return Routing(
        words.RoutingData(weight_R, count_L, len(count_L), dispatch.expert_TK.shape[1], data),
        words.GatherIndx(src_indx=slot_R, dst_indx=dispatch.row_S),
        words.ScatterIndx(src_indx=dispatch.row_S, dst_indx=slot_R),
    )


def summed(experts: HubExperts, x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """[T, H] → [T, H]."""
    matmul, gate_up, down = experts.package.matmul_ogs.matmul_ogs, experts.gate_up, experts.down
    h_RI = matmul(
        x_TH,
        gate_up.value,
        gate_up.bias_LN,
        routing.data,
        gather_indx=routing.gather,
        precision_config=gate_up.precision,
        fused_activation=experts.fused,
    )
    found: torch.Tensor = matmul(
        h_RI,
        down.value,
        down.bias_LN,
        routing.data,
        scatter_indx=routing.scatter,
        precision_config=down.precision,
        gammas=routing.data.gate_scal,
    )
    return found
