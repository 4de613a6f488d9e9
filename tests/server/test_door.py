"""The door, with the HTTP process as it is, and a service whose model is a fake."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from scripted import save_tokenizer

from epmoe.engine.request import SamplingParams, TokenLogprobs
from epmoe.errors import UserError
from epmoe.server.door import Door, Limits, listen
from epmoe.server.frames import Hello, NewToken, Ready

WITHIN_S = 60


def hello(tokenizer: Path) -> Hello:
    return Hello(
        model="m", release="0", created=0, vocab=352, max_positions=64, tokenizer_file=str(tokenizer), templates={},
        special={}, chat="off", system=None, variables={}, defaults=asdict(SamplingParams()),
        most_requests=16, queue_requests=8, max_body=1000, max_bodies=8000, header_s=5.0, stalled_s=5.0, api_key="",
        log="", responses=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("door") / "tokenizer.json"
    save_tokenizer(file)
    return file


@contextmanager
def a_door(tokenizer: Path, limits: Limits | None = None) -> Iterator[Door]:
    with listen("127.0.0.1", 0) as listener:
        door = Door(hello(tokenizer), listener, limits)
        try:
            yield door
        finally:
            door.close()


def healthy(door: Door) -> str:
    """What a client hears at once, or when the next process is there."""
    with socket.create_connection(door.listener.getsockname(), timeout=WITHIN_S) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return client.recv(100).split(b"\r\n")[0].decode()


def until(what: object, holds: object) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until("a stop", lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


def test_a_killed_process_is_followed_by_another(tokenizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A client that connects between the two waits, and is answered."""
    with a_door(tokenizer) as door:
        first = door.http
        assert healthy(door) == "HTTP/1.1 200 OK"
        first.process.kill()
        first.process.wait()
        assert healthy(door) == "HTTP/1.1 200 OK"
        assert door.http is not first and door.error is None
    assert door.http.process.poll() is not None
    assert "killed by signal 9): another one starts" in capfd.readouterr().err


def test_but_not_for_ever(tokenizer: Path) -> None:
    with a_door(tokenizer, Limits(restarts=2, within_s=600)) as door:
        seen = set()

        def killed() -> bool:
            process = door.http.process
            if process.pid not in seen and process.poll() is None:
                seen.add(process.pid)
                process.kill()
            return door.error is not None

        until("an end", killed)
        assert len(seen) == 3 and isinstance(door.error, UserError) and "3 times" in str(door.error)
        with pytest.raises(UserError, match="killed by signal 9"):
            door.check()


def test_a_mistake_is_the_runs(tmp_path: Path) -> None:
    wrong = tmp_path / "tokenizer.json"
    wrong.write_text("{}")
    with listen("127.0.0.1", 0) as listener, pytest.raises(UserError, match="cannot be read as a tokenizer"):
        Door(hello(wrong), listener)


def test_an_end_before_it_is_ready_comes_when_it_is(tokenizer: Path) -> None:
    """The service is let go as soon as there is one, and nothing was let in."""
    stopped: list[BaseException] = []

    class Still:
        def stop(self, error: BaseException) -> None:
            stopped.append(error)

    still: Any = Still()
    with a_door(tokenizer) as door:
        begin = time.monotonic()
        door.drain(60)
        assert time.monotonic() - begin < 30 and not stopped
        door.open(still, Ready("x", 64))
        assert [str(each) for each in stopped] == ["the server ends before it was ready"]


def test_it_is_open_when_requests_are_let_in(tokenizer: Path) -> None:
    """A process that is slow to hear of it would refuse whoever comes at once."""
    service: Any = SimpleNamespace(stop=lambda error: None, figures=lambda: ())
    with a_door(tokenizer) as door:
        http = door.http.process
        opening = threading.Thread(target=door.open, args=(service, Ready("x", 64)))
        stop(http.pid)
        try:
            opening.start()
            opening.join(0.5)
            assert opening.is_alive()
        finally:
            os.kill(http.pid, signal.SIGCONT)
        opening.join(WITHIN_S)
        assert not opening.is_alive() and door.opened.is_set()


def test_a_port_that_is_taken(tokenizer: Path) -> None:
    with listen("127.0.0.1", 0) as one, pytest.raises(UserError, match=r"serve.port=\d+ .* choose another"):
        listen("127.0.0.1", one.getsockname()[1])
    with pytest.raises(UserError, match=r"serve.host=no\.such\.host"):
        listen("no.such.host.invalid", 0)


def test_a_process_that_reads_nothing_is_given_up(tokenizer: Path) -> None:
    """The engine's thread never waits for it."""
    with a_door(tokenizer, Limits(unsent=20_000)) as door:
        door.ready = Ready("f", 64)
        stopped = door.http
        stop(stopped.process.pid)
        slowest = 0.0
        begin = time.monotonic()
        while not stopped.lost and time.monotonic() < begin + WITHIN_S:
            now = time.perf_counter()
            stopped.say(NewToken(0, 1, TokenLogprobs(0.0, ((1, 0.5),) * 20)))
            slowest = max(slowest, time.perf_counter() - now)
        assert stopped.lost and slowest < WITHIN_S / 2  # it would wait for ever
        until("another process", lambda: door.http is not stopped)
        assert healthy(door) == "HTTP/1.1 200 OK"


def test_a_fault_of_its_own_ends_in_a_line_and_no_wait(tokenizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The writer's: another process starts, again and again up to the bound."""
    with a_door(tokenizer, Limits(restarts=1, within_s=600)) as door:
        for _ in range(2):
            http = door.http
            http.say("no frame")  # type: ignore[arg-type]
            until("its end", lambda http=http: door.error is not None or door.http is not http)
        until("the door's end", lambda: door.error is not None)
    assert "Traceback" in capfd.readouterr().err
