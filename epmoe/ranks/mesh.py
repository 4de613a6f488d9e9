"""Ranks: this process's coordinates, the process group and the device mesh; a clean start and a clean end.

`start` reads what torchrun (or Slurm, or a hand) put into the environment. Without any of it there is one rank and no
process group. Which device a rank has is decided here; files with kernels ask for its type.

    main(body)                 runs a command: one line for a user's mistake, the exit code
      start(...) → Ranks       store → watch → device → process group → mesh
"""

import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from epmoe.errors import UserError
from epmoe.ranks.launch import BACKENDS, Launch, open_store, rank_device, stdout_closed
from epmoe.ranks.watch import Watch


class Closable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. `expert_*` come from the mesh; `local_rank` only ever picks the device."""

    rank: int
    size: int
    local_rank: int
    nodes: int
    device: torch.device
    expert_rank: int = 0
    expert_size: int = 1
    expert_group: dist.ProcessGroup | None = None  # None when expert_size is 1
    watch: Watch | None = None  # None when size is 1
    start_timeout_s: float = 3600.0
    # What must let go of the group's collectives before the group can end: CUDA graphs that hold some.
    at_end: WeakSet[Closable] = field(default_factory=WeakSet, compare=False, repr=False)
    # The same, and what must not be freed before: that would wait for the device, perhaps within a capture.
    until_end: list[Closable] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with expert rank 0's; a collective of the expert group."""
        if self.expert_group is not None:
            dist.broadcast(tensor, group=self.expert_group, group_src=0)

    def broadcast_json(self, value: Any) -> Any:
        """`value` of expert rank 0, anything that JSON can hold, on every rank; a collective of the expert group."""
        if self.expert_group is None:
            return value
        data = json.dumps(value).encode() if self.expert_rank == 0 else b""
        size = torch.tensor([len(data)], device=self.device)
        self.broadcast(size)
        content = torch.zeros(int(size), dtype=torch.uint8)
        if self.expert_rank == 0:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        content = content.to(self.device)
        self.broadcast(content)
        return json.loads(bytes(content.tolist()))

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Each rank's values, by expert rank; a collective of the expert group."""
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        if self.expert_group is None:
            return [mine.tolist()]
        everyone = [torch.empty_like(mine) for _ in range(self.expert_size)]
        dist.all_gather(everyone, mine, group=self.expert_group)
        return [each.tolist() for each in everyone]

    def meet(self, purpose: str = "") -> None:
        """Wait for every rank, at most start_timeout_s: between a work that takes some ranks much longer (a download,
        reading weights or standard input) and a collective, in which ranks wait for each other for timeout_s only.

        The watch goes on: a rank that dies or stops meanwhile is noticed as soon as ever. A rank that comes with
        another `purpose` than rank 0's ends the run, and is named.
        """
        if self.watch is not None:
            self.watch.meet(self.start_timeout_s, "runtime.start_timeout_s", purpose)

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each rank's tensor of one shape, by expert rank: [N, *shape]; a collective of the expert group."""
        if self.expert_group is None:
            return tensor[None]
        everyone = tensor.new_zeros(self.expert_size, *tensor.shape)
        everyone[self.expert_rank] = tensor
        dist.all_reduce(everyone, group=self.expert_group)  # exact: every other rank adds zero
        return everyone

    def barrier(self) -> None:
        """Wait for every rank of the expert group, at most the group's timeout."""
        if self.expert_group is not None:
            dist.barrier(group=self.expert_group)


@contextmanager
def start(
    *,
    device: str = "auto",
    expert: int = 0,
    timeout_s: float = 60.0,
    start_timeout_s: float = 3600.0,
    threads: int = 1,
) -> Iterator[Ranks]:
    """Join the other ranks; leave them, all together, at the end of the block.

    Within the block of several ranks a watch ends this process when another rank dies, stops or fails, and no exception
    leaves the block: it ends every rank, and rank 0 tells it. `threads` is the same for every number of ranks, since
    CPU products depend on it. Main thread only.

    Raises:
        UserError: a wrong environment, `device` or `expert`; rank 0 is not to be reached.
    """
    launch = Launch.read()
    torch.set_num_threads(threads)
    if expert not in (0, launch.size):
        raise UserError(f"mesh.expert={expert} is not the number of ranks, {launch.size}: leave it at 0")
    if launch.size == 1:
        yield Ranks(0, 1, launch.local_rank, 1, rank_device(device, launch))
        return
    store, host = open_store(launch, timeout_s)
    watch = Watch(launch.rank, launch.size, store, host, timeout_s)
    try:
        ranks = _group(launch, rank_device(device, launch), store, timeout_s)
        yield replace(ranks, watch=watch, start_timeout_s=start_timeout_s)
        for holder in (*ranks.at_end, *ranks.until_end):
            holder.close()
        watch.finish()
    except UserError as error:
        watch.fail("mistake", str(error), 2)
    except (Exception, SystemExit) as error:
        if isinstance(error, BrokenPipeError) and stdout_closed():
            watch.fail("closed", "", 0)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        watch.fail("error", line, 1, traceback.format_exc())
    dist.destroy_process_group()
    watch.close()


def _group(launch: Launch, device: torch.device, store: dist.Store, timeout_s: float) -> Ranks:
    """The process group and the mesh over it."""
    dist.init_process_group(
        BACKENDS[device.type],  # spelt out: a group of two default backends crashes some interpreters at exit
        store=store,
        rank=launch.rank,
        world_size=launch.size,
        timeout=timedelta(seconds=timeout_s),
        device_id=None if device.type == "cpu" else device,
    )
    mesh = init_device_mesh(device.type, (launch.size,), mesh_dim_names=("expert",))
    return Ranks(
        rank=launch.rank,
        size=launch.size,
        local_rank=launch.local_rank,
        nodes=launch.nodes,
        device=device,
        expert_rank=mesh.get_local_rank("expert"),
        expert_size=mesh.size(),
        expert_group=mesh.get_group("expert"),
    )
