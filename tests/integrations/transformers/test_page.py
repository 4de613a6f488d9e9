"""The examples of docs/transformers.md run as they are; the one for several ranks says the same bits on one and two."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "transformers.md"
FIRST, RANKS = (block.partition("```")[0] for block in PAGE.read_text(encoding="utf-8").split("```python\n")[1:])


def printed(text: str) -> str:
    """What the piece prints, run in this process, where transformers has been imported already."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(text, str(PAGE), "exec"), {"__name__": "__main__"})
    return out.getvalue()


def test_the_first_example() -> None:
    out = printed(FIRST)
    assert out.startswith("In those days there was") and len(out.split()) > 10


def test_the_example_of_several_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's ranks have
    alone = printed(RANKS)
    torch.set_num_threads(threads)
    script = tmp_path / "this.py"
    script.write_text(RANKS, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [alone.strip().replace("on 1 ranks", "on 2 ranks")] * 2
