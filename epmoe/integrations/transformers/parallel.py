"""Expert parallelism in transformers whose sums do not depend on the number of ranks.

transformers' `all_reduce` adds, for a token, each rank's sum of its experts: other ranks, other roundings. Here a slot,
one (token, k) pair, has one owner, whose row travels whole; every rank then adds a token's K rows in the order
k = 0 … K-1 in float32, as one rank does. The bits of a model on any number of ranks are those on one, where nothing
else is split: `expert_parallel` makes such a configuration.

An example: 4 experts on 2 ranks, K = 2, token t chose experts 1 and 2 with weights w1 and w2.

    rank                 0                   1
    its experts          0 1                 2 3
    local index[t]       [1, 2]              [2, 0]          2 = num_local: another rank's
    rows[t]              [w1·E1(t), 0]       [0, w2·E2(t)]
    after all_reduce     [w1·E1(t), w2·E2(t)] on both; the sum of the two, in this order, is the output

Letters: T tokens · H hidden · K experts per token.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from epmoe.integrations.transformers.experts import NAME, plain_rows, slot_rows, without_gradients
from epmoe.integrations.transformers.packed import PackedExperts
from epmoe.layers.norm import add_rows

SLOTS = "slots"


class SlotsParallel(EPImplementation):
    """`ep_implementation="slots"`: all ranks have all tokens, and each adds all K rows of a token in order.

    Runs any `experts_implementation`. The same bits on any number of ranks need one whose rows do not depend on the
    other experts: `EpmoeConfig`, "epmoe" and "eager" are such. For inference only.
    """

    needs_shared_batch = True

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = (experts,)  # in a tuple, as nobody's submodule

    def __call__(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """[T, H] and global expert ids → [T, H], the same on every rank; a collective of the expert group."""
        return without_gradients(self._run, x_TH, index_TK, weight_TK)

    def _run(self, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        local = self.num_local_experts
        elsewhere_TK = index_TK // local != self.ep_mesh.get_local_rank()
        local_TK = torch.where(elsewhere_TK, local, index_TK % local)
        rows_TKH = self._rows(x_TH, local_TK, weight_TK.masked_fill(elsewhere_TK, 0.0))
        if rows_TKH.numel():
            # Sums of one row and zeros: exact, in whatever order the network adds.
            dist.all_reduce(rows_TKH, group=self.ep_mesh.get_group())
        return add_rows(rows_TKH)

    def _rows(self, x_TH: torch.Tensor, local_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        (experts,) = self.experts
        if isinstance(experts, PackedExperts):
            return experts.rows(x_TH, local_TK, weight_TK)
        if experts.config._experts_implementation == NAME:  # type: ignore[union-attr]
            return plain_rows(experts, x_TH, local_TK, weight_TK)
        return slot_rows(self.experts_forward, x_TH, local_TK, weight_TK).contiguous()


def expert_parallel(config: Any, ranks: int) -> DistributedConfig:
    """A `distributed_config` under which `ranks` ranks have different experts, and all of everything else.

    transformers ties the expert group to the tensor-parallel one and refuses an empty plan for that, so each rule of
    the model's plan is named and says "replicate".

    Args:
        config: the model's, as AutoConfig gives it.
        ranks: as many as the process group has; transformers wants a divisor of the number of experts.
    """
    with torch.device("meta"):
        rules = AutoModelForCausalLM.from_config(config).tp_plan
    return DistributedConfig(
        tp_size=ranks, ep_size=ranks, tp_plan=dict.fromkeys(rules, "replicate"), ep_implementation=SLOTS
    )


EPImplementationInterface.register(SLOTS, SlotsParallel)
