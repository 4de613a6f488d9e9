"""Clients that go away, read slowly or come too many: nothing is left of them, and nobody else notices."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress

import pytest
from served import MINUTES, WITHIN_S, Server, endless, post, served

LONG = {"prompt": "It was a fine morning, and", "max_tokens": MINUTES, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("server")
    keys = (endless(place / "long"), "runtime.max_batch=2", "serve.queue_requests=2")
    with served(place / "run", *keys, forked=True) as one:
        yield one


def runs(server: Server, count: int) -> None:
    """Returns when so many run."""
    deadline = time.monotonic() + WITHIN_S
    while server.figure("epmoe_requests_running") != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [False, True], ids=["at once", "stream"])
def test_who_goes_away_is_aborted(server: Server, stream: bool) -> None:
    """Long before the answer would have ended."""
    connection = server.raw(post("/v1/completions", {**LONG, "stream": stream}))
    runs(server, 1)
    before = server.figure("epmoe_completion_tokens_total")
    connection.close()
    runs(server, 0)
    server.comes_to_rest()
    assert server.figure("epmoe_completion_tokens_total") - before < MINUTES / 2
    assert 'status="499"' in server.ask("/metrics")[1]


def test_a_slow_reader_holds_up_nobody(server: Server) -> None:
    with server.raw(post("/v1/completions", {**LONG, "stream": True, "logprobs": 100})):
        runs(server, 1)
        begin = time.monotonic()
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 5})[0] == 200
        assert time.monotonic() - begin < 30  # less than serve.stalled_s
    server.comes_to_rest()


def test_a_full_queue_is_told_at_once(server: Server) -> None:
    """While two run, of eight that come at once two wait; who is refused may come again."""

    def ask(number: int) -> int:
        status, answer, headers = server.ask("/v1/completions", {**LONG, "max_tokens": 40, "stream": number % 2 == 0})
        if status == 429:
            assert answer["error"]["code"] == "rate_limit_exceeded" and headers["retry-after"] == "1"
        return status

    with ThreadPoolExecutor(8) as pool:
        with ExitStack() as running:
            for _ in range(2):
                running.enter_context(server.raw(post("/v1/completions", {**LONG, "stream": True})))
            runs(server, 2)
            found = as_completed([pool.submit(ask, number) for number in range(8)])
            assert [next(found).result() for _ in range(6)] == [429] * 6
        assert [each.result() for each in found] == [200] * 2
    assert ask(0) == 200


def test_dropped_connections_leave_nothing(server: Server) -> None:
    """Anywhere: within the head, the body, the answer."""
    rng = random.Random(5)
    for _ in range(40):
        request = post("/v1/completions", {**LONG, "max_tokens": rng.randrange(1, 30), "stream": rng.random() < 0.5})
        connection = server.raw(request[: rng.randrange(len(request) + 1)] if rng.random() < 0.5 else request)
        if rng.random() < 0.5:
            connection.settimeout(0.05)
            with suppress(TimeoutError):
                connection.recv(rng.randrange(1, 400))
        connection.close()
    server.comes_to_rest()
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
    assert "Traceback" not in server.stderr
