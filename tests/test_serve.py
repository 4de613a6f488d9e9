"""epmoe.serve as a command: on two ranks under torchrun, and how it ends, whoever is killed or told to."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import python
from loading import rank_of
from served import MINUTES, TORCHRUN, WITHIN_S, Server, endless, post, served, two_nodes

from epmoe import LLM, SamplingParams
from epmoe.config.compose import from_keys
from epmoe.config.schema import ServerConfig
from epmoe.serve import hello

LONG = {"prompt": "It was a fine morning, and", "max_tokens": 400, "ignore_eos": True, "stream": True}


class Begun:
    """A stream of LONG whose first bytes are here."""

    def __init__(self, server: Server, tokens: int = 400, connection: socket.socket | None = None) -> None:
        self.connection = connection or server.raw(post("/v1/completions", {**LONG, "max_tokens": tokens}))
        self.said = b""
        while b"data: {" not in self.said:
            self.said += self.connection.recv(1 << 16)

    def rest(self) -> bytes:
        with self.connection:
            while piece := self.connection.recv(1 << 16):
                self.said += piece
                if b"data: [DONE]" in piece[-100:]:
                    break
        return self.said


@pytest.mark.slow  # the next one has two ranks, tests/whole/test_served.py their answers
def test_two_ranks_answer_as_one_does(tmp_path: Path) -> None:
    """And end with 0 when the last of them is told to."""
    prompts = ["It was a fine morning, and", "The captain of the guard"]
    with LLM(runtime="cpu") as llm:
        expected = llm.generate(prompts, SamplingParams(max_tokens=10, temperature=1.0, seed=3))
    with served(tmp_path / "run", ranks=2) as server:
        found = server.client().completions.create(
            model=server.model, prompt=prompts, max_tokens=10, temperature=1, seed=3,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        assert [tuple((each.model_extra or {})["token_ids"]) for each in found.choices] == [
            each.ids for each in expected
        ]
        for stream in (False, True):  # what shows with the vocabulary alone is refused all the same
            body = {"prompt": "a", "guided_grammar": 'start: "a" <|nobody|>', "stream": stream}
            status, answer, _ = server.ask("/v1/completions", body)
            assert status == 400 and "the grammar is refused (" in answer["error"]["message"], answer
    assert server.stderr.count("epmoe-demo at http") == 1 and "Traceback" not in server.stderr


def test_two_replicas_answer_as_one_does(tmp_path: Path) -> None:
    """A request's prompts go to both; each path, streams, grammars and clients that leave; one SIGTERM ends both."""
    prompts = [f"It was a fine morning, number {number}, and" for number in range(6)]
    with LLM(runtime="cpu") as llm:
        expected = llm.generate(prompts, SamplingParams(max_tokens=10, temperature=1.0, seed=3))
    with served(tmp_path / "run", "mesh.replica=2", "serve.queue_requests=8", ranks=2) as server:
        client = server.client()
        found = client.completions.create(
            model=server.model, prompt=prompts, max_tokens=10, temperature=1, seed=3, n=1,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        said = [tuple((each.model_extra or {})["token_ids"]) for each in found.choices]
        assert said == [each.ids for each in expected]
        for number, prompt in enumerate(prompts[:2]):
            pieces = client.completions.create(
                model=server.model, prompt=prompt, max_tokens=10, temperature=1, seed=3, stream=True
            )
            assert "".join(each.choices[0].text for each in pieces) == expected[number].text
        asked: Any = [{"role": "user", "content": "Hello"}]
        chats = [client.chat.completions.create(model=server.model, messages=asked, max_tokens=5) for _ in range(2)]
        (first,), (second,) = (each.choices for each in chats)
        assert first.message == second.message
        answer = client.responses.create(model=server.model, input="Hello", max_output_tokens=5)
        assert answer.output
        begun = [Begun(server) for _ in range(3)]
        assert server.ask("/health")[1]["replicas"] == 2
        body = {"prompt": "a", "guided_grammar": 'start: "a" <|nobody|>'}
        for _ in range(2):
            status, refused, _ = server.ask("/v1/completions", body)
            assert status == 400 and "the grammar is refused (" in refused["error"]["message"]
        for each in begun:
            each.connection.close()
        server.comes_to_rest()
        figures = server.ask("/metrics")[1]
        steps = [re.search(rf'^epmoe_replica_steps_total{{replica="{each}"}} (\S+)', figures, re.M) for each in "01"]
        assert all(each is not None and float(each[1]) > 10 for each in steps) and server.figure("epmoe_replicas") == 2
    assert server.stderr.count("epmoe-demo at http") == 1 and "Traceback" not in server.stderr


@pytest.mark.slow  # tests/whole/test_lost_replica.py has the same of AsyncLLM, in the midst of its answers
def test_clients_do_not_notice_a_lost_replica(tmp_path: Path) -> None:
    """Where it has an agent of its own. Other replicas answer its requests once more, and no token comes twice."""
    asked: dict[str, Any] = {"max_tokens": 150, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    prompts = [f"Number {number}" for number in range(4)]
    with LLM(runtime="cpu") as llm:
        expected = llm.generate(prompts, SamplingParams(**asked))
    with two_nodes(tmp_path / "run", "mesh.replica=2") as nodes:
        assert "combine=slots" in nodes[0].stderr  # auto goes by the nodes of a replica
        streams = [
            nodes[0].raw(post("/v1/completions", {"prompt": each, "stream": True, "return_token_ids": True, **asked}))
            for each in prompts
        ]
        begun = [Begun(nodes[0], connection=each) for each in streams]
        (lost,) = nodes[1].ranks()
        lost.kill()
        for each, wanted in zip(begun, expected, strict=True):
            found = [json.loads(line[6:]) for line in each.rest().decode().splitlines() if line.startswith("data: {")]
            choices = [choice for event in found for choice in event["choices"]]
            assert [id for choice in choices for id in choice.get("token_ids") or []] == list(wanted.ids)
            assert "".join(choice["text"] for choice in choices) == wanted.text
        deadline = time.monotonic() + WITHIN_S
        while nodes[0].ask("/health")[1]["replicas"] == 2:
            assert time.monotonic() < deadline
        assert nodes[0].figure("epmoe_replicas") == 1 and nodes[1].process.wait(WITHIN_S) == 1
        said = "epmoe: rank 1 ended without a word (killed?); the others go on without rank 1\n"
        assert said in nodes[0].stderr
        (alive,) = nodes[0].ranks()
        alive.send_signal(signal.SIGTERM)
        # Its agent waits for the other one: torchrun's exit barrier.
        assert psutil.wait_procs([alive], WITHIN_S)[1] == []


@pytest.mark.slow
def test_the_replica_of_rank_0_ends_the_run(tmp_path: Path) -> None:
    with two_nodes(tmp_path / "run", "mesh.replica=2") as nodes:
        (first,), (other,) = (each.ranks() for each in nodes)
        first.kill()
        assert psutil.wait_procs([first, other], WITHIN_S)[1] == []
        assert "epmoe: rank 0 ended without a word (killed?); rank 1 ends too\n" in nodes[1].stderr


@pytest.mark.slow
def test_under_one_agent_a_lost_replica_ends_the_run(tmp_path: Path) -> None:
    """torchrun ends all of its ranks, so none goes on."""
    with served(tmp_path / "run", endless(tmp_path / "long"), "mesh.replica=2", ranks=2, settled=False) as server:
        begun = Begun(server, MINUTES)
        server.ranks()[1].kill()
        assert b'"code":"service_unavailable"' in begun.rest()
        assert server.process.wait(WITHIN_S) == 1
        assert "epmoe: rank 1 ended without a word (killed?); rank 0 ends too\n" in server.stderr


@pytest.mark.parametrize(("attention", "batches"), [("replicate", 2), ("data", 4), ("auto", 4)])
def test_as_many_may_be_in_flight_as_wait_and_run(attention: str, batches: int) -> None:
    """Of four ranks, which are two replicas; with data each rank runs a batch of its own."""
    keys = {"mesh.attention": attention, "runtime.max_batch": 3, "serve.queue_requests": 10}
    config = from_keys(keys, ServerConfig)
    llm = LLM.opened(config, replace(rank_of(0, 4), replicas=2, expert_size=2))
    assert hello(llm, config, "").most_requests == 10 + batches * 3


def test_a_lost_rank_is_told_to_whoever_waits(tmp_path: Path) -> None:
    with served(tmp_path / "run", endless(tmp_path / "long"), ranks=2, settled=False) as server:
        begun = Begun(server, MINUTES)
        first, second = server.ranks()
        http = server.http_process()
        second.kill()
        said = begun.rest()
        assert b'"code":"service_unavailable"' in said and b"[DONE]" not in said
        assert server.process.wait(WITHIN_S) == 1 and "epmoe: rank 1 ended without a word (killed?)" in server.stderr
        gone, alive = psutil.wait_procs([first, http], timeout=WITHIN_S)
        assert not alive and len(gone) == 2


def test_sigterm_lets_answers_end(tmp_path: Path) -> None:
    """Also that of one which waits for its turn. New requests are refused meanwhile; the exit code is 0."""
    keys = endless(tmp_path / "long"), "serve.drain_s=100", "runtime.max_batch=1"
    with served(tmp_path / "run", *keys, settled=False, forked=True) as server:
        first = Begun(server, MINUTES)
        waiting = server.raw(post("/v1/completions", {**LONG, "max_tokens": 20}))
        deadline = time.monotonic() + WITHIN_S
        while not server.figure("epmoe_requests_waiting"):
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        while server.ask("/ready")[0] == 200:
            assert time.monotonic() < deadline
        status, answer, headers = server.ask("/v1/completions", {"prompt": "a"})
        assert status == 503 and answer["error"]["code"] == "draining" and headers["retry-after"]
        assert server.ask("/health")[0] == 200
        first.connection.close()
        said = Begun(server, connection=waiting).rest()
        assert b"data: [DONE]" in said and b'"error"' not in said
        assert server.process.wait(50) == 0  # half of what it may take to drain


def test_sigterm_waits_for_so_long_and_no_longer(tmp_path: Path) -> None:
    """One that would take longer hears why it ends."""
    with served(
        tmp_path / "run", endless(tmp_path / "long"), "serve.drain_s=0.5", settled=False, forked=True
    ) as server:
        begun = Begun(server, MINUTES)
        server.process.send_signal(signal.SIGINT)
        said = begun.rest()
        assert b"serve.drain_s" in said and b"[DONE]" not in said
        assert server.process.wait(WITHIN_S) == 0


STARTING = """
import ctypes, os, sys
from epmoe.ranks import guard
guard.begin(60)
from epmoe import serve
from epmoe.engine.service import Service
from epmoe.ranks.command import main

def compile_for_ever(self):
    os.write(2, b"compiling\\n")
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

Service.prepare = compile_for_ever
main(serve.serve)
"""


@pytest.mark.alone
@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["alone", "two ranks"])
def test_a_signal_while_kernels_compile_ends_it_at_once(ranks: int, tmp_path: Path) -> None:
    """At either rank, long before the guard would kill it; all end with 0, and nothing is left."""
    (script := tmp_path / "script.py").write_text(STARTING)
    start = [sys.executable, *TORCHRUN, str(ranks)] if ranks else [sys.executable]
    with (tmp_path / "stderr").open("wb") as stderr:
        command = [*start, str(script), "serve.port=0", "runtime.device=cpu"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        deadline = time.monotonic() + 60
        while (said := (tmp_path / "stderr").read_text()).count("compiling\n") < max(1, ranks):
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        told = [each for each in family if str(script) in each.cmdline() and each.environ().get("RANK") == "1"]
        (told[0] if ranks else process).send_signal(signal.SIGTERM)
        assert process.wait(40) == 0, (tmp_path / "stderr").read_text()
        assert psutil.wait_procs(family, WITHIN_S)[1] == []
        assert ("rank 1: " if ranks else "epmoe: ") + "ended by SIGTERM\n" in (tmp_path / "stderr").read_text()
    finally:
        process.kill()


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)], ids=["alone", "two ranks"])
def test_a_second_signal_ends_it_at_once(ranks: int, tmp_path: Path) -> None:
    with served(
        tmp_path / "run", endless(tmp_path / "long"), "serve.drain_s=100", ranks=ranks, settled=False
    ) as server:
        begun = Begun(server, MINUTES)
        told = server.ranks()[-1] if ranks else server.process
        begin = time.monotonic()
        told.send_signal(signal.SIGTERM)
        time.sleep(1.5)  # what comes sooner is the same signal by another way
        told.send_signal(signal.SIGTERM)
        assert server.process.wait(WITHIN_S) == 0 and time.monotonic() - begin < 50  # half of what it may take to drain
        assert b"service_unavailable" in begun.rest()


def test_the_http_process_is_started_again(tmp_path: Path) -> None:
    """Whoever waited for it has lost the connection, the ranks have ended the request, and others are served."""
    with served(tmp_path / "run", endless(tmp_path / "long"), forked=True) as server:
        begun = Begun(server, MINUTES)
        old = server.http_process()
        old.kill()
        assert b"[DONE]" not in begun.rest()
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        assert server.http_process().pid != old.pid
        server.comes_to_rest()
    assert server.stderr.count("another one starts") == 1


MISTAKES = [
    (["serve.port=70000"], "serve.port=70000 is out of range"),
    (["serve.api_key_file=/no/such/file"], "serve.api_key_file=/no/such/file cannot be read"),
    (["serve.log=/no/such/folder/log"], "/no/such/folder/log"),
    (["prompt=x"], "prompt means nothing to a server"),
    (["serve.hosts=x"], "serve.hosts"),
    (["serve.max_bodies=5"], "serve.max_bodies=5 is less than one body may have, serve.max_body=8000000: take more"),
    (["--help"], ""),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES, ids=[words[0] for words, _ in MISTAKES])
def test_mistakes_are_one_line(words: list[str], says: str) -> None:
    done = python("-m", "epmoe.serve", "runtime.device=cpu", "serve.port=0", *words, timeout=WITHIN_S)
    if words == ["--help"]:
        assert done.returncode == 0 and "serve.drain_s=20.0" in done.stdout and "OpenAI" in done.stdout
        return
    lines = [line for line in done.stderr.splitlines() if "device=cpu" not in line]
    assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stderr
