"""Peer: one end of a connection between two ranks' watches; lines of JSON."""

import json
import socket
import time
from contextlib import suppress
from typing import Any


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
