"""What the launcher (torchrun, Slurm, a hand) put into the environment: coordinates, the store, this rank's device."""

import ipaddress
import os
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
from epmoe.ranks.admission import REMEDY, Hello, age_s, origin
from epmoe.ranks.fault import NoRankZero
from epmoe.streams import tell

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


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
    run: str  # torchrun's --rdzv-id, the same on all nodes; "": none was given

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
            run="" if (name := os.environ.get("TORCHELASTIC_RUN_ID", "none")) == "none" else name,
        )

    @property
    def port(self) -> int:
        """MASTER_PORT; raises UserError where it is no number."""
        return _number("MASTER_PORT", 29500)

    def hello(self) -> Hello:
        """What this process says of itself to rank 0."""
        return Hello(self.rank, self.size, self.run, origin(os.environ), age_s())


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r} is not a number: start the ranks with torchrun")
    return int(text)


def rank_device(device: str, launch: Launch) -> torch.device:
    """This rank's device; `auto` says what it took."""
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if launch.rank == 0:
            tell(f"epmoe: device={kind} (auto)")
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


def open_store(launch: Launch, timeout_s: float) -> tuple[dist.Store, str]:
    """The key-value store of this attempt, and the address at which others reach this process.

    Keys of an earlier attempt would send a restarted rank to processes that are gone, hence the prefix.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], launch.port
    except KeyError:
        raise NoRankZero(f"WORLD_SIZE={launch.size} without MASTER_ADDR: start the ranks with torchrun") from None
    try:
        store = _within(timeout_s, partial(_connect, launch, address, timeout_s))
        return dist.PrefixStore(f"epmoe/{launch.attempt}", store), _own_address(address, port)
    except (dist.DistError, OSError) as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            raise NoRankZero(f"MASTER_PORT {port} is taken, perhaps by another run: {REMEDY}") from error
        raise NoRankZero(
            f"rank {launch.rank} cannot use MASTER_ADDR:MASTER_PORT {address}:{port} ({reason})"
        ) from error


def _connect(launch: Launch, address: str, timeout_s: float) -> dist.Store:
    """Rank 0's store, or a connection to it, at once when it is there: torch pauses for a second between attempts."""
    is_master = launch.rank == 0 and not launch.agent
    deadline = time.monotonic() + timeout_s
    while not is_master and time.monotonic() < deadline:
        with suppress(OSError):
            socket.create_connection((address, launch.port), timeout_s).close()
            break
        time.sleep(0.05)
    return dist.TCPStore(
        host_name=address,
        port=launch.port,
        is_master=is_master,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def _within(seconds: float, make: Callable[[], dist.Store]) -> dist.Store:
    """What `make` gives or raises; TimeoutError after `seconds`.

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
        return made.result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


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
