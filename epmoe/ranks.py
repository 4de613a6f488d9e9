"""Ranks: this process's coordinates, the process group and the device mesh; a clean start and a clean end.

`start` reads what torchrun (or a hand, or Slurm) put into the environment. Without any of it there is one rank and no
process group. Only this file knows how a device type is spelt.

    main(body)                 run a command; one line for a user's mistake; the exit code
      start(...) -> Ranks      store → process group → mesh
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from epmoe.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


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

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite `tensor` with expert rank 0's; a collective of the expert group."""
        if self.expert_group is not None:
            dist.broadcast(tensor, group=self.expert_group, group_src=0)

    def barrier(self) -> None:
        """Wait for every rank of the expert group, at most the group's timeout."""
        if self.expert_group is not None:
            dist.barrier(group=self.expert_group)


@contextmanager
def start(*, device: str = "auto", expert: int = 0, timeout_s: float = 60.0, threads: int = 1) -> Iterator[Ranks]:
    """Join the other ranks; leave them at the end of the block."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if expert not in (0, size):
        raise UserError(f"mesh.expert={expert} is not the number of ranks, {size}: leave it 0")
    torch.set_num_threads(threads)
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(kind, local_rank) if kind != "cpu" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield Ranks(rank, size, local_rank, 1, place)
        return
    timeout = timedelta(seconds=timeout_s)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, rank == 0 and not agent, timeout, False
    )
    store = dist.PrefixStore(f"epmoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    dist.init_process_group(BACKENDS[kind], store=store, rank=rank, world_size=size, timeout=timeout)
    mesh = init_device_mesh(kind, (size,), mesh_dim_names=("expert",))
    group = mesh.get_group("expert")
    yield Ranks(rank, size, local_rank, size // local_size, place, mesh.get_local_rank("expert"), size, group)
    dist.barrier(group=group)
    dist.destroy_process_group()


def main(body: Callable[[], None]) -> NoReturn:
    """Run a command and end the process with its exit code."""
    try:
        body()
        code = 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"epmoe: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
