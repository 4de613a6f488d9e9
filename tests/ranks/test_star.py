"""Star: each replica's first rank has a connection to rank 0; nobody else has one."""

import socket
import threading
import time
from typing import Any

import pytest
from spawn import run_ranks

from epmoe.ranks.mesh import Ranks
from epmoe.ranks.star import _accept_all, _reach, star


def said(ranks: Ranks) -> dict[int, str]:
    """What each connection says: whose it is."""
    found = star(ranks, 20)
    for each in found.values():
        each.sendall(f"rank {ranks.rank}".encode())
    return {replica: each.recv(100).decode() for replica, each in found.items()}


def test_every_first_rank_reaches_rank_0() -> None:
    assert run_ranks(said, 6, replica=3) == [{1: "rank 2", 2: "rank 4"}, {}, {0: "rank 0"}, {}, {0: "rank 0"}, {}]
    assert run_ranks(said, 2) == [{}, {}]


def test_strangers_are_sent_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
        strangers[1].sendall(b"\xff" * 100)
        strangers[2].close()
        threading.Thread(target=_reach, args=("127.0.0.1", port, f"{'a' * 32} {1:8d}\n", 20)).start()
        found = _accept_all(listener, "a" * 32, 2, 20)
        assert [*found] == [1]
        assert strangers[0].recv(100) == b""


def test_a_replica_that_does_not_come_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(RuntimeError, match=r"replicas \[1, 2\] did not reach rank 0 within 0\.1 s"),
    ):
        _accept_all(listener, "a" * 32, 3, 0.1)


class Crowd:
    """A listener to which a stranger comes at once, each time."""

    def __init__(self, within_s: float) -> None:
        self.until = time.monotonic() + within_s

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def accept(self) -> tuple[socket.socket, str]:
        assert time.monotonic() < self.until, "it waits for ever"
        here, there = socket.socketpair()
        there.close()
        return here, "somewhere"


def test_strangers_that_come_and_come_do_not_make_it_wait() -> None:
    crowd: Any = Crowd(within_s=20)
    with pytest.raises(RuntimeError, match=r"replicas \[1\] did not reach rank 0 within 0\.1 s"):
        _accept_all(crowd, "a" * 32, 2, 0.1)
