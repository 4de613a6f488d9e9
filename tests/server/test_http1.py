"""Heads and bodies that do not come in time; clients that take nothing; what is no HTTP."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from served import MINUTES, Server, endless, post, served
from wire import answers

HEADER_S, STALLED_S = 1.0, 1.5
SOON_S = 25  # less than any of these would be otherwise


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("server")
    keys = (endless(place / "long"), f"serve.header_s={HEADER_S}", f"serve.stalled_s={STALLED_S}")
    with served(place / "run", *keys, forked=True) as one:
        yield one


def rest(connection: socket.socket) -> bytes:
    """What the server says until it closes it."""
    said = b""
    with connection:
        while piece := connection.recv(1 << 16):
            said += piece
    return said


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nHost"], ids=["nothing", "half of it"])
def test_a_head_that_does_not_come(server: Server, head: bytes) -> None:
    begin = time.monotonic()
    said = rest(server.raw(head))
    assert 0.9 * HEADER_S < time.monotonic() - begin < SOON_S and said == b""


def test_the_next_head_of_an_open_connection(server: Server) -> None:
    begin = time.monotonic()
    said = rest(server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert said.startswith(b"HTTP/1.1 200") and time.monotonic() - begin < SOON_S


def test_a_body_that_does_not_come(server: Server) -> None:
    begin = time.monotonic()
    said = rest(server.raw(post("/v1/completions", {"prompt": "a"})[:-3]))
    assert said.startswith(b"HTTP/1.1 408") and time.monotonic() - begin < SOON_S
    assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"].endswith("(serve.header_s)")


def test_an_answer_may_take_longer(server: Server) -> None:
    with server.raw(post("/v1/completions", SLOW)) as connection:
        seconds, said = answered_slowly(server, connection)
    (answer,) = answers(said, ended=False)
    choices = [choice for event in answer.events if event != "[DONE]" for choice in event["choices"]]
    assert len([id for each in choices for id in each.get("token_ids") or []]) == 70 and seconds > HEADER_S


SLOW = {"prompt": "It was", "max_tokens": 70, "ignore_eos": True, "stream": True, "return_token_ids": True}


def answered_slowly(server: Server, connection: socket.socket) -> tuple[float, bytes]:
    """Seconds until the answer's end, and what was said. In the middle of it the rank stands still for a while."""
    said, begin, rank = b"", time.monotonic(), psutil.Process(server.process.pid)
    while b"[DONE]" not in said:
        assert time.monotonic() < begin + 60
        piece = connection.recv(1 << 16)
        assert piece, said
        if b"data: " in piece and b"data: " not in said:
            rank.suspend()
            time.sleep(1.5 * HEADER_S)
            rank.resume()
        said += piece
    return time.monotonic() - begin, said


def asks_for_much(server: Server, answers: int, tokens: int) -> socket.socket:
    """A connection that can hold little of its answers; each token has two kilobytes or so."""
    body = {
        "prompt": "It was", "n": answers, "temperature": 1.0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 100,
        "stream": True,
    }  # fmt: skip
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(60)
    made.connect(("127.0.0.1", server.port))
    made.sendall(post("/v1/completions", body))
    return made


def test_a_client_that_takes_nothing_has_gone(server: Server) -> None:
    """Its answers end long before they are complete, and its connection with them."""
    before = server.figure("epmoe_completion_tokens_total")
    with asks_for_much(server, 8, MINUTES) as connection:
        assert b"HTTP/1.1 200 OK" in connection.recv(100)
        deadline = time.monotonic() + 120
        while 'status="499"' not in server.ask("/metrics")[1]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        server.comes_to_rest()
        assert server.figure("epmoe_completion_tokens_total") - before < 8 * MINUTES / 4
        said = b""
        while piece := connection.recv(1 << 20):  # what the kernel had
            said += piece
        assert b"[DONE]" not in said


def takes_little(server: Server) -> tuple[bytes, float]:
    """What a client gets that takes little for longer than the bound, and the longest time in which it took nothing."""
    idle_s, said = 0.0, b""
    with suppress(ConnectionError), asks_for_much(server, 1, 240) as connection:
        said += connection.recv(4000)
        begin = last = time.monotonic()
        while time.monotonic() - begin < 2 * STALLED_S:
            said += connection.recv(4000)
            idle_s, last = max(idle_s, time.monotonic() - last), time.monotonic()
            time.sleep(STALLED_S / 3)
        while b"[DONE]" not in said[-100:] and (piece := connection.recv(1 << 20)):
            said += piece
    return said, idle_s


def test_one_that_takes_little_has_not(server: Server) -> None:
    """It takes longer than the bound, and gets all."""
    for _ in range(4):
        said, idle_s = takes_little(server)
        if idle_s < 0.6 * STALLED_S:  # else this process was late, and took nothing itself
            break
    assert b"[DONE]" in said and said.count(b'"text_offset"') > 200


def test_an_answer_behind_another_may_take_longer(server: Server) -> None:
    """Both requests have come at once, so that the second one's head was there before the first one's answer."""
    first = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with server.raw(first + post("/v1/completions", SLOW)) as connection:
        seconds, said = answered_slowly(server, connection)
        said += rest(connection)
    assert said.count(b"HTTP/1.1 200") == 2 and b"[DONE]" in said and seconds > HEADER_S


CHUNKED = b"Transfer-Encoding: chunked\r\n"
BROKEN = {  # when the noise comes: media type, status
    "at once": ("text/plain", b"400"),
    "before its end": ("application/json", b"400"),
    "after it was refused": ("text/plain", b"415"),
}


@pytest.mark.parametrize("when", BROKEN)
def test_a_body_that_breaks_off_into_noise(server: Server, when: str) -> None:
    """One answer, and no word on standard error."""
    before, (media, status) = server.stderr, BROKEN[when]
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: {media}\r\n".encode()
    begun, noise = head + CHUNKED + b"\r\n1\r\n{\r\n", b"no size\r\n"
    for _ in range(4):
        begin, said = time.monotonic(), b""
        with server.raw(begun if when != "at once" else begun + noise) as connection:
            if when == "before its end":
                time.sleep(0.2)
            elif when == "after it was refused":
                said = connection.recv(1 << 16)
            if when != "at once":
                connection.sendall(noise)
            late_s = time.monotonic() - begin
            said += rest(connection)
        if late_s < 0.6 * HEADER_S:  # else the body has not come in time
            break
    assert said.startswith(b"HTTP/1.1 " + status) and said.count(b"HTTP/1.1") == 1
    assert server.ask("/health")[0] == 200 and server.stderr == before


def test_a_body_with_two_lengths_is_refused_and_ends_the_connection(server: Server) -> None:
    """Else a proxy that believes the other one lets a client's bytes through as a request of somebody else."""
    both = b"Content-Type: application/json\r\nContent-Length: 4\r\n" + CHUNKED
    hidden = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    data = b"POST /tokenize HTTP/1.1\r\nHost: x\r\n" + both + b"\r\n2\r\n{}\r\n0\r\n\r\n" + hidden
    said = rest(server.raw(data))
    assert said.startswith(b"HTTP/1.1 400") and b"two_lengths" in said and said.count(b"HTTP/1.1") == 1


def test_no_http(server: Server) -> None:
    for wrong in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n",
    ):
        assert rest(server.raw(wrong))[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert server.ask("/health")[0] == 200
