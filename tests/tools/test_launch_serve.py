"""launch/ for a server: what the manifests and the image say is what the server has, and their probes run."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from told import told
from torch.distributed.run import get_args_parser

from epmoe.config.compose import parse
from epmoe.config.schema import ServerConfig

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
DOCKERFILE = (LAUNCH / "Dockerfile").read_text()
Pod = dict[str, Any]


def pods(name: str) -> tuple[list[Pod], Pod, Pod]:
    """A manifest's pod templates, the first one with HTTP; its workload and its service."""
    workload, service = yaml.safe_load_all((LAUNCH / name).read_text())
    spec = workload["spec"]
    if workload["kind"] == "Deployment":
        return [spec["template"]], workload, service
    group = spec["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]], workload, service


MANIFESTS = {"serve_pod.yaml": "Deployment", "serve_nodes.yaml": "LeaderWorkerSet"}
CONTAINERS = [
    pytest.param(pod["spec"], number == 0, id=f"{name} {number}")
    for name in MANIFESTS
    for number, pod in enumerate(pods(name)[0])
]


def line(arguments: list[str], **env: str) -> tuple[Any, ServerConfig]:
    """torchrun's options and the keys behind them, with the variables in place that the cluster fills in."""
    for name, value in env.items():
        arguments = [each.replace(f"$({name})", value) for each in arguments]
    options = get_args_parser().parse_args(arguments)
    assert options.module and options.training_script == "epmoe.serve"
    return options, parse(options.training_script_args, ServerConfig)


@pytest.mark.parametrize(("spec", "speaks"), CONTAINERS)
def test_a_pod(spec: Pod, speaks: bool) -> None:
    """Its command, its probes, time enough to end, no more rights than it needs."""
    (box,) = spec["containers"]
    group = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "epmoe-0.epmoe"}
    options, config = line(box["args"], **group)
    assert box["command"] == ["torchrun"]
    assert int(options.nproc_per_node) == box["resources"]["limits"]["nvidia.com/gpu"]
    assert options.standalone or (options.nnodes, options.node_rank, options.master_addr) == ("2", 1, "epmoe-0.epmoe")
    assert config.serve.host == "0.0.0.0" and config.checkpoint.startswith(box["volumeMounts"][0]["mountPath"])
    assert {each["name"] for each in box["volumeMounts"]} == {each["name"] for each in spec["volumes"]}
    (pause,) = box["lifecycle"]["preStop"]["exec"]["command"][1:]
    assert spec["terminationGracePeriodSeconds"] > int(pause) + 30 > int(pause) + config.serve.drain_s
    assert spec["securityContext"]["runAsNonRoot"] and not box["securityContext"]["allowPrivilegeEscalation"]
    assert box["env"][0]["name"] == "EPMOE_API_KEY" and "valueFrom" in box["env"][0]
    startup, ready, alive = (box[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1200
    if speaks:
        assert box["ports"] == [{"name": "http", "containerPort": config.serve.port}]
        assert [each["httpGet"] for each in (startup, ready, alive)] == [
            {"path": path, "port": "http"} for path in ("/ready", "/ready", "/health")
        ]
    else:
        assert box["ports"] == [] and all("exec" in each for each in (startup, ready, alive))


@pytest.mark.parametrize(("name", "kind"), MANIFESTS.items())
def test_the_service_finds_who_speaks_http(name: str, kind: str) -> None:
    (speaks, *others), workload, service = pods(name)
    assert workload["kind"] == kind and service["kind"] == "Service"
    wanted = service["spec"]["selector"].items()
    assert wanted <= speaks["metadata"]["labels"].items()
    assert not any(wanted <= each["metadata"]["labels"].items() for each in others)
    assert [each["targetPort"] for each in service["spec"]["ports"]] == ["http"]
    if kind == "Deployment":
        assert workload["spec"]["selector"]["matchLabels"] == speaks["metadata"]["labels"]
    else:
        assert workload["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
        assert workload["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with told(tmp_path_factory.mktemp("told"), {}, key="secret") as address:
        yield address


def probed(command: list[str], at: str, **env: str) -> int:
    """The exit code of a probe, at this server's port."""
    port = at.rpartition(":")[2]
    command = [sys.executable if each == "python" else each.replace(":8000/", f":{port}/") for each in command]
    return subprocess.run(command, env={**os.environ, **env}, stderr=subprocess.DEVNULL, timeout=100).returncode


def test_probes_of_a_worker_run(at: str) -> None:
    (box,) = pods("serve_nodes.yaml")[0][1]["spec"]["containers"]
    ready = box["readinessProbe"]["exec"]["command"]
    assert probed(ready, at, LWS_LEADER_ADDRESS="127.0.0.1") == 0
    assert probed(ready, "http://127.0.0.1:1", LWS_LEADER_ADDRESS="127.0.0.1") != 0
    # In a container there is nobody else's rank: here the name is made one that nobody has.
    alive = [each.replace("LOCAL_RANK", "EPMOE_TEST_RANK") for each in box["livenessProbe"]["exec"]["command"]]
    assert box["startupProbe"]["exec"] == box["livenessProbe"]["exec"] and "EPMOE_TEST_RANK" in alive[-1]
    assert probed(alive, at) != 0
    pipe, env = subprocess.PIPE, {**os.environ, "EPMOE_TEST_RANK": "0"}
    with subprocess.Popen(["sh", "-c", "echo runs; read _"], stdin=pipe, stdout=pipe, env=env) as rank:
        assert rank.stdout and rank.stdout.readline() == b"runs\n"  # before, its environment may still be empty
        assert probed(alive, at) == 0
        rank.kill()
    assert probed(alive, at) != 0


# --- the image ---


def instructions() -> list[tuple[str, str]]:
    """(name, the rest) of each, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, rest in re.findall(r"^(\w+) (.*)$", text, re.MULTILINE)]


def test_the_image_is_built_as_images_should_be() -> None:
    """What hadolint asks for, as far as there is something to ask here."""
    found = instructions()
    names = [name for name, _ in found]
    steps = dict(found)
    assert names[0] == "FROM" and names.count("FROM") == 1 and re.fullmatch(r"python:[\d.]+-slim-\w+", steps["FROM"])
    assert not {"ADD", "MAINTAINER", "SHELL", "VOLUME"} & set(names)
    for run in (rest for name, rest in found if name == "RUN"):
        assert "sudo" not in run and "apt " not in run and ";" not in run
        if "apt-get install" in run:
            assert "apt-get update &&" in run and "-y --no-install-recommends" in run
            assert run.endswith("rm -rf /var/lib/apt/lists/*")
        if "pip install" in run:
            assert "--no-cache-dir" in run and "-c /source/constraints.txt" in run
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", steps["USER"]), "a number, which runAsNonRoot can read"
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    assert steps["WORKDIR"].startswith("/")
    for name in ("ENTRYPOINT", "CMD"):  # without a shell between, so that signals arrive
        assert isinstance(json.loads(steps[name]), list)


def test_the_image_serves_where_it_is_probed(at: str) -> None:
    steps = dict(instructions())
    program, *arguments = json.loads(steps["ENTRYPOINT"])
    _, config = line([*arguments, *json.loads(steps["CMD"])])
    assert program == "torchrun" and str(config.serve.port) == steps["EXPOSE"]
    check = json.loads(steps["HEALTHCHECK"].partition("CMD ")[2])
    assert f":{config.serve.port}/health" in check[-1]
    assert probed(check, at) == 0 and probed(check, "http://127.0.0.1:1") != 0


def test_the_image_holds_what_an_installation_needs() -> None:
    """Its context is what pyproject.toml builds from; the line that starts it has keys that there are."""
    kept = {each[1:] for each in (LAUNCH / "Dockerfile.dockerignore").read_text().split() if each.startswith("!")}
    assert kept == {"conf", "epmoe", "constraints.txt", "pyproject.toml", "LICENSE", "README.md"}
    assert all((LAUNCH.parent / each).exists() for each in kept)
    (serving,) = re.findall(r"^#   (docker run .*)\\\n#(.*checkpoint=.*)$", DOCKERFILE, re.MULTILINE)
    words = shlex.split("".join(serving))
    assert parse(words[words.index("epmoe") + 1 :], ServerConfig).checkpoint == "/checkpoints/gpt-oss-120b"
