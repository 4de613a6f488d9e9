"""Real ranks for tests: processes that join one group and run one function.

A fork server that has imported torch and epmoe once makes a rank in a few milliseconds, where a fresh interpreter takes
seconds. The parent hosts the key-value store, so that no port is ever guessed.
"""

import multiprocessing
import os
import pickle
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from epmoe.ranks import command, guard, mesh
from epmoe.ranks.ending import leave

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "torch.distributed.device_mesh", "epmoe.generate"])


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    env: dict[str, str] | None = None,
    device: str = "cpu",
    replica: int = 0,
) -> list[Any]:
    """Call the module-level function `fn(ranks, *args)` on `world_size` ranks; its results by rank.

    `replica` is mesh.replica.

    Arguments and results travel by pickle. `env` is added to each rank's environment. Nothing outlives the call.

    Raises:
        the first exception of any rank, with that rank's traceback as a note; AssertionError after `timeout` seconds or
        when a rank ended without a result.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    deadline = time.monotonic() + timeout
    pipes: dict[Connection, int] = {}
    processes = []
    for rank in range(world_size):
        here, there = FORK.Pipe(duplex=False)
        variables = {**launch_of(rank, world_size, store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", **(env or {})}
        joined = {"device": device, "timeout_s": timeout, "mesh": (replica, 0)}
        process = FORK.Process(target=_run_rank, args=(there, variables, joined, fn, args))
        process.start()
        there.close()
        pipes[here] = rank
        processes.append(process)
    try:
        return _collect(pipes, world_size, deadline, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def launch_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _collect(pipes: dict[Connection, int], world_size: int, deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, BaseException]] = []
    while pipes:
        ready = wait(list(pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                when, done, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                when, done, value = time.monotonic(), False, AssertionError(f"rank {rank} ended without a result")
            if done:
                results[rank] = value
            else:
                failures.append((when, value))
                deadline = min(deadline, time.monotonic() + 1)  # the others may fail because this one did
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
    if pipes:
        raise AssertionError(f"ranks {sorted(pipes.values())} of {world_size} gave no result in {timeout} s")
    return [results[rank] for rank in range(world_size)]


def _run_rank(
    pipe: Connection, env: dict[str, str], joined: dict[str, Any], fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """A rank's process. Its result or its exception goes into the pipe before the group ends."""
    os.environ.update(env)
    told = False
    try:
        with mesh.start(**joined) as mine:
            try:
                pipe.send_bytes(pickle.dumps((time.monotonic(), True, fn(mine, *args))))
            except Exception as error:
                pipe.send_bytes(_packed(error, mine.rank))
                told = True
                raise
    except Exception as error:
        if not told:
            pipe.send_bytes(_packed(error, int(env["RANK"])))
    leave(0)


def _packed(error: Exception, rank: int) -> bytes:
    now, text = time.monotonic(), f"rank {rank}:\n{traceback.format_exc()}"
    try:
        error.add_note(text)
        return pickle.dumps((now, False, error))
    except Exception:  # an exception that cannot travel is told in words
        return pickle.dumps((now, False, RuntimeError(text)))


class Command:
    """A rank of a command: a process that runs `ranks.main(fn)`, with its output in files."""

    def __init__(self, folder: Path, env: dict[str, str], fn: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.stdout_path, self.stderr_path = folder / f"stdout.{env['RANK']}", folder / f"stderr.{env['RANK']}"
        for path in (self.stdout_path, self.stderr_path):
            path.write_text("")
        self.process = FORK.Process(target=_run_command, args=(env, self.stdout_path, self.stderr_path, fn, args))
        self.process.start()

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """The exit code (a signal's number negative), or None when the process still runs after `seconds`."""
        self.process.join(max(0.0, seconds))
        return self.process.exitcode


# Below those that the system gives to connections, of which a free one is soon another's; each worker has its own.
PORTS = range(20_000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 16, 32_000, 16)
GIVEN: set[int] = set()


def free_port() -> int:
    """A port that nobody holds now, and that no outgoing connection (also one to this very port) is going to hold."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in GIVEN:
                GIVEN.add(port)
                return port


GRACE = "EPMOE_TEST_GRACE_S"  # of a command's environment: its guard's, which else kills nobody on a slow machine


@contextmanager
def commands(
    fn: Callable[..., None],
    world_size: int,
    *args: Any,
    folder: Path,
    env: dict[str, str] | None = None,
    port: int | None = None,
) -> Iterator[list[Command]]:
    """Run `ranks.main(fn(*args))` on `world_size` ranks as by hand, without an agent; rank 0 hosts the store."""
    port = port or free_port()
    started = [
        Command(folder, {**launch_of(rank, world_size, port), **(env or {})}, fn, args) for rank in range(world_size)
    ]
    try:
        yield started
    finally:
        for command in started:
            command.process.kill()
            command.process.join()


def _run_command(env: dict[str, str], out: Path, err: Path, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(env)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    guard.begin(float(env.get(GRACE, "60")))  # before the command does, for which it is begun then
    command.main(partial(fn, *args))
