"""Failing well: a rank that dies, stops or fails is named by the others, which end at once and non-zero.

The ranks are started as by hand, without torchrun's agent, unless a test says otherwise: then nobody else ends them.
"""

import os
import time
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM

import pytest
import torch
import torch.distributed as dist
from spawn import Command, commands

from epmoe import ranks
from epmoe.errors import UserError


def generate_for_ever(device: str, timeout_s: float) -> None:
    """Stands for a generation: collectives without end; says on standard output when it is under way."""
    with ranks.start(device=device, timeout_s=timeout_s) as mine:
        x = torch.zeros(1, device=mine.device)
        for step in range(10**9):
            dist.all_reduce(x, group=mine.expert_group)
            x.item()
            if step == 10:
                os.write(1, b"running\n")


def wait_until_running(started: list[Command], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(command.stdout for command in started):
        assert time.monotonic() < deadline, [command.stderr for command in started]
        time.sleep(0.05)


def end_all(started: list[Command], seconds: float) -> list[int | None]:
    """Exit codes; None for a rank that has not ended `seconds` from now."""
    deadline = time.monotonic() + seconds
    return [command.wait(deadline - time.monotonic()) for command in started]


def lines(command: Command) -> list[str]:
    return command.stderr.splitlines()


@pytest.mark.parametrize("victim", range(4))
def test_killed_rank_is_named_by_every_other(victim: int, tmp_path: Path) -> None:
    """Issue 2, point 13: the others end within 10 s, non-zero, and each says which rank went; rank 0 is no exception."""
    with commands(generate_for_ever, 4, "cpu", 60.0, folder=tmp_path) as started:
        wait_until_running(started)
        started[victim].signal(SIGKILL)
        codes = end_all(started, 10)
        assert codes == [-SIGKILL if rank == victim else 1 for rank in range(4)]
        for rank in set(range(4)) - {victim}:
            expected = f"epmoe: rank {victim} ended without a word (killed?); rank {rank} ends too"
            assert lines(started[rank]) == [expected]


@pytest.mark.parametrize("victim", [0, 2])
def test_stopped_rank_is_named_within_the_timeout(victim: int, tmp_path: Path) -> None:
    """A stopped process keeps its connections, so only its silence tells; the bound is timeout_s."""
    with commands(generate_for_ever, 3, "cpu", 8.0, folder=tmp_path) as started:
        wait_until_running(started)
        started[victim].signal(SIGSTOP)
        others = [command for rank, command in enumerate(started) if rank != victim]
        assert end_all(others, 8.0) == [1, 1]
        for command in others:
            (line,) = lines(command)
            assert line.startswith(f"epmoe: rank {victim} has been silent for 6 s")
