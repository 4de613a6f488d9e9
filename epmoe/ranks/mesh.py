"""Ranks: this process's coordinates, the process group and the device mesh; a clean start and a clean end.

`start` reads what torchrun (or Slurm, MPI, a hand) put into the environment. Without any of it there is one rank and no
process group. Which device a rank has is decided here; files with kernels ask for its type.

    main(body)                 runs a command: one line for a user's mistake, the exit code
      start(...) → Ranks       store → watch → settings → device → process groups along the mesh's axes (axes.py)
"""

import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from epmoe.errors import UserError
from epmoe.ranks.admission import age_s
from epmoe.ranks.axes import Axes
from epmoe.ranks.launch import (
    BACKENDS,
    Launch,
    Patience,
    check_devices,
    nodes_of,
    open_store,
    rank_device,
    stdout_closed,
    tell_device,
    tell_node,
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
    """Where this process stands. `replica` and `expert_*` come from the mesh; `local_rank` only picks the device."""

    rank: int
    size: int
    local_rank: int
    nodes: int  # that the replica's ranks are on
    device: torch.device
    expert_rank: int = 0
    expert_size: int = 1
    expert_group: dist.ProcessGroup | None = None  # the replica's own ranks; None when expert_size is 1
    replica: int = 0
    replicas: int = 1
    # This expert rank of each replica, on the host: a lost one must leave the others no communicator to end with it.
    replica_group: dist.ProcessGroup | None = None  # None when there is one replica
    neighbours: int = 1  # ranks of this machine, of whichever replica: they share its processors and the host's memory
    units: tuple[tuple[int, ...], ...] = ((0,),)  # replicas that are lost together (`Axes.units`)
    watch: Watch | None = None  # None when size is 1
    start_timeout_s: float = 3600.0
    # What must let go of the group's collectives before the group can end: CUDA graphs that hold some.
    at_end: WeakSet[Closable] = field(default_factory=WeakSet, compare=False, repr=False)
    # The same, and what must not be freed before: that would wait for the device, perhaps within a capture.
    until_end: list[Closable] = field(default_factory=list, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this is its replica's first rank, whose orders the others of the replica obey."""
        return self.expert_rank == 0

    @property
    def first(self) -> int:
        """The replica's first rank, as a rank of all."""
        return self.rank - self.expert_rank

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with expert rank 0's; a collective of the expert group."""
        if self.expert_group is not None:
            dist.broadcast(tensor, group=self.expert_group, group_src=0)

    def spread(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with rank 0's; a collective of all ranks."""
        if self.replica_group is not None and self.leads:
            host = tensor.cpu()
            dist.broadcast(host, group=self.replica_group, group_src=0)
            tensor.copy_(host)
        self.broadcast(tensor)

    def broadcast_json(self, value: Any) -> Any:
        """`value` of rank 0, anything that JSON can hold, on every rank; a collective of all ranks."""
        if self.size == 1:
            return value
        data = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(data)], device=self.device)
        self.spread(size)
        content = torch.zeros(int(size), dtype=torch.uint8)
        if self.is_main:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        content = content.to(self.device)
        self.spread(content)
        return json.loads(bytes(content.tolist()))

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Each rank's values, by expert rank; a collective of the expert group."""
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        return [each.tolist() for each in _everyone(mine, self.expert_group)]

    def gather_all(self, values: Sequence[int]) -> list[list[int]]:
        """Each rank's values, by rank; a collective of all ranks."""
        mine = torch.tensor(self.gather(values), dtype=torch.int64)
        return [each for replica in _everyone(mine, self.replica_group) for each in replica.tolist()]

    def across_replicas(self, data: bytes) -> list[bytes]:
        """Each replica's bytes, of which all of its ranks have the same, by replica; a collective of all ranks."""
        if self.replica_group is None:
            return [data]
        lengths = [int(each) for each in _everyone(torch.tensor([len(data)]), self.replica_group)]
        mine = torch.frombuffer(bytearray(data.ljust(max(*lengths, 1))), dtype=torch.uint8)
        everyone = zip(_everyone(mine, self.replica_group), lengths, strict=True)
        return [each[:length].numpy().tobytes() for each, length in everyone]

    def meet(self, purpose: str = "") -> None:
        """Wait for every rank, at most start_timeout_s: between a work that takes some ranks much longer (a download,
        reading weights or standard input) and a collective, in which ranks wait for timeout_s only.

        The watch goes on: a rank that dies or stops meanwhile is noticed as soon as ever. A rank that comes with
        another `purpose` than rank 0's ends the run, and is named.
        """
        if self.watch is not None:
            self.watch.meet(Meeting(self.start_timeout_s, START_KEY, purpose=purpose))

    def meet_after_work(self, purpose: str) -> None:
        """As `meet`, but after work of any length, the ranks' own: it has bounds for each step, and they end the run.

        Replicas that share out a day's prompts may end hours after each other.
        """
        if self.watch is not None:
            self.watch.meet(Meeting(math.inf, purpose=purpose))

    def meet_replica(self, purpose: str) -> None:
        """As `meet`, for the ranks of this rank's replica alone."""
        if self.replicas == 1:
            self.meet(purpose)
        elif self.watch is not None and self.expert_size > 1:
            among = tuple(range(self.first, self.first + self.expert_size))
            self.watch.meet(Meeting(self.start_timeout_s, START_KEY, purpose=purpose, among=among))

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
        all_gather(everyone, mine, group=self.expert_group)
        parts = everyone.view(self.expert_size, *mine.shape)
        if even:
            return parts.transpose(0, 1).flatten(1)
        return torch.cat([each[:, :count] for each, count in zip(parts, columns, strict=True)], dim=1)

    def barrier(self) -> None:
        """Wait for every rank of the expert group, at most the group's timeout."""
        if self.expert_group is not None:
            dist.barrier(group=self.expert_group)


def _everyone(mine: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """The tensor, of one shape and dtype, of each of the group's ranks; None: this one's alone."""
    if group is None:
        return [mine]
    found = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(found, mine, group=group)
    return found


# Their names since torch 2.13, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@contextmanager
def start(
    *,
    device: str = "auto",
    mesh: tuple[int, int] = (0, 0),
    timeout_s: float = 60.0,
    start_timeout_s: float = 3600.0,
    threads: int = 1,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Ranks]:
    """Join the other ranks; leave them, all together, at the end of the block.

    Within the block of several ranks a watch ends this process when another rank dies, stops or fails, and no exception
    leaves the block: it ends every rank, and rank 0 tells it. `mesh` is mesh.replica and mesh.expert (`Axes.of`);
    `threads` is the same for every number of ranks, since CPU products depend on it. Ranks with other `settings`, or of
    another kind (epmoe/ranks/machine.py), end the run before there is a group: its backend may differ with them. Main
    thread only.

    Raises:
        UserError: a wrong environment, `device` or `mesh`; rank 0 is not to be reached.
    """
    launch = Launch.read()
    torch.set_num_threads(threads)
    axes = Axes.of(launch.size, *mesh)
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
        watch=watch, start_timeout_s=start_timeout_s, neighbours=launch.local_size,
    )  # fmt: skip
    try:
        met.agree(lambda: settings or {}, "start every rank with the same keys")
        met = replace(met, device=rank_device(device, launch))
        tell_device(launch, met.device, store)
        tell_node(launch, store)
        met.agree(lambda: machine(met.device), "let every rank have the same")
        check_devices(launch, met.device, store)
        ranks = _grouped(met, store, timeout_s, axes)
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


def _grouped(met: Ranks, store: dist.Store, timeout_s: float, axes: Axes) -> Ranks:
    """The same rank with the process groups along the mesh's axes."""
    device, backend = met.device, BACKENDS[met.device.type]
    own = None if device.type == "cpu" else device
    one = axes.replicas == 1
    dist.init_process_group(
        # Spelt out: a group of two default backends crashes some interpreters at exit. No accelerator's group goes
        # over several replicas: one that is lost must not disturb the others.
        backend if one else "gloo",
        store=store,
        rank=met.rank,
        world_size=met.size,
        timeout=timedelta(seconds=timeout_s),
        device_id=own if one else None,
    )
    if one:
        mesh = init_device_mesh(device.type, (met.size,), mesh_dim_names=("expert",))
        group = mesh.get_group("expert")
        return replace(met, expert_rank=mesh.get_local_rank("expert"), expert_size=axes.expert, expert_group=group)

    def grouped(parts: Sequence[Sequence[int]], backend: str, own: torch.device | None) -> dist.ProcessGroup:
        """This rank's of a partition of all ranks; each rank makes all of them."""
        limit = timedelta(seconds=timeout_s)
        made = {tuple(part): dist.new_group(part, limit, backend, device_id=own) for part in parts}
        return next(group for part, group in made.items() if met.rank in part)

    expert_group = grouped([axes.members(each) for each in range(axes.replicas)], backend, own)
    replica_group = grouped([axes.counterparts(each) for each in range(axes.expert)], "gloo", None)
    grid = torch.arange(met.size).view(axes.replicas, axes.expert)
    mesh = DeviceMesh.from_group([replica_group, expert_group], device.type, grid, mesh_dim_names=("replica", "expert"))
    nodes, replica = nodes_of(store, met.size), mesh.get_local_rank("replica")
    return replace(
        met,
        nodes=len({nodes[each] for each in axes.members(replica)}),
        expert_rank=mesh.get_local_rank("expert"),
        expert_size=axes.expert,
        expert_group=expert_group if axes.expert > 1 else None,
        replica=replica,
        replicas=axes.replicas,
        replica_group=replica_group,
        units=tuple(tuple(each) for each in axes.units(nodes)),
    )
