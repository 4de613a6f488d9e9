"""Ranks: this process's coordinates, the process group and the device mesh; a clean start and a clean end.

`start` reads what torchrun (or Slurm, MPI, a hand) put into the environment. Without any of it there is one rank and no
process group. Which device a rank has is decided here; files with kernels ask for its type.

    main(body)                 runs a command: one line for a user's mistake, the exit code
      start(...) → Ranks       store → watch → settings → device → process group → mesh
"""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from epmoe.errors import UserError
from epmoe.ranks.admission import age_s
from epmoe.ranks.launch import (
    BACKENDS,
    Launch,
    Patience,
    check_devices,
    open_store,
    rank_device,
    stdout_closed,
    tell_device,
    wake,
)  # fmt: skip
from epmoe.ranks.machine import machine
from epmoe.ranks.meeting import Meeting
from epmoe.ranks.memory import full, is_full
from epmoe.ranks.watch import Watch

START_KEY = "runtime.start_timeout_s"  # the configuration's key for how long ranks wait for each other's start


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
            self.watch.meet(Meeting(self.start_timeout_s, START_KEY, purpose=purpose))

    def agree(self, brings: Callable[[], Mapping[str, str]], alike: str, *, settled: bool = False) -> None:
        """Meet with what must be the same on every rank; `brings` names each value. A rank alone does not ask for it.

        A rank whose values differ ends the run: one line names it, the first value that differs, and `alike`, the
        remedy. `settled`: before what is seen outside: the ranks of two runs that were started at once with one
        MASTER_PORT must not come through (epmoe/ranks/admission.py).
        """
        if self.watch is not None:
            found = dict(brings())
            self.watch.meet(Meeting(self.start_timeout_s, START_KEY, settled=settled, brings=found, alike=alike))

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each rank's tensor of one shape, by expert rank: [N, *shape]; a collective of the expert group."""
        if self.expert_group is None:
            return tensor[None]
        everyone = tensor.new_zeros(self.expert_size, *tensor.shape)
        everyone[self.expert_rank] = tensor
        dist.all_reduce(everyone, group=self.expert_group)  # exact: every other rank adds zero
        return everyone

    def beside(self, tensor_RX: torch.Tensor, columns: Sequence[int]) -> torch.Tensor:
        """All ranks' columns side by side, by expert rank, each rank's so many: [R, sum]; a collective of the group.

        Copies, so bits stay, those of a negative zero too.
        """
        if self.expert_group is None:
            return tensor_RX
        even, mine = min(columns) == max(columns), tensor_RX
        if not even or not mine.is_contiguous():
            mine = tensor_RX.new_zeros(len(tensor_RX), max(columns))
            mine[:, : tensor_RX.shape[1]] = tensor_RX
        everyone = mine.new_empty(self.expert_size * len(mine), mine.shape[1])
        _all_gather(everyone, mine, group=self.expert_group)
        parts = everyone.view(self.expert_size, *mine.shape)
        if even:
            return parts.transpose(0, 1).flatten(1)
        return torch.cat([each[:, :count] for each, count in zip(parts, columns, strict=True)], dim=1)

    def barrier(self) -> None:
        """Wait for every rank of the expert group, at most the group's timeout."""
        if self.expert_group is not None:
            dist.barrier(group=self.expert_group)


# Its name since torch 2.13, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def start(
    *,
    device: str = "auto",
    expert: int = 0,
    timeout_s: float = 60.0,
    start_timeout_s: float = 3600.0,
    threads: int = 1,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Ranks]:
    """Join the other ranks; leave them, all together, at the end of the block.

    Within the block of several ranks a watch ends this process when another rank dies, stops or fails, and no exception
    leaves the block: it ends every rank, and rank 0 tells it. `threads` is the same for every number of ranks, since
    CPU products depend on it. Ranks with other `settings`, or of another kind (epmoe/ranks/machine.py), end the run
    before there is a group: its backend may differ with them. Main thread only.

    Raises:
        UserError: a wrong environment, `device` or `expert`; rank 0 is not to be reached.
    """
    launch = Launch.read()
    torch.set_num_threads(threads)
    if expert not in (0, launch.size):
        raise UserError(f"mesh.expert={expert} is not the number of ranks, {launch.size}: leave it at 0")
    if launch.size == 1:
        alone = Ranks(0, 1, launch.local_rank, 1, rank_device(device, launch))
        wake(alone.device)  # several meet on it at once
        yield alone
        return
    patience = Patience.of(timeout_s, age_s())
    store, host = open_store(launch, timeout_s, patience)
    watch = Watch(launch, store, host, timeout_s, patience)
    watch.gather()
    met = Ranks(
        launch.rank, launch.size, launch.local_rank, launch.nodes, torch.device("cpu"),
        watch=watch, start_timeout_s=start_timeout_s,
    )  # fmt: skip
    try:
        met.agree(lambda: settings or {}, "start every rank with the same keys")
        met = replace(met, device=rank_device(device, launch))
        tell_device(launch, met.device, store)
        met.agree(lambda: machine(met.device), "let every rank have the same")
        check_devices(launch, met.device, store)
        ranks = _grouped(met, store, timeout_s)
        yield ranks
        for holder in (*ranks.at_end, *ranks.until_end):
            holder.close()
        watch.finish()
    except (Exception, SystemExit) as error:
        fail(watch, error)
    dist.destroy_process_group()
    watch.close()


def fail(watch: Watch, error: BaseException) -> NoReturn:
    """End every rank because of what this one has raised, on any thread; called where it is caught."""
    if isinstance(error, UserError):
        watch.fail("mistake", str(error), 2)
    if isinstance(error, BrokenPipeError) and stdout_closed():
        watch.fail("closed", "", 0)
    if is_full(error):
        watch.fail("mistake", str(full(error)), 2)
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    watch.fail("error", line, 1, traceback.format_exc())


def _grouped(met: Ranks, store: dist.Store, timeout_s: float) -> Ranks:
    """The same rank with the process group and the mesh over it."""
    device = met.device
    dist.init_process_group(
        BACKENDS[device.type],  # spelt out: a group of two default backends crashes some interpreters at exit
        store=store,
        rank=met.rank,
        world_size=met.size,
        timeout=timedelta(seconds=timeout_s),
        device_id=None if device.type == "cpu" else device,
    )
    mesh = init_device_mesh(device.type, (met.size,), mesh_dim_names=("expert",))
    return replace(
        met,
        expert_rank=mesh.get_local_rank("expert"),
        expert_size=mesh.size(),
        expert_group=mesh.get_group("expert"),
    )
