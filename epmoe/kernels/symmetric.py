"""Memory that the GPUs of one node map into each other, so that a kernel can write into a peer's."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from epmoe.ranks.mesh import Ranks

MARKS = 256  # bytes at the beginning of a place: an int32 for each of up to 64 ranks
ALIGNED = 16  # a place's address is a multiple
# What memory holds where nothing has come yet: all bits set. Of bf16 and float32 it is a NaN that no arithmetic of
# NVIDIA's GPUs makes (theirs are 0x7FFF and 0x7FFFFFFF).
POISON = -1


@dataclass(frozen=True, eq=False)
class Place:
    """Memory for the rows of one exchange, on every rank of a group, as this rank sees it: marks, then rows.

    A rank's mark says that it has come so far; its rows come by themselves. Both are POISON until they are there, and
    POISON again when they have been read.
    """

    rank: int
    byte_N: tuple[torch.Tensor, ...]  # uint8, the place on each rank
    address_N: torch.Tensor  # int64 on this rank's device, where each begins

    @property
    def mark_N(self) -> torch.Tensor:
        """int32 [N], on this rank."""
        return self.byte_N[self.rank][:MARKS].view(torch.int32)[: len(self.byte_N)]

    def rows(self, shape: Sequence[int], dtype: torch.dtype, rank: int | None = None) -> torch.Tensor:
        """The rows on this rank or on another one."""
        count = torch.Size(shape).numel()
        byte_X = self.byte_N[self.rank if rank is None else rank]
        return byte_X[MARKS:].view(dtype)[:count].view(shape)


def possible(device: torch.device) -> bool:
    """Whether such devices can have symmetric memory at all: NVIDIA's. AMD's, torch's "cuda" too, make other NaNs, and
    a kernel of theirs need not see what a peer writes while it runs.
    """
    return device.type == "cuda" and torch.version.hip is None


def allocate(count: int, ranks: Ranks) -> torch.Tensor:
    """`count` bytes that peers can map, POISON throughout.

    Raises:
        RuntimeError: a peer's device cannot be reached, or torch cannot allocate such memory.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    first = ranks.local_rank - ranks.expert_rank  # on one node a rank's device has its local rank's number
    for peer in range(first, first + ranks.expert_size):
        if peer != ranks.local_rank and not torch.cuda.can_device_access_peer(ranks.device, peer):
            raise RuntimeError(f"device {ranks.local_rank} has no access to the memory of device {peer}")
    buffer = _SymmetricMemory.empty_strided_p2p((count,), (1,), torch.uint8, ranks.device)
    buffer.fill_(255)
    torch.accelerator.synchronize(ranks.device)  # before a peer may write
    return buffer


def rendezvous(buffer: torch.Tensor, group: dist.ProcessGroup) -> tuple[list[torch.Tensor], Any]:
    """The ranks' buffers as this rank sees them, this one's among them; and what keeps them mapped, as `buffer` keeps
    its own memory: these tensors do not.

    Keeps Python's lock while it waits for the other ranks, so the watch is deaf meanwhile: they must be there.
    """
    from torch.distributed import _symmetric_memory

    # Else torch would make a multicast object too, which these kernels do not use and some machines refuse.
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    handle = _symmetric_memory.rendezvous(buffer, group.group_name)
    return [handle.get_buffer(peer, (len(buffer),), torch.uint8) for peer in range(group.size())], handle
