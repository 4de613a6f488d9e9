"""Other projects' clients: an environment of its own for each, and runs in it that reach this machine alone.

An environment lies in pytest's cache until the releases that it was made of change. Whatever cannot be downloaded fails
the test: a client that is not there has shown nothing.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "clients"
PINS = FOLDER / "constraints.txt"  # the release of every package of every client
SCRIPTS = FOLDER / "ask"
LAST_LINES = 15
PIP_S, RUN_S = 900, 300

# What a client would ask a hub, or tell its makers.
OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "PYTHONPATH": str(FOLDER / "offline"),
}


def environment(folder: Path, *wanted: str, pins: Path = PINS) -> Path:
    """The Python of a virtual environment in `folder` with these packages, in the releases of `pins`.

    It is made where there is none, or one of other releases; where several processes ask, once.

    Raises:
        AssertionError: pip has failed (with its last lines), or has installed what `pins` does not name.
    """
    python, stamp = folder / "bin" / "python", folder / "made-of"
    made_of = "\n".join([sys.version, *wanted, pins.read_text()])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != made_of:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
            _pip(python, "install", "--constraint", str(pins), *wanted)
            more = _releases(_pip(python, "freeze", "--all")) - _releases(pins.read_text())
            assert not more, f"pip installed {', '.join(sorted(more))}: write it into {pins}"
            stamp.write_text(made_of)
    return python


def _releases(text: str) -> set[str]:
    """The lines name==release, with names as pip compares them; neither builds nor what torch itself names exactly."""
    lines = (line.partition("+")[0].partition("==") for line in text.splitlines() if not line.startswith("#"))
    found = {f"{re.sub(r'[-_.]+', '-', name).lower()}=={release}" for name, _, release in lines}
    return {each for each in found if not each.startswith(("nvidia-", "cuda-"))}


def _pip(python: Path, *arguments: str) -> str:
    """What pip prints of another Python's packages."""
    line = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=PIP_S)
    last = "\n".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:])
    assert done.returncode == 0, f"pip {' '.join(arguments)} ended with {done.returncode}:\n{last}"
    return done.stdout


def run(home: Path, python: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """What a run of this Python prints, in the folder `home`; of the environment it sees nothing but `env`.

    Raises:
        AssertionError: it has failed, or asked for another machine.
    """
    home.mkdir(parents=True, exist_ok=True)
    refused = home / "refused"
    known = {"PATH": f"{python.parent}:{os.defpath}", "HOME": str(home), "REFUSED": str(refused), **OFFLINE}
    line = [str(python), "-P", *arguments]
    done = subprocess.run(
        line, cwd=home, env={**known, **(env or {})}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=RUN_S,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert not refused.exists(), f"{arguments[0]} asked for {refused.read_text()}"
    return done.stdout


def asked(home: Path, python: Path, script: str, *arguments: str) -> dict[str, Any]:
    """The object that a script of SCRIPTS prints as its last line."""
    found: dict[str, Any] = json.loads(run(home, python, str(SCRIPTS / script), *arguments).splitlines()[-1])
    return found
