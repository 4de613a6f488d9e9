"""Peer: one end of a connection between two ranks' watches; lines of JSON. How a rank comes to rank 0."""

import json
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from epmoe.ranks.admission import Hello
from epmoe.ranks.fault import NoRankZero
from epmoe.ranks.launch import Patience


class Peer:
    """One end of a connection. Only one thread uses it at a time."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.rank = connection, rank
        self.heard, self.rest = time.monotonic(), b""

    def send(self, *message: Any) -> None:
        with suppress(OSError):  # a dead peer is found by reading
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[list[Any]] | None:
        """The messages that have arrived, or None at the end of the connection."""
        try:
            data = self.connection.recv(65536)
            *lines, self.rest = (self.rest + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError):  # reset, as by a killed peer with unread data; or a stranger's bytes
            return None
        self.heard = time.monotonic()
        return messages if data else None


def wait_for_ends(peers: dict[int, Peer], within_s: float) -> None:
    """Wait until these connections have ended, so long at most; what has ended is taken out."""
    deadline = time.monotonic() + within_s
    while peers and time.monotonic() < deadline:
        for peer in list(peers.values()):
            peer.connection.settimeout(0.02)
            if peer.receive() is None:
                del peers[peer.rank]


def reach_rank_0(store: dist.Store, own: Hello, port: int, patience: Patience) -> tuple[Peer, list[list[Any]]]:
    """A connection on which rank 0 knows this rank, and what it has said besides.

    Raises:
        NoRankZero: it does not come, cannot be reached, refuses, ends or says nothing.
    """
    try:
        store.wait(["watch"], timedelta(seconds=patience.left_s))
        host, its_port, token = json.loads(store.get("watch"))
        connection = socket.create_connection((host, its_port), patience.left_s)
    except dist.DistError as error:
        text = f"rank 0 did not come to MASTER_PORT {port} within {patience} of rank {own.rank}'s start"
        raise NoRankZero(f"{text} (runtime.timeout_s)") from error
    except OSError as error:
        text = f"rank {own.rank} cannot reach rank 0 of MASTER_PORT {port} at {host}:{its_port} ({error})"
        raise NoRankZero(text) from error
    peer = Peer(connection, 0)
    peer.send("hello", token, asdict(own))
    while not (messages := peer.receive()):
        if messages is None or time.monotonic() > patience.until:
            what = "ended before it knew" if messages is None else "did not answer"
            raise NoRankZero(f"rank 0 of MASTER_PORT {port} {what} rank {own.rank}: is it another run's?")
    (answer, *reasons), *more = messages
    if answer == "refused":
        raise NoRankZero(*reasons)
    return peer, more
