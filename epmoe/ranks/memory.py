"""Memory of a rank: how much is free, and how much was used."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from epmoe.errors import UserError
from epmoe.ranks.mesh import Ranks


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated, with what torch's allocator holds in reserve."""
    if device.type != "cpu":
        free, _ = torch.accelerator.get_memory_info(device)
        return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux: allocations will tell
        return sys.maxsize
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def peak_bytes(ranks: Ranks) -> int:
    """The most bytes that this rank held: tensors on its device, or the resident memory of a CPU rank."""
    if ranks.device.type == "cpu":
        try:
            # Not getrusage, whose maximum a process inherits from the one that started it.
            lines = Path("/proc/self/status").read_text().splitlines()
        except FileNotFoundError:  # macOS, where getrusage counts bytes
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    return torch.accelerator.max_memory_allocated(ranks.device)


@contextmanager
def told_when_full(device: torch.device) -> Iterator[None]:
    """A device that runs out of memory within the block is a mistake that the user can mend.

    Raises:
        UserError: instead of torch's OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device} ran out of memory with {free_bytes(device) / 1e9:.1f} GB left: "
            "lower runtime.max_batch, runtime.prefill_chunk or runtime.cache_tokens"
        ) from error
