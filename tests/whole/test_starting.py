"""Ranks that start: one that dies, stops or makes a mistake then is told of once, and none waits longer than timeout_s.

Importing torch is played by a sleep: the ranks come from a fork server, each some milliseconds old.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM, Signals

import pytest
import torch
from spawn import Command, commands, free_port

from epmoe.errors import UserError, warn
from epmoe.ranks import command, launch, mesh, watch
from epmoe.ranks.admission import STARTED

pytestmark = pytest.mark.alone  # it measures time

IMPORT_S, TIMEOUT_S = 1.5, 5.0
WITHIN_S = 40


def come(import_s: float = IMPORT_S, timeout_s: float = TIMEOUT_S) -> None:
    time.sleep(import_s)
    with mesh.start(device="cpu", timeout_s=timeout_s) as mine:
        mine.barrier()


def come_but_one(late: int) -> None:
    """One imports for so long that whatever is done to it is done meanwhile, however late this machine is with it."""
    come(60.0 if int(os.environ["RANK"]) == late else IMPORT_S)


def ends(started: list[Command], seconds: float) -> list[int | None]:
    deadline = time.monotonic() + seconds
    return [each.wait(deadline - time.monotonic()) for each in started]


def end_without(victim: int, number: Signals, folder: Path) -> None:
    """A rank that goes while all import: the others end (when: tests/ranks/test_launch.py), each with one line."""
    folder.mkdir()
    port = free_port()
    with commands(come_but_one, 4, victim, folder=folder, port=port) as started:
        time.sleep(IMPORT_S / 2)
        started[victim].signal(number)
        others = [rank for rank in range(4) if rank != victim]
        assert ends([started[rank] for rank in others], WITHIN_S) == [1 if victim else 2] * 3
        for rank in others:
            (line,) = started[rank].stderr.splitlines()
            assert str(port) in line and " within " in line and "runtime.timeout_s" in line
            assert (f"rank {victim} did not come" in line) == bool(victim)


# Each signal, and rank 0 and another one; all of both where there is time.
GO = [(0, SIGKILL), (2, SIGSTOP), (0, SIGTERM), (2, SIGINT)]
REST = [(2, SIGKILL), (0, SIGSTOP), (2, SIGTERM), (0, SIGINT)]


@pytest.mark.parametrize("cases", [GO, pytest.param(REST, marks=pytest.mark.slow)], ids=["some", "the rest"])
def test_a_rank_that_goes_while_all_import(cases: list[tuple[int, Signals]], tmp_path: Path) -> None:
    """Four runs at once: they only wait."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda case: end_without(case[0], case[1], tmp_path / case[1].name), cases))


def come_after_a_while() -> None:
    """Rank 1 later than the second that a rank is waited for at least."""
    come(1.5 if os.environ["RANK"] == "1" else 0.0, 20.0)


def test_slow_imports_are_no_death(tmp_path: Path) -> None:
    """Where importing takes longer than timeout_s, the others have a quarter of that time more."""
    imported = {STARTED: str(time.monotonic() - 100)}  # for so many seconds
    with commands(come_after_a_while, 2, folder=tmp_path, env=imported) as started:
        assert ends(started, WITHIN_S) == [0, 0], [each.stderr for each in started]


def err_on(mistaken: list[int], slow: list[int]) -> None:
    """A mistake from before the ranks meet, such as a key that is mistyped on one node."""
    rank = int(os.environ["RANK"])
    command.EARLY_S = watch.EARLY_S = 60.0  # nobody waits for so long
    time.sleep(2.0 if rank in slow else 0.1)
    if rank in mistaken:
        raise UserError("no such key")
    come(0.0, 60.0)


# (ranks with the mistake, ranks that import for longer) → rank 0's line
MISTAKES = [
    ([0, 1, 2], [], "no such key"),
    ([0, 1, 2], [0], "no such key"),
    ([0, 1, 2], [2], "no such key"),
    ([1], [], "rank 1: no such key"),
    ([1], [0], "rank 1: no such key"),
    ([1], [2], "rank 1: no such key"),
    ([0], [1], "no such key"),
]


def test_a_mistake_before_the_ranks_meet(tmp_path: Path) -> None:
    """By hand, without an agent: one line, from rank 0, and all end with 2, those too that made no mistake."""
    with ExitStack() as stack:
        runs = []
        for number, (mistaken, slow, _) in enumerate(MISTAKES):
            (folder := tmp_path / str(number)).mkdir()
            runs.append(stack.enter_context(commands(err_on, 3, mistaken, slow, folder=folder)))
        deadline = time.monotonic() + WITHIN_S
        for started, case in zip(runs, MISTAKES, strict=True):
            assert ends(started, deadline - time.monotonic()) == [2, 2, 2], case
            assert [each.stderr for each in started] == [f"epmoe: error: {case[-1]}\n", "", ""], case


def err_without_rank_0() -> None:
    command.EARLY_S = 1.0
    raise UserError("no such key")


def test_a_mistake_is_not_silent_where_there_is_no_rank_0(tmp_path: Path) -> None:
    with commands(err_without_rank_0, 1, folder=tmp_path, env={"RANK": "1", "WORLD_SIZE": "2"}) as started:
        assert ends(started, WITHIN_S) == [2]
        assert started[0].stderr == "epmoe: error: rank 1: no such key\n"


@pytest.mark.parametrize("port", ["65536", "9" * 30])
def test_a_port_that_is_none(port: str, tmp_path: Path) -> None:
    """Nobody can meet there, so that each rank says it."""
    with commands(come, 2, 0.0, folder=tmp_path, env={"MASTER_PORT": port}) as started:
        assert ends(started, WITHIN_S) == [2, 2]
        for each in started:
            (line,) = each.stderr.splitlines()
            assert line.startswith("epmoe: error: ") and port in line and "MASTER_PORT" in line


def add_up() -> None:
    warn("this is rank 0's to say")
    with mesh.start(device="cpu", timeout_s=20) as mine:
        x = torch.ones(1)
        torch.distributed.all_reduce(x, group=mine.expert_group)
        if mine.is_main:
            print(f"rank 0 of {mine.size}: {x.item():g}")


def as_tasks(env: dict[str, str], port: int, folder: Path) -> list[Command]:
    """Two tasks with these variables, in which {} is a task's number, and none of torchrun's."""
    started = []
    for rank in range(2):
        (place := folder / str(rank)).mkdir()
        variables = {name: value.format(rank) for name, value in env.items()} | {"MASTER_PORT": str(port)}
        started.append(Command(place, {"RANK": "0"}, without_torchrun, (variables,)))
    return started


def without_torchrun(variables: dict[str, str]) -> None:
    """What a launcher's task does from its first line on."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    command.main(add_up)


SAID = "epmoe: warning: this is rank 0's to say\n"
MPI = {"OMPI_COMM_WORLD_RANK": "{}", "OMPI_COMM_WORLD_SIZE": "2"}
LOCAL = {"OMPI_COMM_WORLD_LOCAL_RANK": "{}", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
STEP = {"SLURM_PROCID": "{}", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0"}
SLURM = {**STEP, "SLURM_NODEID": "0", "SLURM_LOCALID": "{}", "SLURM_STEP_TASKS_PER_NODE": "2"}


@pytest.mark.parametrize("env", [{**MPI, **LOCAL}, SLURM, {**STEP, "MASTER_ADDR": "localhost"}])
def test_tasks_of_another_launcher_are_one_run(env: dict[str, str], tmp_path: Path) -> None:
    started = as_tasks(env, free_port(), tmp_path)
    assert ends(started, WITHIN_S) == [0, 0], [each.stderr for each in started]
    assert [each.stdout for each in started] == ["rank 0 of 2: 2\n", ""]
    assert [each.stderr for each in started] == [SAID, ""]


@pytest.mark.parametrize("env", [MPI, STEP])
def test_tasks_that_cannot_meet_are_refused(env: dict[str, str], tmp_path: Path) -> None:
    """Each alone would be a whole run, with the same output file. One line: task 0's."""
    started = as_tasks(env, free_port(), tmp_path)
    assert ends(started, WITHIN_S) == [2, 2]
    assert [each.stdout for each in started] == ["", ""] and started[1].stderr == ""
    (line,) = started[0].stderr.removeprefix(SAID).splitlines()
    name = next(iter(env))
    assert line.startswith(f"epmoe: error: {name} and ") and "set MASTER_ADDR" in line and "RANK=0 WORLD_SIZE=1" in line


def test_ranks_without_a_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be rank 0."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^WORLD_SIZE=2 without RANK"):
        launch.Launch.read()
