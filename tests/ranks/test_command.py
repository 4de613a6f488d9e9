"""Command: restarts, early mistakes and clean ends under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUM = """
import os, sys, time
import torch, torch.distributed as dist
from epmoe.errors import UserError
from epmoe.ranks import command, mesh

def body():
    rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
    {early}
    with mesh.start(device="cpu", timeout_s=30) as mine:
        x = torch.ones(1)
        dist.all_reduce(x, group=mine.expert_group)
        {late}
        dist.all_reduce(x, group=mine.expert_group)
        if mine.is_main:
            print("sum", x.item())

{before}
command.main(body)
"""


def torchrun(
    folder: Path, *options: str, early: str = "", late: str = "", before: str = ""
) -> tuple[int, str, list[str]]:
    """Run a small command on 2 ranks: exit code, standard output, our lines of standard error."""
    script = folder / "command.py"
    script.write_text(SUM.format(early=early or "pass", late=late or "pass", before=before))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*run, *options, str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("epmoe: ")]


@pytest.mark.slow  # tests/whole/test_served.py has a restart
def test_restart_recovers(tmp_path: Path) -> None:
    """`--max-restarts`: keys that the first attempt left in the agent's store must not mislead the second.

    There rank 0 comes late, so that rank 1 would find the old keys.
    """
    death = 'if attempt == "0" and rank == 1: os.kill(os.getpid(), 9)'
    delay = 'if attempt == "1" and rank == 0: time.sleep(1)'
    code, out, lines = torchrun(tmp_path, "--max-restarts=1", early=delay, late=death)
    assert (code, out) == (0, "sum 4.0\n")
    assert lines == ["epmoe: rank 1 ended without a word (killed?); rank 0 ends too"]


@pytest.mark.slow  # tests/whole/test_starting.py has it without an agent
def test_early_mistake_is_told_once_though_rank_0_is_slow(tmp_path: Path) -> None:
    """A mistake before the ranks meet: the agent would end rank 0 before it has told it, did the others not wait."""
    code, out, lines = torchrun(
        tmp_path, before="if os.environ['RANK'] == '0': time.sleep(2)", early='raise UserError("no such key")'
    )
    assert (code != 0, out, lines) == (True, "", ["epmoe: error: no such key"])


@pytest.mark.slow  # tests/config/test_compose.py has a mistake under torchrun
def test_early_mistake_of_another_rank_is_told(tmp_path: Path) -> None:
    """A file that only the second node lacks: rank 0 has no mistake of its own, so it tells that rank's."""
    mistake = 'if rank == 1: raise UserError("no such file")'
    code, out, lines = torchrun(tmp_path, early=mistake)
    assert (code != 0, out, lines) == (True, "", ["epmoe: error: rank 1: no such file"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_clean_end_fifty_times_under_torchrun(tmp_path: Path) -> None:
    """The default mesh crashed at interpreter exit in 7 of 24 runs; this end must not in 50."""
    for _ in range(50):
        code, out, lines = torchrun(tmp_path)
        assert (code, out, lines) == (0, "sum 4.0\n", [])
