"""Memory that the GPUs of one node map into each other, and torch's all-reduce over it."""

import os
from typing import Any

import torch
import torch.distributed as dist

from epmoe.ranks.mesh import Ranks


def possible(device: torch.device) -> bool:
    """Whether such devices can have symmetric memory at all."""
    return device.type == "cuda"


def allocate(count: int, ranks: Ranks) -> torch.Tensor:
    """`count` bytes that peers can map, by themselves: torch's ops take addresses from the block's beginning.

    Raises:
        RuntimeError: a peer's device cannot be reached, or torch cannot allocate such memory.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    first = ranks.local_rank - ranks.expert_rank  # on one node a rank's device has its local rank's number
    for peer in range(first, first + ranks.expert_size):
        if peer != ranks.local_rank and not torch.cuda.can_device_access_peer(ranks.device, peer):
            raise RuntimeError(f"device {ranks.local_rank} has no access to the memory of device {peer}")
    return _SymmetricMemory.empty_strided_p2p((count,), (1,), torch.uint8, ranks.device)


def rendezvous(buffer: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Keeps Python's lock while it waits for the other ranks, so the watch is deaf meanwhile: they must be there."""
    from torch.distributed import _symmetric_memory

    # Else torch would make a multicast object too, which this kernel does not use and some machines refuse.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    return _symmetric_memory.rendezvous(buffer, group.group_name)


def two_shot(flat: torch.Tensor, group: dist.ProcessGroup) -> None:
    """The sum over the ranks, in place, of memory that `allocate` gave, from its beginning on."""
    torch.ops.symm_mem.two_shot_all_reduce_(flat, "sum", group.group_name)
