"""What all tests share: one thread a process, the tiny checkpoint, the table of compiled kernels, --json."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: ranks of a test share few cores, and torchrun would set the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic gpt-oss checkpoint of the smallest size, for reading only."""
    from epmoe.weights.synthetic import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", size="tiny")


@pytest.fixture(autouse=True)
def compiled_kernels(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Hands what a test has compiled to its report, which reaches the process that writes the summary."""
    yield
    if compiler := sys.modules.get("compile_sm90"):
        while compiler.COMPILED:
            record_property("compiled", compiler.COMPILED.pop(0))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results-json", metavar="FILE", help="write commit, devices, counts and durations to FILE")


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> Iterator[None]:
    yield
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
            durations[report.nodeid] = round(durations.get(report.nodeid, 0) + report.duration, 2)
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
