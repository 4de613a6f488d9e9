"""Each case in a process of its own, forked from one that has imported everything, and watched: time, memory, output.

A case's checkpoint is a copy of a small one in two shards, in a folder that is removed afterwards.
"""

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmoe.generate import generate
from epmoe.ranks.command import main
from epmoe.weights.synthetic import make_checkpoint
from scripts.fuzzing.damage import Damage, do

LIMIT_S = 20.0  # of one case: a small checkpoint takes a tenth of a second
LIMIT_BYTES = 2 << 30
FIXED = ("runtime.device=cpu", "runtime.progress=false")

Case = tuple[str, int]  # kind and seed


@dataclass(frozen=True)
class Outcome:
    """What came of a process."""

    case: Case
    damage: Damage
    code: int  # exit code; a signal's number negative
    stdout: str
    stderr: str
    seconds: float
    most_bytes: int  # resident
    stopped: str  # why it was ended from outside: "" if it was not


class Running:
    """A process under way."""

    def __init__(self, case: Case, damage: Damage, folder: Path) -> None:
        self.case, self.damage, self.folder = case, damage, folder
        self.begin, self.most, self.stopped = time.monotonic(), 0, ""
        for name in ("stdout", "stderr"):  # before the process: it may be ended before it comes to that
            (folder / name).touch(0o600)
        self.pid = os.fork()
        if self.pid == 0:
            _become(damage.keys, folder)

    def poll(self) -> Outcome | None:
        """What came of it, once it has ended; ends it when it goes beyond a limit."""
        with suppress(OSError, IndexError, ValueError):
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            self.most = max(self.most, pages * resource.getpagesize())
        if not self.stopped and time.monotonic() - self.begin > LIMIT_S:
            self._stop(f"ran for {LIMIT_S:g} s")
        if not self.stopped and self.most > LIMIT_BYTES:
            self._stop(f"took {self.most >> 20} MB")
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        said = [(self.folder / name).read_bytes().decode("utf-8", "replace") for name in ("stdout", "stderr")]
        seconds, code = time.monotonic() - self.begin, os.waitstatus_to_exitcode(status)
        shutil.rmtree(self.folder, ignore_errors=True)
        return Outcome(self.case, self.damage, code, said[0], said[1], seconds, self.most, self.stopped)

    def _stop(self, why: str) -> None:
        self.stopped = why
        os.kill(self.pid, signal.SIGKILL)


def _become(keys: Sequence[str], folder: Path) -> None:
    """Run the command in this process, which does not return."""
    os.chdir(folder)
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")  # not a test runner's
    sys.argv[1:] = [*FIXED, *keys]
    main(generate)


def prepared(folder: Path) -> Path:
    """The checkpoint that cases damage: two shards, two layers."""
    sizes: dict[str, Any] = {"hidden": 64, "intermediate": 32, "experts": 4, "heads": 2, "kv_heads": 1, "head_dim": 32}
    return make_checkpoint(folder / "whole", vocab=320, max_position=256, shards=2, **sizes)


def run(cases: Iterator[Case], jobs: int, take: Callable[[Outcome], None]) -> None:
    """Run the cases, `jobs` at a time, and hand over what came of each."""
    with tempfile.TemporaryDirectory(prefix="epmoe-fuzz-") as place:
        running: list[Running] = []
        whole, number, more = prepared(Path(place)), 0, True
        while more or running:
            while more and len(running) < jobs:
                case = next(cases, None)
                if case is None:
                    more = False
                    break
                number += 1
                folder = Path(place) / str(number)
                shutil.copytree(whole, folder)
                running.append(Running(case, do(*case, folder), folder))
            time.sleep(0.005)
            ended = [(each, outcome) for each in running if (outcome := each.poll()) is not None]
            running = [each for each in running if each not in [one for one, _ in ended]]
            for _, outcome in ended:
                take(outcome)
