"""Launch: coordinates and devices from the environment, each mistake in it one line; several nodes."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from spawn import commands, free_port

from epmoe.errors import UserError
from epmoe.ranks import launch, mesh

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("env", "options", "words"),
    [
        pytest.param({"RANK": "x"}, {}, "RANK='x' is not a number", id="no-number"),
        pytest.param({"RANK": "2", "WORLD_SIZE": "2"}, {}, "RANK=2 of WORLD_SIZE=2", id="rank-beyond-the-size"),
        pytest.param({"RANK": "1", "WORLD_SIZE": "2"}, {}, "WORLD_SIZE=2 without MASTER_ADDR", id="no-master"),
        pytest.param({}, {"mesh": (0, 2)}, "mesh.expert=2 does not divide the number of ranks, 1", id="mesh"),
        pytest.param({}, {"device": "abacus"}, "runtime.device='abacus' is unknown; known: auto, cpu", id="device"),
    ],
)
def test_mistakes(env: dict[str, str], options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as mistake, mesh.start(**options):
        pass
    assert words in str(mistake.value) and "\n" not in str(mistake.value)


class Devices:
    """Stands for torch's accelerator: the devices that a rank sees, by their identity."""

    def __init__(self, seen: list[str], kind: str = "cuda") -> None:
        self.seen, self.kind = seen, kind

    def put(self, patch: pytest.MonkeyPatch) -> None:
        module = torch.get_device_module(self.kind)
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(self.kind))
        patch.setattr(torch.accelerator, "set_device_index", lambda index: self.seen[index])
        patch.setattr(module, "device_count", lambda: len(self.seen))
        patch.setattr(module, "get_device_properties", lambda device: SimpleNamespace(uuid=self.seen[device.index]))
        patch.setattr(module, "get_device_name", lambda device: "an accelerator")


def see(seen: list[list[str]]) -> None:
    """Each rank its own; rank 0 says which device it took, and no group is made."""
    Devices(seen[int(os.environ["RANK"])]).put(pytest.MonkeyPatch())
    mesh._grouped = lambda met, *_: sys.exit(f"took {met.device}")
    with mesh.start(timeout_s=20):
        pass


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        pytest.param([["A", "B"]] * 3, "3 ranks on one node cannot share 2 cuda devices: start at most 2", id="two"),
        pytest.param([["A"]] * 2, "ranks 0 and 1 cannot share one cuda device: start at most one", id="one"),
        pytest.param([["A"], ["B"], ["A"]], "ranks 0 and 2 cannot share one cuda device: start", id="its-own-but-one"),
    ],
)
def test_two_ranks_never_share_a_device_silently(seen: list[list[str]], says: str, tmp_path: Path) -> None:
    with commands(see, len(seen), seen, folder=tmp_path) as started:
        assert [command.wait(30) for command in started] == [2] * len(seen)
        assert started[0].stderr.startswith(f"epmoe: device=cuda (auto)\nepmoe: error: {says}")
        assert len(started[0].stderr.splitlines()) == 2
        assert started[0].stderr.endswith(" or take runtime.device=cpu\n")


@pytest.mark.parametrize(
    ("local", "seen", "index"),
    [
        pytest.param({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, ["D"], 0, id="one-for-each-task"),
        pytest.param({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, ["A", "B", "C", "D"], 3, id="all"),
        pytest.param({}, ["A", "B", "C", "D"], 3, id="all-by-hand"),
    ],
)
def test_which_device(local: dict[str, str], seen: list[str], index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number LOCAL_RANK of those on the node; where a launcher shows each task one of its own, that one."""
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", **local}.items():
        monkeypatch.setenv(name, value)
    Devices(seen).put(monkeypatch)
    assert launch.rank_device("cuda", launch.Launch.read()) == torch.device("cuda", index)


@pytest.mark.parametrize(("there", "kind"), [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu"), ("", "cpu")])
def test_auto(there: str, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The accelerator that torch has, if there is a way between ranks for it; else the CPU."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if kind != "cpu":
        Devices(["A"], kind).put(monkeypatch)
    found = torch.device(there) if there else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert launch.rank_device("auto", launch.Launch.read()).type == kind
    assert capsys.readouterr().err == f"epmoe: device={kind} (auto)\n"


# (timeout_s, age) → how long the others are waited for from now on, and the time that an error names
PATIENCE = [
    ((5.0, 0.0), 4.5, "5 s"),
    ((5.0, 1.5), 3.0, "5 s"),  # from the process' start
    ((5.0, 30.0), 5.0, "5 s"),
    ((100.0, 80.0), 20.0, "100 s"),  # a quarter of what importing took
    ((100.0, 90.0), 22.5, "112 s"),
    ((5.0, 4.4), 1.1, "5.5 s"),
    ((2.0, 1.8), 1.0, "2.8 s"),  # a second at least
    ((1.0, 1.5), 1.0, "1 s"),
]


@pytest.mark.parametrize(("given", "wait_s", "says"), PATIENCE)
def test_how_long_ranks_wait_for_those_to_come(given: tuple[float, float], wait_s: float, says: str) -> None:
    with mock.patch("time.monotonic", return_value=1000.0):
        found = launch.Patience.of(*given)
        assert found.until == pytest.approx(1000.0 + wait_s) and found.left_s == pytest.approx(wait_s)
    assert str(found) == says


def join(timeout_s: float) -> None:
    with mesh.start(device="cpu", timeout_s=timeout_s):
        pass


def test_a_stranger_at_the_port_is_waited_for_no_longer_than_for_a_rank(tmp_path: Path) -> None:
    """A service that accepts connections and says nothing; torch alone would wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with commands(join, 2, 2.0, folder=tmp_path, port=port) as started:
            assert [command.wait(30) for command in started] == [2, 2]
            assert started[0].stderr.startswith(f"epmoe: error: MASTER_PORT {port} is taken, perhaps by another run: ")
            cannot = rf"epmoe: error: rank 1 cannot use MASTER_ADDR:MASTER_PORT 127\.0\.0\.1:{port}"
            assert re.fullmatch(rf"{cannot} \(no answer within [\d.]+ s, runtime\.timeout_s\)\n", started[1].stderr)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("size", ["1", "2"])
def test_no_device_at_all(size: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many ranks there are is not what is wrong then, and fewer of them are no remedy."""
    monkeypatch.setattr(torch.get_device_module(kind), "device_count", lambda: 0)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as mistake:
        launch.rank_device(kind, launch.Launch.read())
    message = str(mistake.value)
    assert message.startswith(f"runtime.device={kind}, but torch sees no {kind} device") and "\n" not in message
    assert message.endswith("or take runtime.device=cpu") and "ranks" not in message


def test_two_agents_give_the_tokens_of_one_rank(tmp_path: Path) -> None:
    """The two-node case, by the script for it: LOCAL_RANK is not the expert rank, and each node counts from 0."""
    keys = ["runtime.device=cpu", "combine=slots", "prompt=In the beginning", "max_new_tokens=12"]
    port = free_port()
    node = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = [
        subprocess.Popen(
            ["bash", str(ROOT / "launch" / "multi_node.sh"), *keys, f"output={tmp_path}/two.jsonl"],
            env=os.environ | node | {"NODE_RANK": str(rank), "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        with commands(generate, 1, *keys, f"output={tmp_path}/one.jsonl", folder=tmp_path) as (one,):
            assert one.wait(60) == 0, one.stderr
        outputs = [each.communicate(timeout=100) for each in nodes]
    finally:
        for each in nodes:
            each.terminate()
    assert [each.returncode for each in nodes] == [0, 0], outputs
    assert [out for out, _ in outputs] == [one.stdout, ""]
    two, one_rank = (json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in ("two", "one"))
    ids = [key for key in two if key.endswith("ids")]
    assert ids and all(two[key] == one_rank[key] for key in ids)


def generate(*keys: str) -> None:
    from epmoe.generate import generate as body

    sys.argv[1:] = keys
    body()


@pytest.mark.gpu
def test_a_device_that_cannot_start_up_is_left_to_its_first_use(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed, and nothing hangs."""
    for device in (torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 99)):
        launch.wake(device)
    for thread in [each for each in threading.enumerate() if each.name == "epmoe-wake"]:
        thread.join(60)
        assert not thread.is_alive()
    assert capfd.readouterr() == ("", "")
