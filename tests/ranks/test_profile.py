"""runtime.profile: every rank's trace names the steps; without it the names cost nothing and nothing is recorded."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import python
from torch.profiler import ProfilerActivity, profile

from epmoe.errors import UserError
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.profile import activities, profiled
from epmoe.trace import NAMES, named

RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
LAYERS = 2  # of the tiny checkpoint


def events(file: Path, category: str) -> list[dict[str, Any]]:
    """The trace's events that last, of one category: "user_annotation" on the host, "kernel" and
    "gpu_user_annotation" on the device.
    """
    found = json.loads(file.read_text())["traceEvents"]
    return [event for event in found if event.get("ph") == "X" and event.get("cat") == category]


def ranges(file: Path) -> "Counter[str]":
    """How often each name of ours is a range of the trace on the host."""
    return Counter(event["name"] for event in events(file, "user_annotation") if event["name"] in NAMES)


def test_every_rank_names_every_step(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Once a layer and step; the tokens say how many steps there were."""
    folder = tmp_path / "a folder, with=signs"
    keys = [f"checkpoint={tiny_checkpoint}", "runtime=cpu", "prompt=a", "max_new_tokens=3", "sampling.ignore_eos=true"]
    done = python("-m", "epmoe.generate", *keys, f"runtime.profile={folder}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in folder.iterdir()) == ["rank-0.json", "rank-1.json"]
    found = [ranges(file) for file in sorted(folder.iterdir())]
    for counts in found:
        once = {name: counts[name] for name in ("attention", "route", "dispatch", "combine", "sample")}
        assert once == {"attention": 3 * LAYERS, "route": 3 * LAYERS, "dispatch": 3 * LAYERS, "combine": 3 * LAYERS,
                        "sample": 3}  # fmt: skip
        assert counts["gate_up"] == counts["down"]  # the reference runs them once an expert that was chosen
    assert found[0]["gate_up"] + found[1]["gate_up"] > 0


def test_names_are_ranges_only_while_somebody_records() -> None:
    assert named("route") is named("sample")  # one shared object that does nothing
    with profile(activities=[ProfilerActivity.CPU]) as recorder, named("route"):
        torch.ones(1)
    assert "route" in [event.key for event in recorder.key_averages()]
    assert named("route") is named("sample")


def test_no_folder_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with profiled("", RANKS):
        assert not torch.autograd._profiler_enabled()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"runtime\.profile=.*choose another place"),
        profiled(f"{tmp_path}/file/x", RANKS),
    ):
        pytest.fail("found before the run, not after it")


def test_what_is_recorded_of_a_device() -> None:
    assert activities(torch.device("cpu")) == [ProfilerActivity.CPU]
    assert activities(torch.device("cuda", 1)) == [ProfilerActivity.CPU, ProfilerActivity.CUDA]


@pytest.mark.gpu
def test_a_trace_of_the_device_holds_kernels_under_the_names(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Without graphs each name spans the kernels launched under it; with graphs there are kernels, and few names."""
    keys = [f"checkpoint={tiny_checkpoint}", "runtime.device=cuda", "prompt=a", "max_new_tokens=3"]
    keys += ["sampling.ignore_eos=true"]
    for graphs in ("false", "true"):
        folder = tmp_path / graphs
        command = [sys.executable, "-m", "epmoe.generate", *keys, f"runtime.graphs={graphs}"]
        done = subprocess.run([*command, f"runtime.profile={folder}"], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        kernels = events(folder / "rank-0.json", "kernel")
        assert len(kernels) > 5 * 3 * LAYERS and min(event["dur"] for event in kernels) > 0
    file = tmp_path / "false" / "rank-0.json"
    found = ranges(file)
    found.pop("dispatch", None)  # few tokens are routed and dispatched by one kernel
    assert found == {**dict.fromkeys(set(NAMES) - {"dispatch"}, 3 * LAYERS), "sample": 3}
    spans = {event["name"]: event for event in events(file, "gpu_user_annotation")}  # the last of each name
    for name in ("attention", "gate_up", "down", "sample"):
        begin, end = spans[name]["ts"], spans[name]["ts"] + spans[name]["dur"]
        assert any(begin <= kernel["ts"] < end for kernel in events(file, "kernel")), name
