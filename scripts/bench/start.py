#!/usr/bin/env python3
"""Where the time of a start goes, from the start of the program to ready and to the first token.

    scripts/bench/start.py /tmp/20b                   on a GPU; the checkpoint is made when it is not there
    scripts/bench/start.py /tmp/tiny --size tiny      on any machine
    scripts/bench/start.py /tmp/20b --ranks 2 runtime.max_batch=16 prompts=FILE.jsonl     keys of epmoe.generate

A start is a run of epmoe.generate, one prompt if the keys name none, in processes of its own, files in the page cache
(a read of all of them comes first). `cold` has an empty folder for Triton's kernels, `warm` finds all of them there
(the median of --repeat runs). A phase's seconds do not contain those of phases within it; of several ranks they are
rank 0's:

    imports        Python's own start and everything that the command imports, Triton among it
    configuration  keys and presets
    ranks          the device; with several ranks, their process group
    requests       the checkpoint's headers, the tokenizer, prompts → ids
    load           weights → packed on the device
    cache          memory for keys and values, the engine
    rehearsal      naming the kernels, and what is left of their compiling then (epmoe/kernels/compile_ahead.py)
    vendor         the library's products compared with the kernels' (epmoe/kernels/vendor.py)
    prefills       prefills of every kind              captures     graphs of steps
    other          what is between these               first token  after ready

Ends in a line of JSON.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

CALLS = {  # the phase of a call, by where the function is looked up
    "epmoe.generate:parse": "configuration",
    "epmoe.generate:LLM.opened": "requests",
    "epmoe.generate:get_requests": "requests",
    "epmoe.llm:load": "load",
    "epmoe.llm:fit_cache": "cache",
    "epmoe.llm:Engine": "cache",
    "epmoe.engine.preparation:Preparation._rehearse": "rehearsal",
    "epmoe.kernels.vendor:compared": "vendor",
    "epmoe.engine.warm:Warm.run": "prefills",
    "epmoe.engine.graphs:Graphs.prepare": "captures",
}
AFTER = {"configuration": "ranks", "requests": "other"}  # the phase of what comes after a call
PHASES = ("imports", "configuration", "ranks", *list(dict.fromkeys(CALLS.values()))[1:], "other", "first token")
TIMEOUT_S = 900
PROMPT = 'prompt="It was a fine morning, and the birds were singing."'


class Phases:
    """Seconds of each phase. A rehearsal's are its own, whatever it calls."""

    def __init__(self, begin: float) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.open, self.since = ["imports"], begin

    def turn(self) -> None:
        """What has passed since the last turn is the innermost phase's."""
        now = time.time()
        self.seconds[self.open[-1]] += now - self.since
        self.since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.turn()
        self.open.append(name)
        try:
            yield
        finally:
            self.turn()
            self.open.pop()
            if name in AFTER:
                self.open[0] = AFTER[name]

    def follow(self, where: str) -> None:
        """Count the calls of a function."""
        module, path = where.split(":")
        *owners, leaf = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        real: Callable[..., Any] = getattr(owner, leaf)

        def called(*args: Any, **options: Any) -> Any:
            if "rehearsal" in self.open:
                return real(*args, **options)
            with self.phase(CALLS[where]):
                return real(*args, **options)

        setattr(owner, leaf, called)


def work(file: Path, began: float) -> None:
    """One rank: run the command, write rank 0's phases."""
    from epmoe import generate
    from epmoe.ranks import command
    from epmoe.text.output import Output

    phases, on_token = Phases(began), Output.on_token
    done: dict[str, float] = {}
    for where in CALLS:
        if find_spec("triton") or not where.startswith("epmoe.kernels"):
            phases.follow(where)
    phases.turn()
    phases.open[0] = "other"
    run = generate.LLM.prepare

    def prepare(*args: Any) -> None:
        run(*args)
        phases.turn()
        done["ready"] = time.time() - began
        phases.open[0] = "first token"

    def first(*args: Any) -> bool:
        if "first token" not in done:
            phases.turn()
            done["first token"] = time.time() - began
            if os.environ.get("RANK", "0") == "0":
                file.write_text(json.dumps({"phases": phases.seconds, **done}))
        return on_token(*args)

    generate.LLM.prepare, Output.on_token = prepare, first  # type: ignore[method-assign, assignment]
    command.main(generate.generate)


def start(options: argparse.Namespace, keys: list[str], cache: Path) -> dict[str, Any]:
    """One start; its phases, and the seconds to ready and to the first token."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "phases.json")
        command = [sys.executable]
        if options.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        worker = [__file__, str(options.checkpoint), "--worker", str(file), "--began", str(time.time())]
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
        done = subprocess.run(
            [*command, *worker, *keys], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if done.returncode or not file.exists():
            sys.exit(f"the command ended with {done.returncode}:\n{done.stderr[-4000:]}")
        print("\n".join(f"    {line}" for line in done.stderr.splitlines() if line.startswith("epmoe:")))
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", default="20b", help="of the checkpoint, when it has to be made: 20b, 120b or tiny")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3, help="warm starts")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this process is a rank
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options, keys = parser.parse_known_args()
    given = keys if any(key.startswith(("prompt=", "prompts=")) for key in keys) else [PROMPT, *keys]
    if options.worker:
        sys.argv = [__file__, f"checkpoint={options.checkpoint}", "max_new_tokens=8", *given]
        work(options.worker, options.began)
    if not (options.checkpoint / "config.json").exists():
        from epmoe.weights.synthetic import make_checkpoint

        make_checkpoint(options.checkpoint, options.size)
    for file in options.checkpoint.glob("*.safetensors"):  # into the page cache
        with file.open("rb") as stored:
            while stored.read(64 << 20):
                pass
    with tempfile.TemporaryDirectory() as cache:
        cold, *warm = [start(options, keys, Path(cache)) for _ in range(1 + options.repeat)]
    report(cold, warm, options)


def report(cold: dict[str, Any], warm: list[dict[str, Any]], options: argparse.Namespace) -> None:
    def median(pick: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(pick, warm)) if warm else float("nan")

    rows = {name: (cold["phases"][name], median(lambda one, name=name: one["phases"][name])) for name in PHASES}  # type: ignore[misc]
    totals = {f"to {name}": (cold[name], median(lambda one, name=name: one[name])) for name in ("ready", "first token")}  # type: ignore[misc]
    print(f"{options.checkpoint}, {options.ranks} ranks, {len(os.sched_getaffinity(0))} cores; seconds")
    print(f"{'':14} {'cold':>7} {'warm':>7}")
    for name, (first, again) in (rows | totals).items():
        print(f"{name:14} {first:7.2f} {again:7.2f}")
    record = {"bench": "start", "checkpoint": options.checkpoint.name, "ranks": options.ranks, "cores": os.cpu_count()}
    print(json.dumps(record | {"cold": cold, "warm": warm}))


if __name__ == "__main__":
    main()
