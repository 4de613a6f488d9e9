"""Memory of a rank: how much is free, and how much was used."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from epmoe.errors import UserError

NO_LIMIT = 1 << 62  # bytes; version 1 of control groups says as much where nobody set one


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: of a device with what torch's allocator holds in reserve, of a CPU within the
    limits of the machine, of this process (ulimit -v) and of its control groups, beyond which the kernel ends it.
    """
    if device.type != "cpu":
        free, _ = torch.accelerator.get_memory_info(device)
        return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return max(0, min(machine_bytes(), process_bytes(), group_bytes()))


def machine_bytes() -> int:
    """What the machine has left."""
    return _field("/proc/meminfo", "MemAvailable:")


def process_bytes() -> int:
    """What RLIMIT_AS leaves this process of address space; more than that is not allocated."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return NO_LIMIT if limit == resource.RLIM_INFINITY else limit - _field("/proc/self/status", "VmSize:")


def group_bytes(root: Path = Path("/")) -> int:
    """What the control groups of this process leave it, of either version: the least of its own and those above it.

    Cached files count as used there, and the kernel drops them first.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return NO_LIMIT
    free = NO_LIMIT
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        # Within a container the path may be the host's, and not be there.
        for folder in (top, *(top / Path(*Path(path).parts[1 : end + 1]) for end in range(1, len(Path(path).parts)))):
            free = min(free, _group_free(folder, *names))
    return free


def _group_free(folder: Path, limit: str, used: str, cached: str) -> int:
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return NO_LIMIT if most == "max" else int(most) - now + int(rows.get(cached, 0))
    except (OSError, ValueError):
        return NO_LIMIT


def _field(file: str, name: str) -> int:
    """Bytes of a line of a file of /proc."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:  # not Linux: allocations will tell
        return NO_LIMIT
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), NO_LIMIT)


def peak_bytes(device: torch.device) -> int:
    """The most bytes that this rank held: tensors on its device, or the resident memory of a CPU rank."""
    if device.type == "cpu":
        try:
            # Not getrusage, whose maximum a process inherits from the one that started it.
            lines = Path("/proc/self/status").read_text().splitlines()
        except FileNotFoundError:  # macOS, where getrusage counts bytes
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    return torch.accelerator.max_memory_allocated(device)


def is_full(error: BaseException) -> bool:
    """Whether memory ran out: a device's, or the host's, of which torch tells in words alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "can't start new thread")
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in told)


def full(error: BaseException) -> UserError:
    """What to say of memory that ran out where nobody expected it."""
    return UserError(
        f"memory ran out ({type(error).__name__}: {error}): end what else runs there, raise the limit (ulimit -v, the "
        "container's), or use more ranks"
    )


@contextmanager
def told_when_full(
    device: torch.device, remedy: str = "lower runtime.max_batch, runtime.prefill_chunk or runtime.cache_tokens"
) -> Iterator[None]:
    """Memory that runs out within the block is a mistake that the user can mend, as `remedy` says.

    Raises:
        UserError: instead of torch's OutOfMemoryError, or what a host without memory raises.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_full(error):
            raise
        left = free_bytes(device) / 1e9
        raise UserError(f"{device} ran out of memory with {left:.1f} GB left: {remedy}") from error
