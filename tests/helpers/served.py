"""A server for tests: the command in processes of its own, at a port that it chooses, and ends with its block."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import psutil
from forked import Forked
from spawn import free_port

from epmoe.weights.synthetic import make_checkpoint

WITHIN_S = 120
MINUTES = 60_000  # tokens of an answer that goes on for as long
LINE = re.compile(r"epmoe: (.+) at http://127\.0\.0\.1:(\d+)/v1, ready in [\d.]+ s\n")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")


Answered = tuple[int, Any, dict[str, str]]  # status, object or text, headers in lower case


class Server:
    """One that is ready."""

    def __init__(self, process: "subprocess.Popen[bytes] | Forked", stdout: Path, stderr: Path) -> None:
        self.process, self.stdout_path, self.stderr_path = process, stdout, stderr
        self.model, self.port = "", 0

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + WITHIN_S
        while (line := LINE.search(self.stderr)) is None:
            assert self.process.poll() is None and time.monotonic() < deadline, self.stderr
            time.sleep(0.02)
        self.model, self.port = line[1], int(line[2])

    def client(self, key: str = "none", timeout: float = WITHIN_S) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=timeout)

    def ask(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answered:
        """A GET, or a POST of `body`, bytes or what JSON holds."""
        given: dict[str, str] = {} if body is None else {"Content-Type": "application/json"}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=WITHIN_S)) as connection:
            connection.request("GET" if body is None else "POST", path, data, {**given, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text.decode(), found

    def figure(self, name: str) -> float:
        """The value of a metric without labels; 0 where there is none yet."""
        text = self.ask("/metrics")[1]
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def comes_to_rest(self) -> None:
        """Returns when nothing runs or waits, and all pages are free."""
        deadline = time.monotonic() + WITHIN_S
        names = ("epmoe_requests_running", "epmoe_requests_waiting", "epmoe_cache_usage_ratio")
        while any(self.figure(name) for name in names):
            assert time.monotonic() < deadline, self.ask("/metrics")[1]
            time.sleep(0.1)

    def http_process(self) -> psutil.Process:
        """The process that speaks HTTP."""
        (found,) = (
            each
            for each in psutil.Process(self.process.pid).children(recursive=True)
            if each.is_running() and "epmoe.server" in _words(each)
        )
        return found

    def ranks(self) -> list[psutil.Process]:
        """The ranks, by number; where there is no torchrun, the one process."""
        children = psutil.Process(self.process.pid).children()
        found = [each for each in children if "epmoe.serve" in _words(each)]
        return sorted(found, key=lambda each: int(each.environ()["RANK"]))

    def kill(self) -> None:
        """All of its processes."""
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.kill()
        self.process.wait()

    def raw(self, data: bytes) -> socket.socket:
        """A connection to which this was sent."""
        made = socket.create_connection(("127.0.0.1", self.port), timeout=WITHIN_S)
        made.sendall(data)
        return made


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def post(path: str, body: Mapping[str, Any]) -> bytes:
    """A request as it stands on the wire."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def endless(folder: Path) -> str:
    """The key of a checkpoint whose answers may have MINUTES tokens: what is to happen amid one does, however late."""
    return f"checkpoint={make_checkpoint(folder, max_position=1 << 16)}"


def begun(
    folder: Path, start: Sequence[str], keys: Sequence[str], env: Mapping[str, str], forked: bool = False
) -> Server:
    """The command, behind `start`, with its output in the folder's files."""
    folder.mkdir(exist_ok=True)
    common = ("serve.port=0", "runtime.device=cpu", "serve.drain_s=10")
    if forked:
        words, all_env = ("-m", "epmoe.serve", *common, *keys), {**os.environ, "EPMOE_API_KEY": "", **env}
        return Server(Forked(words, folder, all_env), folder / "out", folder / "err")
    out, err = folder / "stdout", folder / "stderr"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *start, "-m", "epmoe.serve", *common, *keys],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "EPMOE_API_KEY": "", "OMP_NUM_THREADS": "1", **env},
        )
    return Server(process, out, err)


@contextmanager
def two_nodes(folder: Path, *keys: str, ranks: int = 1) -> Iterator[list[Server]]:
    """A server over two agents of torchrun, so many ranks each; the first one is ready. All end with the block."""
    folder.mkdir(exist_ok=True)
    port = str(free_port())
    common = ("-m", "torch.distributed.run", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    nodes = [
        begun(folder / str(number), (*common, "--node-rank", str(number), "--nproc-per-node", str(ranks)), keys, {})
        for number in range(2)
    ]
    try:
        nodes[0].wait_ready()
        yield nodes
    finally:
        for each in nodes:
            each.kill()


@contextmanager
def served(
    folder: Path,
    *keys: str,
    ranks: int = 0,
    env: Mapping[str, str] | None = None,
    settled: bool = True,
    forked: bool = False,
) -> Iterator[Server]:
    """A server with these keys; `ranks` of torchrun, or without it. At the block's end SIGTERM ends it with 0.

    `settled`: the block leaves it running. `forked`: without torchrun, and without the seconds that a fresh interpreter
    takes to import torch.
    """
    server = begun(folder, (*TORCHRUN, str(ranks)) if ranks else (), keys, env or {}, forked and not ranks)
    process = server.process
    try:
        server.wait_ready()
        yield server
        if settled:
            # torchrun itself ends with 1 after a signal, whatever its ranks do.
            (server.ranks()[-1] if ranks else process).send_signal(signal.SIGTERM)
            assert process.wait(WITHIN_S) == 0, server.stderr
        assert server.stdout_path.read_text() == ""
    finally:
        server.kill()
