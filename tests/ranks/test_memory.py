"""Memory: what is free within every limit, and a host that runs full is one line, as a device is."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spawn import commands

from epmoe.errors import UserError
from epmoe.ranks.memory import NO_LIMIT, free_bytes, group_bytes, is_full, process_bytes, told_when_full
from epmoe.ranks.mesh import start
from epmoe.weights.synthetic import make_checkpoint

CPU = torch.device("cpu")


def group(folder: Path, limit: str, used: int, cached: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def process_in(root: Path, line: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"9:name=systemd:/\n{line}\n")


@pytest.mark.parametrize(("version", "line"), [(2, "0::/pod/box"), (1, "4:cpu,memory:/pod/box")])
def test_the_tightest_group_counts(version: int, line: str, tmp_path: Path) -> None:
    """A limit stands on any floor; what files cache is not lost."""
    top = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    process_in(tmp_path, line)
    assert group_bytes(tmp_path) == NO_LIMIT  # within a container the groups may not be there at all
    group(top / "pod/box", "max" if version == 2 else str(NO_LIMIT + 10), 10, 0, version)
    assert group_bytes(tmp_path) >= NO_LIMIT
    group(top / "pod", "1000", 700, 50, version)
    assert group_bytes(tmp_path) == 350
    group(top / "pod/box", "300", 100, 20, version)
    assert group_bytes(tmp_path) == 220


def test_other_groups_say_nothing(tmp_path: Path) -> None:
    process_in(tmp_path, "7:cpu:/pod")
    group(tmp_path / "sys/fs/cgroup/memory/pod", "1000", 700, 50, 1)
    assert group_bytes(tmp_path) == group_bytes(tmp_path / "nowhere") == NO_LIMIT


def test_free_is_the_least_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_bytes(CPU) < NO_LIMIT and process_bytes() == NO_LIMIT
    for name in ("machine_bytes", "process_bytes", "group_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(f"epmoe.ranks.memory.{name}", lambda: 7)
            assert free_bytes(CPU) == 7
    monkeypatch.setattr("epmoe.ranks.memory.group_bytes", lambda: -5)
    assert free_bytes(CPU) == 0


def test_what_running_full_looks_like() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 60)
    assert is_full(told.value)
    assert is_full(MemoryError()) and is_full(torch.OutOfMemoryError("x")) and is_full(RuntimeError("std::bad_alloc"))
    assert is_full(OSError(errno.ENOMEM, "x"))
    assert not is_full(OSError(errno.ENOENT, "x")) and not is_full(RuntimeError("shape")) and not is_full(ValueError())
    words = r"cpu ran out of memory with \d+\.\d GB left: buy some"
    with pytest.raises(UserError, match=words), told_when_full(CPU, "buy some"):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="shape"), told_when_full(CPU):
        raise RuntimeError("shape")


def runs_full(rank: int) -> None:
    with start(device="cpu", timeout_s=20) as ranks:
        if ranks.rank == rank:
            torch.empty(1 << 60)
        ranks.meet()


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1)])
def test_memory_that_runs_out_anywhere_is_one_line(size: int, rank: int, tmp_path: Path) -> None:
    with commands(runs_full, size, rank, folder=tmp_path) as started:
        assert [each.wait(60) for each in started] == [2] * size
        lines = [line for each in started for line in each.stderr.splitlines()]
    assert len(lines) == 1 and "memory ran out (" in lines[0] and "raise the limit (ulimit -v, the" in lines[0], lines
    assert lines[0].startswith("epmoe: error: " + ("rank 1: " if rank else ""))


UNDER_A_LIMIT = """
import resource, sys
from epmoe.ranks.command import main
from epmoe.generate import generate
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv.pop(1)) << 20),) * 2)
main(generate)
"""


@pytest.mark.parametrize(("spare", "says"), [(150, "weights need"), pytest.param(330, "", marks=pytest.mark.slow)])
def test_a_command_under_ulimit(spare: int, says: str, tmp_path: Path) -> None:
    """Megabytes beyond what the interpreter has, too few for the weights: one line, no text."""
    make_checkpoint(tmp_path, vocab=40_000, hidden=1024, layers=1)
    keys = [f"checkpoint={tmp_path}", "chat=off", "prompt=Hi", "max_new_tokens=2", "runtime.device=cpu"]
    ended = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT, str(spare), *keys], capture_output=True, text=True)
    lines = [line for line in ended.stderr.splitlines() if "auto" not in line]
    assert ended.returncode == 2 and not ended.stdout, ended
    assert len(lines) == 1 and lines[0].startswith("epmoe: error: ") and "memory" in lines[0] and says in lines[0]
