"""scripts/test refuses to pass for GPUs that are not there, and records what was run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ONE = "tests/formats/test_bf16.py::test_checkpoint_layout"


def script(name: str, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    # This interpreter as it is: a test must not install anything.
    env = {**os.environ, "EPMOE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([str(ROOT / "scripts" / name), *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("option, needed", [("--gpu", 1), ("--multigpu", 2)])
def test_refuses_without_devices(option: str, needed: int) -> None:
    done = script("test", option)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"scripts/test: {option} needs {needed} CUDA device(s), found 0: no test was run\n"


@pytest.mark.parametrize(
    "selected",
    [pytest.param("tests/formats/test_bf16.py", id="one process"),
     pytest.param("tests/formats", id="parallel", marks=pytest.mark.slow)],
)  # fmt: skip
def test_record(selected: str, tmp_path: Path) -> None:
    """Counts and the commit are those of the run, of all workers; pytest's own arguments pass through."""
    file = tmp_path / "record.json"
    done = script("test", "--json", str(file), selected, "-k", "test_checkpoint_layout", EPMOE_COMMIT="abc")
    assert done.returncode == 0, done.stdout
    record = json.loads(file.read_text())
    assert {key: record[key] for key in ("passed", "failed", "error", "skipped")} == {
        "passed": 1,
        "failed": 0,
        "error": 0,
        "skipped": 0,
    }
    assert record["commit"] == "abc" and record["devices"] == [] and record["exit_status"] == 0
    assert record["deselected"] > 0 and list(record["durations"]) == [ONE]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("=") and f" 1 passed, {record['deselected']} deselected in " in last
    assert ("workers [" in done.stdout) == (selected == "tests/formats")


def test_chosen_interpreter() -> None:
    assert script("setup").stdout == f"{sys.executable}\n"
    done = script("setup", EPMOE_PYTHON="/no/such/python")
    assert done.returncode == 2 and "EPMOE_PYTHON=/no/such/python is no program" in done.stderr


SOME = ("make_checkpoint", "train_eagle3", "bench/experts", "bench/load", "bench/start", "bench/tune")
REST = (
    "train_demo",
    "bench/attention",
    "bench/moe",
    "bench/orders",
    "bench/rounding",
    "bench/router",
    "bench/speculation",
    "bench/versus",
)
# As `python FILE --help` where epmoe is not installed: the checkout is nowhere on the path. Each in a process of its
# own, all of which have torch, and triton where there is one, from the first one.
BARE = """
import contextlib, os, runpy, sys
import torch
with contextlib.suppress(ImportError):
    import triton
root, *files = sys.argv[1:]
sys.path = [each for each in sys.path if each != root]
for number, file in enumerate(files):
    if not (child := os.fork()):
        os.dup2(os.open(f"{number}.out", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(f"{number}.err", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = [file, "--help"]
        runpy.run_path(file, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("names", [SOME, pytest.param(REST, marks=pytest.mark.slow)], ids=["some", "the rest"])
def test_they_run_from_a_checkout_that_is_not_installed(names: tuple[str, ...], tmp_path: Path) -> None:
    files = [str(ROOT / "scripts" / f"{name}.py") for name in names]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", BARE, str(ROOT), *files]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = done.stdout.split()
    assert len(codes) == len(names)
    for number, name in enumerate(names):
        out, errors = ((tmp_path / f"{number}.{kind}").read_text() for kind in ("out", "err"))
        assert codes[number] == "0" and "usage:" in out, f"{name}: {errors}"
