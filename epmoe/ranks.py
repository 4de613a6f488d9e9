"""Ranks: this process's coordinates, the process group and the device mesh; a clean start and a clean end.

`start` reads what torchrun (or Slurm, or a hand) put into the environment. Without any of it there is one rank and no
process group. Which device a rank has is decided here; files with kernels ask for its type.

    main(body)                 runs a command: one line for a user's mistake, the exit code
      start(...) → Ranks       store → watch → device → process group → mesh
"""

import ipaddress
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, NoReturn, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from epmoe.errors import UserError
from epmoe.watch import NoRankZero, Watch, leave

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
TOLD_S = 10.0  # how long an early error of another rank waits for rank 0 to print the same error


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

    def meet(self) -> None:
        """Wait for every rank, at most start_timeout_s: between a work that takes some ranks much longer (a download,
        reading weights or standard input) and a collective, in which ranks wait for each other for timeout_s only.

        The watch goes on: a rank that dies or stops meanwhile is noticed as soon as ever.
        """
        if self.watch is not None:
            self.watch.meet(self.start_timeout_s, "runtime.start_timeout_s")

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


@dataclass(frozen=True)
class Launch:
    """The launcher's environment variables (torchrun's names)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    nodes: int
    attempt: str  # how often torchrun has restarted the ranks
    agent: bool  # torchrun's agent hosts the store, and terminates all ranks when one fails

    @staticmethod
    def read() -> "Launch":
        """Raises UserError for a variable that is no number or a rank that is not below its size."""
        rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
        if not (0 <= rank < size and 0 <= local_rank < local_size):
            raise UserError(
                f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_size}: "
                "ranks count from 0 and stay below the size"
            )
        return Launch(
            rank=rank,
            size=size,
            local_rank=local_rank,
            local_size=local_size,
            nodes=_number("GROUP_WORLD_SIZE", -(-size // local_size)),
            attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


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
        yield Ranks(0, 1, launch.local_rank, 1, _device(device, launch))
        return
    store, host = _store(launch, timeout_s)
    watch = Watch(launch.rank, launch.size, store, host, timeout_s)
    try:
        ranks = _group(launch, _device(device, launch), store, timeout_s)
        yield replace(ranks, watch=watch, start_timeout_s=start_timeout_s)
        for holder in (*ranks.at_end, *ranks.until_end):
            holder.close()
        watch.finish()
    except UserError as error:
        watch.fail("mistake", str(error), 2)
    except (Exception, SystemExit) as error:
        if isinstance(error, BrokenPipeError) and _stdout_closed():
            watch.fail("closed", "", 0)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        watch.fail("error", line, 1, traceback.format_exc())
    dist.destroy_process_group()
    watch.close()


def main(body: Callable[[], None]) -> NoReturn:
    """Run a command and end the process: 0, 1 after an exception, 2 after a user's mistake, 130 after Ctrl-C.

    A mistake is one line from rank 0, on whichever ranks it was made. A reader of standard output that has closed it
    (`| head`) has had enough: 0.
    """
    code = 0
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        body()
        sys.stdout.flush()
    except UserError as error:
        code = 2
        _tell_once(error)
    except KeyboardInterrupt:
        code = 130
        if os.environ.get("RANK", "0") == "0":  # a terminal interrupts all of them
            print("epmoe: interrupted", file=sys.stderr)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except Exception as error:
        if not (isinstance(error, BrokenPipeError) and _stdout_closed()):
            code = 1
            traceback.print_exc()
    leave(code)


def _tell_once(error: UserError) -> None:
    """Print a mistake that was found before the ranks met: on rank 0, and elsewhere only if rank 0 does not make it.

    torchrun's agent terminates rank 0 as soon as another rank ends, perhaps before rank 0 got as far. So the others
    stay until rank 0 has left a note in the agent's store.
    """
    rank, agent = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == "0" or isinstance(error, NoRankZero):
        print(f"epmoe: error: {error}", file=sys.stderr, flush=True)
    if not agent or isinstance(error, NoRankZero):
        return
    with suppress(UserError):
        store, _ = _store(Launch.read(), TOLD_S)
        if rank == "0":
            store.set("told", "")
            return
        try:
            store.wait(["told"], timedelta(seconds=TOLD_S))
        except dist.DistError:
            print(f"epmoe: error: rank {rank}: {error}", file=sys.stderr, flush=True)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r} is not a number: start the ranks with torchrun")
    return int(text)


def _device(device: str, launch: Launch) -> torch.device:
    """This rank's device; `auto` says what it took."""
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if launch.rank == 0:
            print(f"epmoe: device={kind} (auto)", file=sys.stderr)
    else:
        kind = device
    if kind not in BACKENDS:
        raise UserError(f"runtime.device={device!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    if kind == "cpu":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if not count:
        raise UserError(
            f"runtime.device={kind}, but torch sees no {kind} device on this machine: check nvidia-smi, "
            "CUDA_VISIBLE_DEVICES and that torch is a CUDA build, or take runtime.device=cpu"
        )
    if launch.local_size > count:
        raise UserError(
            f"{launch.local_size} ranks on one node cannot share {count} {kind} devices: "
            f"start at most {count} (--nproc-per-node), or take runtime.device=cpu"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device(kind, launch.local_rank)


def _store(launch: Launch, timeout_s: float) -> tuple[dist.Store, str]:
    """The key-value store of this attempt, and the address at which others reach this process.

    Keys of an earlier attempt would send a restarted rank to processes that are gone, hence the prefix.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 29500)
    except KeyError:
        raise NoRankZero(f"WORLD_SIZE={launch.size} without MASTER_ADDR: start the ranks with torchrun") from None
    try:
        store = dist.TCPStore(
            host_name=address,
            port=port,
            is_master=launch.rank == 0 and not launch.agent,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"epmoe/{launch.attempt}", store), _own_address(address, port)
    except (dist.DistError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise NoRankZero(
            f"rank {launch.rank} cannot use MASTER_ADDR:MASTER_PORT {address}:{port} ({reason})"
        ) from error


def _own_address(master: str, port: int) -> str:
    """Where other ranks reach this process: the address it shows to the master, or the master's name if it runs there.

    torchrun may place rank 0 on another node than MASTER_ADDR's.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:  # connecting a datagram socket sends nothing
        probe.connect(target)
        address = probe.getsockname()[0]
    return master if ipaddress.ip_address(address).is_loopback else address


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


def _stdout_closed() -> bool:
    """Whether the reader of standard output has gone."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
