"""Admission: which processes make up this run, when several runs come to one MASTER_PORT.

A launch by hand shares nothing but MASTER_ADDR and MASTER_PORT, so another run's ranks may find this one's rank 0. It
decides about each process that says hello:

    another WORLD_SIZE, or another name by the launcher     another run's: refused, nothing else happens
    a rank that is not there yet                            known
    a rank that is there already                            refused. Which of the two belongs here? See `judge`

When that cannot be told, nobody goes on: a run whose ranks come from two commands must give no text. Processes that
were started together do not come together (importing torch takes seconds, and not the same on each), so a run may have
met before the rank that it lacks has come. `settled_at` says until when such a one may come.
"""

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = "EPMOE_STARTED"  # time.monotonic() when a process started the other ranks, which may be long after it began
SKEW = 0.5  # of the time that a rank took from its process' start to its hello: how much longer another one may take
REMEDY = "give each run a port of its own (MASTER_PORT, torchrun's --master-port)"


@dataclass(frozen=True)
class Hello:
    """What a process says of itself when it comes to rank 0."""

    rank: int
    size: int
    run: str  # the launcher's name for the run, the same on all nodes; "": it gives none
    origin: str  # the same for processes that one parent started with one command line
    age_s: float  # since the process began


@dataclass(frozen=True)
class Judgement:
    """`refused` is what the process is told; `mixed` what all of this run's ranks are told, and end; "": neither."""

    refused: str = ""
    mixed: str = ""


class Admission:
    """Rank 0's book of who has come."""

    def __init__(self, own: Hello, port: int, *, shared: bool) -> None:
        """`shared`: whether other launches can find this one's rank 0; an agent's store is for its own ranks."""
        self.own, self.port, self.shared = own, port, shared
        self.known: dict[int, Hello] = {own.rank: own}
        self.met_at: float | None = None

    def judge(self, hello: Hello, now: float) -> Judgement:
        """Whether this process is one of the run; `now` as of time.monotonic.

        A second process for a rank is certainly another run's when it alone differs in its origin, or when it began
        after all ranks had met. Else the one that is there may be the other run's.
        """
        other = f"MASTER_PORT {self.port} is another run's"
        if hello.size != self.own.size:
            return Judgement(f"{other}, of WORLD_SIZE={self.own.size} and not {hello.size}: {REMEDY}")
        if hello.run and self.own.run and hello.run != self.own.run:
            return Judgement(f"{other}, {self.own.run} and not {hello.run} to its launcher: {REMEDY}")
        if hello.rank not in self.known:
            self.known[hello.rank] = hello
            if len(self.known) == self.own.size:
                self.met_at = now
            return Judgement()
        refused = f"{other}, whose rank {hello.rank} is there already: {REMEDY}"
        one_origin = len({each.origin for each in self.known.values()}) == 1
        if one_origin and hello.origin != self.own.origin:
            return Judgement(refused)
        if self.met_at is not None and hello.age_s < now - self.met_at:
            return Judgement(refused)
        mixed = f"a second rank {hello.rank} came to MASTER_PORT {self.port}, and either may be another run's: {REMEDY}"
        return Judgement(refused, mixed)

    @property
    def settled_at(self) -> float:
        """When a rank that was started together with those that met would have come, as of time.monotonic."""
        if self.met_at is None or not self.shared:
            return 0.0
        return self.met_at + SKEW * max(each.age_s for each in self.known.values())


def origin(environment: Mapping[str, str]) -> str:
    """A digest of what started this process: a Slurm step, or a process of this machine; and of its command line."""
    step = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    starter: list[Any] = step if any(step) else [socket.gethostname(), os.getppid()]
    return hashlib.sha256(json.dumps([starter, sys.argv]).encode()).hexdigest()[:16]


def age_s() -> float:
    """Seconds since this process began, or since it started the ranks itself (epmoe/ranks/local.py).

    0 where the system does not say it as Linux does.
    """
    if started := os.environ.get(STARTED):
        return max(0.0, time.monotonic() - float(started))  # one clock for all processes of a machine
    try:
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # in ticks since the boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return 0.0
