"""HTTP/1.1 by hand, for what no client would send, and for what clients do when they go away or read slowly."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

PIECE = 1 << 16


@dataclass
class Answer:
    """What a server said to one request."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)  # names in lower case
    body: bytes = b""
    whole: bool = False  # all of it has come

    @property
    def value(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Those of a stream; "[DONE]" is one, as text."""
        found = []
        for block in self.body.decode().split("\n\n"):
            lines = [line.removeprefix("data: ") for line in block.splitlines() if line.startswith("data: ")]
            found += [line if line == "[DONE]" else json.loads(line) for line in lines]
        return found


def answers(data: bytes, *, ended: bool) -> list[Answer]:
    """What the bytes of a connection say, one answer after the other.

    Args:
        ended: no more bytes come, so that a body without a length has ended, too.
    Raises:
        ValueError: they are no answers.
    """
    found = []
    while data:
        head, mark, rest = data.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        if not mark:
            if not (line.startswith("HTTP/1.1 ") or "HTTP/1.1 ".startswith(line)):
                raise ValueError(f"no answer: {data[:80]!r}")
            break
        version, status, *_ = line.split(" ")
        if version != "HTTP/1.1":
            raise ValueError(f"no answer: {line[:80]!r}")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)}
        answer = Answer(int(status), headers)
        if answer.status >= 200:
            found.append(answer)
            rest = _body(answer, rest, ended=ended)
        data = rest
    return found


def _body(answer: Answer, data: bytes, *, ended: bool) -> bytes:
    """Read an answer's body; what stands behind it."""
    if answer.status == 204:
        answer.whole = True
        return data
    if "content-length" in answer.headers:
        length = int(answer.headers["content-length"])
        answer.body, answer.whole = data[:length], len(data) >= length
        return data[length:]
    if answer.headers.get("transfer-encoding") != "chunked":
        answer.body, answer.whole = data, ended
        return b""
    while (at := data.find(b"\r\n")) >= 0:
        size = int(data[:at], 16)
        piece, data = data[at + 2 : at + 2 + size], data[at + 2 + size + 2 :]
        answer.body += piece
        if size == 0:
            answer.whole = True
            return data
        if len(piece) < size:
            break
    return b""


@asynccontextmanager
async def connection(
    port: int, buffer: int = PIECE
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is closed at the block's end, whatever has become of it.

    Args:
        buffer: bytes that may have come and not been read.
    """
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=own, limit=buffer)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def exchange(port: int, pieces: Sequence[bytes], limit_s: float) -> tuple[bytes, float]:
    """Send these, one after the other, and read until the server closes the connection.

    Returns all that it said, and the seconds from the connection's beginning until all was sent, or it was closed.

    Raises:
        TimeoutError: it did not within so many seconds.
    """
    async with asyncio.timeout(limit_s), connection(port) as (reader, writer):
        begin, said = time.monotonic(), b""
        sent_s: float | None = None

        async def send() -> None:
            nonlocal sent_s
            await _send(writer, pieces)
            sent_s = time.monotonic() - begin

        sending = asyncio.ensure_future(send())
        try:
            with suppress(ConnectionError):
                while piece := await reader.read(PIECE):
                    said += piece
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await sending
        return said, sent_s or time.monotonic() - begin


def reset(writer: asyncio.StreamWriter) -> None:
    """Go away as a process does that is killed: what has come and is unread is thrown away, and the server told so."""
    own = writer.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, pieces: Sequence[bytes]) -> None:
    for number, piece in enumerate(pieces):
        if number:
            await asyncio.sleep(0.002)
        writer.write(piece)
        await writer.drain()
