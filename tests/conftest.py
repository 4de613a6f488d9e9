"""What all tests share: one thread a process, the tiny checkpoint, workers that take turns, --json."""

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before torch is imported: ranks of a test share few cores, and torchrun would set the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from turns import Turns

ROOT = Path(__file__).resolve().parent.parent
MOST_WORKERS = 8  # each holds torch and starts ranks; the longest test bounds what more could gain


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic gpt-oss checkpoint of the smallest size, for reading only."""
    from epmoe.weights.synthetic import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", size="tiny")


@pytest.fixture
def settled_device() -> None:
    """For tests that measure device memory: what earlier ones left in cycles goes now, not in the middle of them."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def compiled_kernels(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Hands what a test has compiled to its report, which reaches the process that writes the summary."""
    yield
    if compiler := sys.modules.get("compile_sm90"):
        while compiler.COMPILED:
            record_property("compiled", compiler.COMPILED.pop(0))


# --- tests in parallel (pytest-xdist, where it is installed) ----------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` stands for: the cores, two at least, as tests also wait; none for a single file and with -s."""
    if config.getoption("capture") == "no" or not all(Path(each).is_dir() for each in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores, 2), MOST_WORKERS)


def wants_to_be_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run alone come first, one after the other: one wait for the other workers, not many."""
    items.sort(key=wants_to_be_alone, reverse=True)


TURNS = pytest.StashKey[Turns]()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker; its own temporary folder lies within that of the run
        config.stash[TURNS] = Turns(Path(config.option.basetemp).parent)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Around everything else, so that waiting for a turn is not counted against a test's timeout."""
    turns = item.config.stash.get(TURNS, None)
    if turns is None:
        return (yield)
    turns.take(alone=wants_to_be_alone(item))
    try:
        return (yield)
    finally:
        if not (wants_to_be_alone(item) and nextitem is not None and wants_to_be_alone(nextitem)):
            turns.end()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Each worker selects for itself, and the one that writes the summary has to hear of it."""
    if items and hasattr(config := items[0].config, "workeroutput"):
        config.workeroutput.setdefault("deselected", []).extend(item.nodeid for item in items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    stats = node.config.pluginmanager.getplugin("terminalreporter").stats
    if names := getattr(node, "workeroutput", {}).get("deselected"):  # not of a worker that has crashed
        stats["deselected"] = [SimpleNamespace(nodeid=name) for name in names]  # all of them say the same


# --- the summary ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results-json", metavar="FILE", help="write commit, devices, counts and durations to FILE")


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> Iterator[None]:
    yield
    if config.getoption("capture") == "no":
        write_kernels(terminalreporter)
    if file := config.getoption("--results-json"):
        record = results(terminalreporter.stats, exitstatus, config.getoption("markexpr"))
        Path(file).write_text(json.dumps(record, indent=1) + "\n")


def write_kernels(reporter: Any) -> None:
    """What the kernels cost that tests have compiled, when they have."""
    reports = [
        report for each in reporter.stats.values() for report in each if getattr(report, "when", "") == "teardown"
    ]
    found = [value for report in reports for name, value in report.user_properties if name == "compiled"]
    if found:
        from compile_sm90 import table

        reporter.section("kernels compiled: a thread's registers, bytes spilled, bytes of shared memory")
        for line in table(found):
            reporter.line(line)


def results(stats: dict[str, list[Any]], exitstatus: int, marks: str) -> dict[str, Any]:
    """What was run, where, and how it ended; `stats` are pytest's reports by outcome."""
    from importlib.metadata import PackageNotFoundError, version

    releases = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            releases[name] = version(name)
        except PackageNotFoundError:
            releases[name] = "not installed"
    durations: dict[str, float] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in stats.get(outcome, []):
            durations[report.nodeid] = round(durations.get(report.nodeid, 0) + getattr(report, "duration", 0), 2)
    return {
        "commit": commit(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "releases": releases,
        "selected": marks,
        "exit_status": int(exitstatus),
        **{name: len(stats.get(name, [])) for name in ("passed", "failed", "error", "skipped", "deselected")},
        "skipped_tests": sorted(report.nodeid for report in stats.get("skipped", [])),
        "failed_tests": sorted(report.nodeid for name in ("failed", "error") for report in stats.get(name, [])),
        "seconds": round(sum(durations.values()), 1),
        "durations": dict(sorted(durations.items(), key=lambda item: -item[1])),
    }


def commit() -> str:
    """The checkout's commit, with "-dirty" when tracked files differ; EPMOE_COMMIT where there is no git checkout."""
    if named := os.environ.get("EPMOE_COMMIT"):
        return named
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
