"""Real ranks for tests: processes that join one group and run one function.

A fork server that has imported torch and epmoe once makes a rank in a few milliseconds, where a fresh interpreter takes
seconds. The parent hosts the key-value store, so that no port is ever guessed.
"""

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from epmoe import ranks

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "torch.distributed.device_mesh", "epmoe.ranks"])


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60,
    env: dict[str, str] | None = None,
    device: str = "cpu",
) -> list[Any]:
    """Call the module-level function `fn(ranks, *args)` on `world_size` ranks; its results by rank.

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
        variables = {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            **(env or {}),
        }
        process = FORK.Process(
            target=_run_rank, args=(there, {k: str(v) for k, v in variables.items()}, device, timeout, fn, args)
        )
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
    pipe: Connection, env: dict[str, str], device: str, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """A rank's process. Its result or its exception goes into the pipe before the group ends."""
    os.environ.update(env)
    try:
        with ranks.start(device=device, timeout_s=timeout) as mine:
            try:
                pipe.send_bytes(pickle.dumps((time.monotonic(), True, fn(mine, *args))))
            except Exception as error:
                pipe.send_bytes(_packed(error, int(env["RANK"])))
                os._exit(1)
    except Exception as error:
        pipe.send_bytes(_packed(error, int(env["RANK"])))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _packed(error: Exception, rank: int) -> bytes:
    now, text = time.monotonic(), f"rank {rank}:\n{traceback.format_exc()}"
    try:
        error.add_note(text)
        return pickle.dumps((now, False, error))
    except Exception:  # an exception that cannot travel is told in words
        return pickle.dumps((now, False, RuntimeError(text)))
