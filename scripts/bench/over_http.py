#!/usr/bin/env python3
"""What HTTP costs: the same requests to a server, and to its engine in process.

    scripts/bench/over_http.py DIRECTORY --users 64 --requests 512 --prompt-tokens 1024 --answer-tokens 256
    scripts/bench/over_http.py DIRECTORY --users 64 --grammars 0,1,64 --requests 64     answers of a JSON schema
    scripts/bench/over_http.py "" --users 4 --requests 8 --prompt-tokens 32 --answer-tokens 16      the embedded model

Starts epmoe.serve on one rank (further words are keys of it), waits until it is ready, and asks `users` at a time: each
holds one streamed completion under way, a prompt of random ids and an answer of exactly so many tokens. Then, unless
--no-beside, `epmoe.bench load=concurrent` with the same numbers, whose rate is the server's aim. Measured:

    tokens/s         of all answers, from the first request to the last token
    first token      from the request's first byte to its first event
    between          from one event of an answer to its next; an event has several tokens where this program was slow

With --grammars the requests repeat for each number of users whose answers obey a grammar; all answers of a
round begin together, and `between` is a step's time.

Ends in a line of JSON.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.bench.load.run import percentiles
from epmoe.weights.hub import DEMO as EMBEDDED

READY = re.compile(r"at http://127\.0\.0\.1:(\d+)/v1, ready in ([\d.]+) s")
READY_S, ANSWER_S = 300, 300  # the longest that a start, and an answer, may take
IDS = 2_048  # prompts are of the first so many ids
# Longer than any answer here: nothing ends it but the limit of tokens.
SCHEMA = {"type": "array", "minItems": 100_000, "items": {"type": "string", "maxLength": 40}}


@dataclass
class Asked:
    """One request and what came back."""

    grammar: bool
    prompt: list[int]
    sent_s: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)  # time, tokens

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--grammars", default="0", help="numbers of users whose answers obey a schema, with commas")
    parser.add_argument("--no-beside", action="store_true", help="without the same in process")
    options, keys = parser.parse_known_args()
    keys = [f"checkpoint={options.checkpoint or EMBEDDED}", f"runtime.max_batch={options.users}", *keys]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        process, port, ready_s = start([*keys, "sampling=greedy"], Path(folder, "stderr"))
        try:
            asyncio.run(hold(port, options, 0, warm=True))
            for grammars in map(int, options.grammars.split(",")):
                runs.append(asyncio.run(hold(port, options, grammars)))
                print(line(runs[-1]), file=sys.stderr)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    beside = None if options.no_beside else in_process(options, keys)
    record: dict[str, Any] = {"bench": "http", "ready_s": ready_s, "runs": runs, "in_process": beside}
    record |= {name: getattr(options, name) for name in ("users", "requests", "prompt_tokens", "answer_tokens")}
    if beside:
        record["share"] = runs[0]["tokens_per_s"] / beside["tokens_per_s"]
        print(f"over HTTP {100 * record['share']:.1f} % of {beside['tokens_per_s']:,.0f} tokens/s in process")
    print(json.dumps(record))


def start(keys: list[str], log: Path) -> tuple["subprocess.Popen[bytes]", int, float]:
    """A server that is ready, its port, and the seconds from its start to ready."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "epmoe.serve", "serve.port=0", *keys],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | {"EPMOE_API_KEY": ""},
        )
    deadline = time.monotonic() + READY_S
    while not (found := READY.search(log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            sys.exit(f"scripts/bench/over_http.py: the server did not get ready:\n{log.read_text()[-4000:]}")
        time.sleep(0.05)
    return process, int(found[1]), float(found[2])


async def hold(port: int, options: argparse.Namespace, grammars: int, *, warm: bool = False) -> dict[str, Any]:
    """All requests, `users` at a time; what was measured. A warm-up is one request a user."""
    rng = random.Random(int(warm))
    count = options.users if warm else options.requests
    asked = [
        Asked(number % options.users < grammars, rng.choices(range(IDS), k=options.prompt_tokens))
        for number in range(count)
    ]
    rest = iter(asked)

    async def user() -> None:
        for each in rest:
            async with asyncio.timeout(ANSWER_S):
                await ask(port, each, options.answer_tokens)

    begin = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(options.users)))
    if short := [each.tokens for each in asked if each.tokens != options.answer_tokens]:
        sys.exit(f"scripts/bench/over_http.py: {len(short)} of {count} answers are cut, one has {short[0]} tokens")
    gaps = [later[0] - before[0] for each in asked for before, later in zip(each.events, each.events[1:], strict=False)]
    seconds = max(each.events[-1][0] for each in asked) - begin
    tokens = sum(each.tokens for each in asked)
    return {
        "grammars": grammars,
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "first_token_ms": percentiles(each.events[0][0] - each.sent_s for each in asked),
        "between_ms": percentiles(gaps),
        "tokens_per_event": statistics.fmean(n for each in asked for _, n in each.events),
    }


async def ask(port: int, asked: Asked, tokens: int) -> None:
    """One completion; its events' times and tokens."""
    body: dict[str, Any] = {
        "prompt": asked.prompt,
        "max_tokens": tokens,
        "stream": True,
        "return_token_ids": True,
        **({"structured_outputs": {"json": SCHEMA}} if asked.grammar else {"ignore_eos": True}),
    }
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked.sent_s = time.perf_counter()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    )
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            sys.exit(f"scripts/bench/over_http.py: {status.decode()}{(await reader.read()).decode()[-1000:]}")
        async for received in reader:
            if received.startswith(b"data: {"):
                now, choices = time.perf_counter(), json.loads(received[6:]).get("choices", ())
                if count := sum(len(choice.get("token_ids") or ()) for choice in choices):
                    asked.events.append((now, count))
    finally:
        writer.close()


def in_process(options: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    """The record of epmoe.bench load over requests of the same lengths."""
    numbers = ("users", "requests", "prompt_tokens", "answer_tokens")
    words = ["load=concurrent", *(f"{name}={getattr(options, name)}" for name in numbers)]
    done = subprocess.run(
        [sys.executable, "-m", "epmoe.bench", *words, *keys], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        sys.exit(f"scripts/bench/over_http.py: epmoe.bench ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(run: dict[str, Any]) -> str:
    first, between = run["first_token_ms"], run["between_ms"]
    return (
        f"{run['grammars']} with a grammar: {run['tokens_per_s']:,.0f} tokens/s, first token {first['p50']:.1f} ms "
        f"(p99 {first['p99']:.1f}), between {between['p50']:.2f} (p99 {between['p99']:.2f}), "
        f"{run['tokens_per_event']:.2f} tokens an event"
    )


if __name__ == "__main__":
    main()
