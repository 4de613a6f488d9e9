"""launch/: every script runs the same torchrun line and hands the keys on untouched; the manifest is a valid pair."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ["one_node.sh", "multi_node.sh", "slurm.sbatch"]
KEYS = ["checkpoint=/a b/c", 'prompt=It\'s "${x}" $HOME,\nnew line *', "sampling.stop="]


def run(script: str, fake: Path, *first: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a launch script with stand-ins for torchrun and Slurm first on the PATH, and `first` before the keys."""
    programs = {
        "torchrun": f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n",
        "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n',
        "srun": '#!/bin/sh\nshift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n',
    }
    fake.mkdir(exist_ok=True)
    for name, text in programs.items():
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *first, *KEYS],
        env=clean | {"PATH": f"{fake}:{os.environ['PATH']}"} | env,
        cwd=fake,
        capture_output=True,
        text=True,
    )


def test_one_node(tmp_path: Path) -> None:
    shown = run("one_node.sh", tmp_path, NPROC_PER_NODE="3").stdout
    assert json.loads(shown) == ["--standalone", "--nproc-per-node", "3", "-m", "epmoe.generate", *KEYS]


def line(nodes: str, rank: str, ranks: str, address: str, port: str) -> list[str]:
    agent = ["--nnodes", nodes, "--node-rank", rank, "--nproc-per-node", ranks]
    return [*agent, "--master-addr", address, "--master-port", port, "-m", "epmoe.generate", *KEYS]


def test_multi_node(tmp_path: Path) -> None:
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node7"}
    assert json.loads(run("multi_node.sh", tmp_path, **node).stdout) == line("2", "1", "auto", "node7", "29500")
    node |= {"MASTER_PORT": "1234", "NPROC_PER_NODE": "4"}
    assert json.loads(run("multi_node.sh", tmp_path, **node).stdout) == line("2", "1", "4", "node7", "1234")


@pytest.mark.parametrize("absent", ["NNODES", "NODE_RANK", "MASTER_ADDR"])
def test_multi_node_says_what_is_missing(tmp_path: Path, absent: str) -> None:
    """A node that ran alone with a default would wait for ever or write the text of a different run."""
    node = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node7"}
    del node[absent]
    done = run("multi_node.sh", tmp_path, **node)
    assert done.returncode != 0 and done.stdout == "" and f"{absent}: set it" in done.stderr


def test_slurm(tmp_path: Path) -> None:
    """One torchrun a node, the same line as multi_node.sh's, apart from the node's rank."""
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "61234"}
    done = run("slurm.sbatch", tmp_path, SLURM_GPUS_ON_NODE="8", **job)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(each) for each in done.stdout.splitlines()]
    assert lines == [line("2", rank, "8", "node7", "21234") for rank in "01"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_serve_is_another_module_in_the_same_line(tmp_path: Path, script: str) -> None:
    """And only as the first word."""
    node = {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "node7"}
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "1"}
    plain, other, late = (run(script, tmp_path, *first, **node, **job) for first in ((), ("serve",), ("a=b", "serve")))
    assert other.returncode == 0 and other.stdout == plain.stdout.replace("epmoe.generate", "epmoe.serve")
    assert late.stdout == plain.stdout.replace('"epmoe.generate"', '"epmoe.generate", "a=b", "serve"')
    assert other.stderr == ("launch/slurm.sbatch: HTTP will be at node7\n" if script == "slurm.sbatch" else "")


def test_kubernetes() -> None:
    """The fields that Kubeflow Trainer v2 reads: a runtime whose `node` is the trainer, and its job."""
    runtime, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert {runtime["apiVersion"], job["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node"
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod: dict[str, Any] = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "node"
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert "torch" in runtime["spec"]["mlPolicy"]

    trainer = job["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "epmoe.generate"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    from epmoe.config.compose import parse

    assert parse(trainer["args"]).checkpoint.startswith(container["volumeMounts"][0]["mountPath"])


def test_every_launcher_is_linted() -> None:
    """scripts/check lints these too; this holds that it does not forget one of them."""
    for script in SCRIPTS:
        assert (LAUNCH / script).read_text().startswith("#!/usr/bin/env bash\n")
        assert os.access(LAUNCH / script, os.X_OK)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck
    subprocess.run([shellcheck, *SCRIPTS], cwd=LAUNCH, check=True)
    subprocess.run([sys.executable, "-m", "yamllint", "--strict", "launch", "conf"], cwd=ROOT, check=True)
