"""Programs as users start them, but for the seconds that a fresh interpreter takes to import torch: see `spawn`."""

import atexit
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from spawn import FORK, free_port, launch_of

STREAMS = ("in", "out", "err")


class Forked:
    """A program that runs, as a subprocess.Popen; its streams are the files `in`, `out` and `err` of a folder."""

    def __init__(self, words: Sequence[str], folder: Path, env: Mapping[str, str], stdin: str = "") -> None:
        for name in STREAMS:
            (folder / name).write_text(stdin if name == "in" else "", encoding="utf-8")
        self.process = FORK.Process(target=_run, args=(dict(env), os.getcwd(), folder, tuple(words)))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def python(
    *words: str, ranks: int = 1, stdin: str = "", timeout: float = 120, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """What `python -m MODULE …` or `python FILE …` says; as by subprocess.run. `env` is added to the environment.

    Several ranks are started as by hand, without torchrun; what they say comes in their order, and the code is the
    first one that is not 0.
    """
    given, port = {**os.environ, **(env or {})}, free_port()
    with TemporaryDirectory() as folder:
        places, started = [Path(folder, str(rank)) for rank in range(ranks)], []
        for rank, place in enumerate(places):
            place.mkdir()
            launch = launch_of(rank, ranks, port) if ranks > 1 else {}
            started.append(Forked(words, place, {**given, **launch}, stdin))
        out, err = ([place / name for place in places] for name in STREAMS[1:])
        try:
            deadline = time.monotonic() + timeout
            codes = [each.wait(max(0.0, deadline - time.monotonic())) for each in started]
        except subprocess.TimeoutExpired as error:
            error.add_note(_all(err))
            raise
        finally:
            for each in started:
                each.kill()
                each.wait()
        code = next(filter(None, codes), 0)
        return subprocess.CompletedProcess(["python", *words], code, _all(out), _all(err))


def _all(files: list[Path]) -> str:
    return "".join(file.read_text(encoding="utf-8") for file in files)


def _run(env: dict[str, str], here: str, place: Path, words: tuple[str, ...]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(here)
    for stream, name in enumerate(STREAMS):
        os.dup2(os.open(place / name, os.O_RDWR | os.O_APPEND), stream)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    try:
        if words[0] == "-m":
            if not hasattr(sys.modules.get(words[1]), "__path__"):
                sys.modules.pop(words[1], None)  # the fork server has imported some
            sys.argv = [*words[1:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = [*words], [str(Path(words[0]).parent)]
            runpy.run_path(words[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:  # the end of an interpreter, which the fork server's processes have not
        atexit._run_exitfuncs()
