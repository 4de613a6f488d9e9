"""Failing well: a rank that dies, stops or fails is named by the others, which end at once and non-zero.

The ranks are started as by hand, without torchrun's agent, unless a test says otherwise: then nobody else ends them.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM, Signals

import psutil
import pytest
import torch
import torch.distributed as dist
from spawn import Command, commands, free_port

from epmoe.errors import UserError
from epmoe.ranks import mesh
from epmoe.weights.synthetic import make_checkpoint

pytestmark = pytest.mark.alone  # who is silent, and for how long, is not to depend on other tests

WITHIN_S = 30  # less than the time after which the collectives raise, but where a test says so
ENDED = "epmoe: rank {} ended without a word (killed?); rank {} ends too"


@pytest.fixture(scope="module")
def long_generation(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Keys of a generation that goes on for minutes."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("long"), max_position=65536)
    return [f"checkpoint={checkpoint}", "prompt=x", "max_new_tokens=60000", "sampling.ignore_eos=true"]


def generate(*keys: str) -> None:
    """The real command, without the seconds that a fresh interpreter takes to import torch."""
    from epmoe.generate import generate as body

    sys.argv[1:] = ["runtime.device=cpu", *keys]
    body()


def add_for_ever(device: str, timeout_s: float) -> None:
    """Collectives without end; says on standard output when it is under way."""
    with mesh.start(device=device, timeout_s=timeout_s) as mine:
        x = torch.zeros(1, device=mine.device)
        for step in range(10**9):
            dist.all_reduce(x, group=mine.expert_group)
            x.item()
            if step == 10:
                os.write(1, b"running\n")


def wait_until_running(started: list[Command], seconds: float = 60) -> None:
    """Until rank 0 has written, which takes every rank."""
    deadline = time.monotonic() + seconds
    while not started[0].stdout:
        assert time.monotonic() < deadline, [command.stderr for command in started]
        time.sleep(0.05)


def end_all(started: list[Command], seconds: float) -> list[int | None]:
    """Exit codes; None for a rank that has not ended `seconds` from now."""
    deadline = time.monotonic() + seconds
    return [command.wait(deadline - time.monotonic()) for command in started]


def lines(command: Command) -> list[str]:
    return command.stderr.splitlines()


@pytest.mark.parametrize(
    ("victim", "attention"),
    [
        *((0, "replicate"), (2, "tensor"), (3, "data")),
        *(pytest.param(rank, "replicate", marks=pytest.mark.slow) for rank in (1, 2, 3)),
    ],
)
def test_rank_killed_in_a_generation_is_named_by_every_other(
    victim: int, attention: str, long_generation: list[str], tmp_path: Path
) -> None:
    """The others end within seconds, non-zero, and each says which rank went; rank 0 is no exception."""
    with commands(generate, 4, *long_generation, f"mesh.attention={attention}", folder=tmp_path) as started:
        wait_until_running(started)
        started[victim].signal(SIGKILL)
        codes = end_all(started, WITHIN_S)
        assert codes == [-SIGKILL if rank == victim else 1 for rank in range(4)]
        for rank in set(range(4)) - {victim}:
            assert [line for line in lines(started[rank]) if "rank" in line] == [ENDED.format(victim, rank)]


@pytest.fixture
def torchrun(long_generation: list[str]) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """The real command line on 3 ranks, in mid-generation, in a process group of its own; its ranks in order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    agent = subprocess.Popen(
        [*command, "-m", "epmoe.generate", "runtime.device=cpu", *long_generation],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert agent.stdout is not None and agent.stdout.read(1)
        started = [child for child in psutil.Process(agent.pid).children() if "RANK" in child.environ()]
        yield agent, sorted(started, key=lambda child: int(child.environ()["RANK"]))
    finally:
        for process in (agent, *started):
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                process.kill()


def test_kill_under_torchrun(torchrun: tuple["subprocess.Popen[str]", list[psutil.Process]]) -> None:
    """The agent terminates the survivors at once; they still say which rank went."""
    agent, started = torchrun
    started[2].kill()
    err = agent.communicate(timeout=60)[1].splitlines()
    assert agent.returncode != 0
    assert sorted(line for line in err if line.startswith("epmoe: rank")) == [ENDED.format(2, rank) for rank in (0, 1)]


def test_ctrl_c_under_torchrun(torchrun: tuple["subprocess.Popen[str]", list[psutil.Process]]) -> None:
    """A terminal's Ctrl-C goes to the agent and to every rank: one line of ours, no traceback of ours, nothing left."""
    agent, started = torchrun
    os.killpg(agent.pid, SIGINT)
    err = agent.communicate(timeout=60)[1]
    assert agent.returncode != 0
    assert err.count("epmoe: interrupted") == 1
    assert "KeyboardInterrupt" not in err
    assert psutil.wait_procs(started, timeout=WITHIN_S)[1] == []


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_signal_while_modules_are_imported(number: Signals, long_generation: list[str]) -> None:
    """Importing torch takes seconds, in which a user who mistyped a key is likely to press Ctrl-C."""
    command = [sys.executable, "-m", "epmoe.generate", "runtime.device=cpu", *long_generation]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any("libtorch" in each.path for each in psutil.Process(process.pid).memory_maps()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode in (-number, 128 + number)  # the second: it was fast, and `main` had begun
    assert "Traceback" not in err


@pytest.mark.slow  # tests/ranks/test_watch.py has one
@pytest.mark.parametrize("victim", [0, 2])
def test_stopped_rank_is_named_within_the_timeout(victim: int, tmp_path: Path) -> None:
    """A stopped process keeps its connections, so only its silence tells; the bound is timeout_s."""
    with commands(add_for_ever, 3, "cpu", 8.0, folder=tmp_path) as started:
        wait_until_running(started)
        started[victim].signal(SIGSTOP)
        others = [command for rank, command in enumerate(started) if rank != victim]
        assert end_all(others, WITHIN_S) == [1, 1]
        for command in others:
            (line,) = lines(command)  # and not what the collectives raise after timeout_s
            assert re.match(rf"epmoe: rank {victim} has been silent for \d+ s", line)


def test_termination_after_a_kill_still_names_the_killed(tmp_path: Path) -> None:
    """torchrun's agent terminates the survivors 0.1 s after a death; that must not silence them."""
    with commands(add_for_ever, 3, "cpu", 60.0, folder=tmp_path) as started:
        wait_until_running(started)
        started[1].signal(SIGKILL)
        assert started[1].wait(WITHIN_S) == -SIGKILL
        for rank in (0, 2):
            started[rank].signal(SIGTERM)
        assert end_all(started, WITHIN_S) == [1, -SIGKILL, 1]
        for rank in (0, 2):
            assert lines(started[rank]) == [ENDED.format(1, rank)]


def fail_on(failing: list[int], error: Exception) -> None:
    with mesh.start(device="cpu") as mine:
        mine.barrier()
        if mine.rank in failing:
            raise error
        mine.barrier()  # the other ranks are in a collective when it happens


def test_mistake_on_rank_3_is_told_by_rank_0(tmp_path: Path) -> None:
    """A fault that only rank 3 can see is one line, from rank 0, and ends all at once."""
    with commands(fail_on, 4, [3], UserError("shard 7 is missing"), folder=tmp_path) as started:
        assert end_all(started, WITHIN_S) == [2, 2, 2, 2]
        assert lines(started[0]) == ["epmoe: error: rank 3: shard 7 is missing"]
        assert [started[rank].stderr for rank in (1, 2, 3)] == ["", "", ""]


def test_more_ranks_than_experts(tmp_path: Path) -> None:
    """Every rank finds that mistake; it is told once, and ends all of them."""
    checkpoint = make_checkpoint(tmp_path / "tiny", experts=3)
    with commands(generate, 4, f"checkpoint={checkpoint}", "prompt=x", folder=tmp_path) as started:
        assert end_all(started, WITHIN_S) == [2, 2, 2, 2]
        (line,) = [line for command in started for line in lines(command) if "error" in line]
        assert line == "epmoe: error: 4 expert ranks cannot share 3 experts: start at most 3 ranks"


def test_exception_on_rank_1_has_a_traceback_there_and_a_line_on_rank_0(tmp_path: Path) -> None:
    with commands(fail_on, 3, [1], KeyError("x"), folder=tmp_path) as started:
        assert end_all(started, WITHIN_S) == [1, 1, 1]
        assert lines(started[0]) == ["epmoe: rank 1: KeyError: 'x'"]
        assert "in fail_on" in started[1].stderr and started[1].stderr.count("Traceback") == 1
        assert started[2].stderr == ""


def sleep_for_ever() -> None:
    with mesh.start(device="cpu"):
        os.write(1, b"running\n")
        time.sleep(1000)


@pytest.mark.parametrize(
    ("body", "size", "number", "victims", "expected", "code"),
    [
        pytest.param(add_for_ever, 3, SIGINT, [0, 1, 2], "interrupted", 130, id="ctrl-c-in-a-collective"),
        pytest.param(sleep_for_ever, 2, SIGINT, [0, 1], "interrupted", 130, id="ctrl-c-elsewhere"),
        pytest.param(sleep_for_ever, 2, SIGINT, [1], "interrupted", 130, id="ctrl-c-one-rank"),
        pytest.param(sleep_for_ever, 1, SIGINT, [0], "interrupted", 130, id="ctrl-c-alone"),
        pytest.param(add_for_ever, 2, SIGTERM, [0, 1], "ended by SIGTERM", 143, id="terminated"),
        pytest.param(add_for_ever, 2, SIGTERM, [1], "rank 1: ended by SIGTERM", 143, id="one-rank-terminated"),
    ],
)
def test_signals_end_every_rank_with_one_line(
    body: Callable[..., None],
    size: int,
    number: Signals,
    victims: list[int],
    expected: str,
    code: int,
    tmp_path: Path,
) -> None:
    """Ctrl-C reaches every rank of a terminal's job; the user sees one line and no traceback, and nothing hangs."""
    with commands(body, size, *(("cpu", 60.0) if body is add_for_ever else ()), folder=tmp_path) as started:
        wait_until_running(started)
        for rank in victims:
            started[rank].signal(number)
        assert end_all(started, WITHIN_S) == [code] * size
        assert [lines(command) for command in started] == [[f"epmoe: {expected}"]] + [[]] * (size - 1)


def write_to_a_closed_pipe() -> None:
    with mesh.start(device="cpu") as mine:
        if mine.is_main:
            reader, writer = os.pipe()
            os.dup2(writer, 1)
            os.close(reader)
            print("text", flush=True)
        mine.barrier()


@pytest.mark.parametrize("size", [1, 2])
def test_reader_that_has_had_enough_is_no_error(size: int, tmp_path: Path) -> None:
    """`... | head`: no traceback, no message, exit code 0 everywhere."""
    with commands(write_to_a_closed_pipe, size, folder=tmp_path) as started:
        assert end_all(started, WITHIN_S) == [0] * size
        assert [command.stderr for command in started] == [""] * size


def finish_late() -> None:
    with mesh.start(device="cpu") as mine:
        assert mine.watch is not None
        mine.watch.timeout_s = 2.0  # of the last meeting alone
        if mine.rank == 1:
            time.sleep(1000)


def test_rank_that_does_not_finish_is_named(tmp_path: Path) -> None:
    """The wait at the end is bounded, also while the missing rank is alive."""
    with commands(finish_late, 2, folder=tmp_path) as started:
        assert end_all(started, WITHIN_S) == [1, 1]
        assert lines(started[0]) == ["epmoe: rank 1 did not finish within 2 s of the others; rank 0 ends too"]


def come_without_one(folder: str) -> None:
    """Ranks 0 and 1 of three; rank 0, whose patience counts, begins once the other one runs, and is young then."""
    here, first = Path(folder, "here"), os.environ["RANK"] == "0"
    if not first:
        here.touch()
    while not here.exists():
        time.sleep(0.01)
    mesh.age_s = lambda: 0.0
    add_for_ever("cpu", 3.0 if first else 60.0)


def test_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    """The wait at the start is bounded; here two of three ranks are started."""
    port = free_port()
    says = f"epmoe: rank 2 did not come to MASTER_PORT {port} within 3 s (runtime.timeout_s); rank {{}} ends too"
    with commands(come_without_one, 2, str(tmp_path), folder=tmp_path, env={"WORLD_SIZE": "3"}, port=port) as started:
        assert end_all(started, WITHIN_S) == [1, 1]
        for rank in (0, 1):
            assert lines(started[rank]) == [says.format(rank)]


def meet_a_stranger() -> None:
    ports, create_server = [], socket.create_server

    def remember(*args, **kwargs):
        server = create_server(*args, **kwargs)
        ports.append(server.getsockname()[1])
        return server

    socket.create_server = remember
    with mesh.start(device="cpu") as mine:
        if mine.is_main:
            for words in (b"GET / HTTP/1.1\r\n\r\n", b'["hello", 1, "guess"]\n', b'["fault", {}]\n', b"7\n", b""):
                with socket.create_connection(("127.0.0.1", ports[0])) as stranger:
                    stranger.sendall(words)
            with socket.create_connection(("127.0.0.1", ports[0])):  # says nothing
                time.sleep(0.5)
        mine.barrier()


def test_strangers_at_the_port_do_no_harm(tmp_path: Path) -> None:
    """A port scanner or another run's rank may connect to rank 0; it knows no token."""
    with commands(meet_a_stranger, 2, folder=tmp_path) as started:
        assert end_all(started, WITHIN_S) == [0, 0]
        assert [command.stderr for command in started] == ["", ""]


@pytest.mark.multigpu
@pytest.mark.parametrize("number", [SIGKILL, SIGSTOP])
def test_watch_over_nccl(number: Signals, tmp_path: Path) -> None:
    """An NCCL kernel waits for a dead peer without raising; the watch ends the rank all the same."""
    with commands(add_for_ever, 2, "cuda", 12.0, folder=tmp_path) as started:
        wait_until_running(started)
        started[1].signal(number)
        assert started[0].wait(10 if number == SIGKILL else 14) == 1  # the process needs a moment to leave the GPU
        assert any(line.startswith("epmoe: rank 1 ") for line in lines(started[0]))
