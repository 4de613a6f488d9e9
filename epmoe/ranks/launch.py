"""What the launcher (torchrun, Slurm, MPI, a hand) put into the environment: coordinates, the store, the device."""

import ipaddress
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from epmoe.errors import UserError
from epmoe.ranks import launchers
from epmoe.ranks.admission import REMEDY, Hello, age_s, origin
from epmoe.ranks.fault import SETTLE_S, NoRankZero, SharedMistake
from epmoe.streams import tell

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}  # AMD's devices are torch's "cuda", too
SEEN_BY = {  # what to look at where torch sees none
    "cuda": "nvidia-smi or rocm-smi, CUDA_VISIBLE_DEVICES and that torch is a CUDA or ROCm build",
    "xpu": "xpu-smi, ZE_AFFINITY_MASK and that torch is an XPU build",
}
LARGEST_PORT = 65535


@dataclass(frozen=True)
class Patience:
    """How long a rank waits for the others to come: until `until` (time.monotonic), `within_s` after it was started."""

    until: float
    within_s: float

    @staticmethod
    def of(timeout_s: float, age: float) -> "Patience":
        """`timeout_s` counts from the process' start: a rank that dies while all import is not waited for longer.

        Where importing took long, another rank may take a quarter as long again; never more than `timeout_s` from now.
        The run's end takes SETTLE_S of it.
        """
        wait = min(timeout_s, max(timeout_s - SETTLE_S - age, age / 4, 1.0))
        return Patience(time.monotonic() + wait, max(timeout_s, age + wait) if wait < timeout_s else timeout_s)

    @property
    def left_s(self) -> float:
        return max(0.01, self.until - time.monotonic())

    def __str__(self) -> str:
        return f"{round(self.within_s, 1):g} s" if self.within_s < 10 else f"{self.within_s:.0f} s"


@dataclass(frozen=True)
class Launch:
    """The launcher's environment variables (torchrun's names)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    nodes: int
    node: int  # this rank's, from 0 on
    attempt: str  # how often torchrun has restarted the ranks
    agent: bool  # torchrun's agent hosts the store, and terminates all ranks when one fails
    run: str  # torchrun's --rdzv-id, the same on all nodes; "": none was given

    @staticmethod
    def read() -> "Launch":
        """Another launcher's numbers become torchrun's.

        Raises:
            UserError: a variable that is no number, a rank that is not below its size, or several ranks without one.
        """
        launchers.adopt(os.environ)
        rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        if size > 1 and "RANK" not in os.environ:
            raise UserError(f"WORLD_SIZE={size} without RANK: start the ranks with torchrun")
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
            node=_number("GROUP_RANK", (rank - local_rank) // local_size),
            attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            run="" if (name := os.environ.get("TORCHELASTIC_RUN_ID", "none")) == "none" else name,
        )

    @property
    def port(self) -> int:
        """MASTER_PORT; raises UserError where it is none."""
        port = _number("MASTER_PORT", 29500)
        if not 0 < port <= LARGEST_PORT:
            raise NoRankZero(f"MASTER_PORT={port} is no port: take one from 1 to {LARGEST_PORT}")
        return port

    def hello(self) -> Hello:
        """What this process says of itself to rank 0."""
        return Hello(self.rank, self.size, self.run, origin(os.environ), age_s())


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,18}", text):
        raise UserError(f"environment variable {name}={text!r} is not a number: start the ranks with torchrun")
    return int(text)


def rank_device(device: str, launch: Launch) -> torch.device:
    """This rank's device; `auto` says what it took."""
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        kind = found.type if found is not None and found.type in BACKENDS else "cpu"
        if launch.rank == 0:
            tell(f"epmoe: device={kind} (auto)")
    else:
        kind = device
    if kind not in BACKENDS:
        raise UserError(f"runtime.device={device!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    if kind == "cpu":
        return torch.device(kind)
    count = torch.get_device_module(kind).device_count()
    if not count:
        raise UserError(
            f"runtime.device={kind}, but torch sees no {kind} device on this machine: check {SEEN_BY[kind]}, "
            "or take runtime.device=cpu"
        )
    if launch.local_size > count > 1:
        raise UserError(
            f"{launch.local_size} ranks on one node cannot share {count} {kind} devices: "
            f"start at most {count} (--nproc-per-node), or take runtime.device=cpu"
        )
    index = launch.local_rank if count > 1 else 0  # one is each rank's own, or shared: see `check_devices`
    torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def use_on_this_thread(device: torch.device) -> None:
    """Let the calling thread have the rank's device and number of CPU threads, both of which torch keeps by thread."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    torch.set_num_threads(torch.get_num_threads())


def wake(device: torch.device) -> None:
    """Let an accelerator and its library of products start up while the host goes on; who needs them waits for them."""

    def multiply() -> None:
        with suppress(RuntimeError):  # where it cannot, the first use says why
            x = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
            torch.mm(x, x)

    if device.type != "cpu":
        # No daemon: an interpreter that ends meanwhile must not take Python's lock away from torch.
        threading.Thread(target=multiply, name="epmoe-wake").start()


def tell_device(launch: Launch, device: torch.device, store: dist.Store) -> None:
    """Let rank 0 know which device this rank has, for `check_devices`."""
    if device.type != "cpu":
        store.set(f"device/{launch.rank}", str(torch.get_device_module(device).get_device_properties(device).uuid))


def tell_node(launch: Launch, store: dist.Store) -> None:
    """Let all ranks know which node this rank is on, for `nodes_of`."""
    store.set(f"node/{launch.rank}", f"{launch.node} {socket.gethostname()}")


def nodes_of(store: dist.Store, size: int) -> list[str]:
    """Each rank's node, by rank, after a meeting since every rank's `tell_node`: the same text for the same node."""
    return [each.decode() for each in store.multi_get([f"node/{rank}" for rank in range(size)])]


def check_devices(launch: Launch, device: torch.device, store: dist.Store) -> None:
    """After a meeting since every rank's `tell_device`.

    Raises:
        UserError: on rank 0, if two ranks have one device.
    """
    if device.type == "cpu" or launch.rank != 0:
        return
    owners: dict[bytes, int] = {}
    for rank in range(launch.size):
        first = owners.setdefault(store.get(f"device/{rank}"), rank)
        if first != rank:
            raise UserError(
                f"ranks {first} and {rank} cannot share one {device.type} device: start at most one rank for each "
                "device of a node (--nproc-per-node), show each its own (CUDA_VISIBLE_DEVICES), "
                "or take runtime.device=cpu"
            )


def open_store(launch: Launch, timeout_s: float, patience: Patience) -> tuple[dist.Store, str]:
    """The key-value store of this attempt, and the address at which others reach this process.

    Keys of an earlier attempt would send a restarted rank to processes that are gone, hence the prefix. `timeout_s` is
    for what is asked of the store later.

    Raises:
        NoRankZero: it is not to be had.
        SharedMistake: nothing says where rank 0 is, and a launcher started all ranks alike.
    """
    address, port = os.environ.get("MASTER_ADDR"), launch.port
    if not address:
        raise _no_address(launch)
    try:
        store = _within(patience, partial(_connect, launch, address, timeout_s, patience))
        return dist.PrefixStore(f"epmoe/{launch.attempt}", store), _own_address(address, port)
    except (dist.DistError, OSError) as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            raise NoRankZero(f"MASTER_PORT {port} is taken, perhaps by another run: {REMEDY}") from error
        raise NoRankZero(
            f"rank {launch.rank} cannot use MASTER_ADDR:MASTER_PORT {address}:{port} ({reason})"
        ) from error


def _no_address(launch: Launch) -> UserError:
    task = launchers.find(os.environ)
    if task is None or (task.rank, task.size) != (launch.rank, launch.size):
        return NoRankZero(f"WORLD_SIZE={launch.size} without MASTER_ADDR: start the ranks with torchrun")
    return SharedMistake(
        f"{' and '.join(task.names)} say that this is one of {task.size} tasks, and nothing says on which node rank 0 "
        "is: set MASTER_ADDR to it (and MASTER_PORT), or start the ranks with torchrun (launch/README.md); "
        "RANK=0 WORLD_SIZE=1 makes a run of each task"
    )


def _connect(launch: Launch, address: str, timeout_s: float, patience: Patience) -> dist.Store:
    """Rank 0's store, or a connection to it, at once when it is there: torch pauses for a second between attempts."""
    is_master = launch.rank == 0 and not launch.agent
    while not is_master and time.monotonic() < patience.until:
        with suppress(OSError):
            socket.create_connection((address, launch.port), patience.left_s).close()
            break
        time.sleep(0.05)
    return dist.TCPStore(
        host_name=address,
        port=launch.port,
        is_master=is_master,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def _within(patience: Patience, make: Callable[[], dist.Store]) -> dist.Store:
    """What `make` gives or raises; TimeoutError when there is no more patience.

    torch would wait for ever for a stranger at the port that says nothing.
    """
    made: Future[dist.Store] = Future()

    def fulfil() -> None:
        try:
            made.set_result(make())
        except Exception as error:
            made.set_exception(error)

    threading.Thread(target=fulfil, daemon=True).start()
    try:
        return made.result(patience.left_s)
    except FutureTimeout:
        raise TimeoutError(f"no answer within {patience}, runtime.timeout_s") from None


def _own_address(master: str, port: int) -> str:
    """Where other ranks reach this process: the address it shows to the master, or the master's name if it runs there.

    torchrun may place rank 0 on another node than MASTER_ADDR's.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:  # connecting a datagram socket sends nothing
        probe.connect(target)
        address = probe.getsockname()[0]
    return master if ipaddress.ip_address(address).is_loopback else address


def stdout_closed() -> bool:
    """Whether the reader of standard output has gone."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
