"""A cold and a warm start: how long a user waits for a model that is not running yet.

python -m epmoe.bench start size=20b
python -m epmoe.bench start checkpoint=DIRECTORY ranks=2

Each start is a program of its own (`python -m epmoe.bench.start`, under torchrun where there are several ranks), with
Triton's cache in an empty folder the first time, and with what that start has left there the other times. Nothing else
is cleared: a checkpoint's files may lie in the page cache.

    ready    from the start of the program until nothing is left to compile or capture
    first    from the start of the program to the first token of a prompt
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from epmoe import streams
from epmoe.ranks import guard

if __name__ == "__main__":
    streams.open_missing()
    guard.begin()  # the imports below take seconds

from epmoe import strictjson
from epmoe.bench.conditions import Record, conditions, heading, markdown, open_model
from epmoe.bench.decode import Batch
from epmoe.bench.options import StartConfig
from epmoe.config.compose import parse
from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.llm import join
from epmoe.ranks.command import main
from epmoe.ranks.memory import told_when_full
from epmoe.streams import tell

TIMES = ("ready_s", "first_s", "load_s")
GRACE_S = 4  # for a start to end after SIGTERM: less than this process has after one (ranks/guard.py)


def start() -> None:
    words = sys.argv[2:]
    config = parse(words, StartConfig)
    if "WORLD_SIZE" in os.environ:
        raise UserError(f"start makes its ranks itself: run it without a launcher, with ranks={config.ranks}")
    with TemporaryDirectory(prefix="epmoe-start-") as folder:
        cold, *warm = [one_start(words, config, Path(folder)) for _ in range(1 + config.repeat)]
    shared = {key: value for key, value in cold.items() if key not in TIMES}
    own = [{key: each[key] for key in TIMES} for each in (cold, *warm)]
    record = {**shared, "sequences": config.sequences, "prompt_tokens": config.prompt_tokens}
    record |= {"cold": own[0], "warm": own[1:]}
    print(table(record))
    print(strictjson.dumps(record))


def one_start(words: Sequence[str], config: StartConfig, cache: Path) -> Record:
    """The conditions of a start, and its times in seconds.

    Raises:
        UserError: it failed, or took longer than runtime.start_timeout_s; what it said is on standard error.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.ranks)]
    command = [sys.executable, *(launcher if config.ranks > 1 else []), "-m", "epmoe.bench.start", *words]
    begin_s = time.monotonic()  # the same clock in all processes of a machine
    said = run(command, {"TRITON_CACHE_DIR": str(cache)}, config.runtime.start_timeout_s)
    record: Record = json.loads(said.splitlines()[-1])
    record |= {key: record[key] - begin_s for key in ("ready_s", "first_s")}
    tell(f"epmoe: ready after {record['ready_s']:.2f} s, first token after {record['first_s']:.2f} s")
    return record


def run(command: Sequence[str], more: Mapping[str, str], timeout_s: float) -> str:
    """The standard output of a program and of all that it starts, none of which outlives the call.

    Args:
        more: variables of its environment, beside this process's.
    Raises:
        UserError: it failed, or took longer.
    """
    process = subprocess.Popen(
        command, env={**os.environ, **more}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:
        _end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            message = f"a start took longer than runtime.start_timeout_s={timeout_s:g}: raise it"
            raise UserError(message) from None
        raise
    if process.returncode:
        raise UserError(f"a start failed with exit code {process.returncode}: mend what it says above")
    return out


def _end(process: "subprocess.Popen[str]") -> None:
    """End a program, asking first, and then all that is left of what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def started() -> None:
    """What such a program does; rank 0 prints a line of JSON, whose times are those of time.monotonic."""
    config = parse(sys.argv[1:], StartConfig)
    with join(config) as ranks:
        llm = open_model(config, config.size, ranks)
        batch = Batch.of(config.sequences, config.prompt_tokens, llm.architecture.vocab)
        requests = batch.requests(2)
        llm.check(requests)
        llm.load([request.cached(llm.architecture.max_positions) for request in requests])
        with told_when_full(ranks.device):
            llm.prepare(requests)
            ready_s = time.monotonic()
            llm.generate(batch.ids_BP[0].tolist(), SamplingParams(max_new_tokens=1, ignore_eos=True))
            first_s = time.monotonic()
        if ranks.is_main:
            times: dict[str, Any] = {"ready_s": ready_s, "first_s": first_s, "load_s": llm.report.seconds}
            print(strictjson.dumps({**conditions("start", llm), **times}))


def table(record: Record) -> str:
    """Conditions and numbers for people, in Markdown."""

    def row(name: str, starts: Sequence[Record]) -> list[str]:
        return [name, *(f"{statistics.median(each[key] for each in starts):.2f}" for key in TIMES)]

    names = ["kernels", "ready, s", "first token, s", "load of it, s"]
    rows = [row("none", [record["cold"]]), row("all compiled before", record["warm"])]
    lines = [
        heading(record),
        f"ready for {record['sequences']} sequences at a time with prompts of {record['prompt_tokens']} random tokens, "
        f"then the first token of one; seconds from the start of the program, warm the median of {len(record['warm'])}",
        "",
        *markdown(names, rows),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(started)
