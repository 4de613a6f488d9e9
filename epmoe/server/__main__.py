"""The HTTP process: python -m epmoe.server LINE LISTENER, two file descriptors that rank 0 (door.py) has opened."""

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn

from epmoe.errors import UserError
from epmoe.server.app import App
from epmoe.server.frames import Broken, Up
from epmoe.server.front import Front
from epmoe.server.http1 import Bounded
from epmoe.server.line import Line

END_S = 2  # for what is being sent when rank 0 says goodbye, or is gone
MOST_FILES = 1 << 16  # of this process, a client each
KEEP_ALIVE_S = 75  # longer than clients and proxies keep an unused connection, which would meet its end


class Quiet(uvicorn.Server):
    """Rank 0 alone says when it ends."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(line_number: int, listener_number: int) -> None:
    """Answer clients until rank 0 says goodbye, or is gone."""
    server: Quiet | None = None

    def end() -> None:
        if server is not None:
            server.should_exit = True

    line = Line(socket.socket(fileno=line_number), end)
    hello = await line.greet()
    try:
        front = await asyncio.to_thread(Front, line, hello)
        app = App(front)
    except (UserError, OSError) as error:
        line.say(Broken(str(error)))
        await line.writer.drain()
        line.writer.close()
        return
    config = uvicorn.Config(
        app,
        http=type("Served", (Bounded,), {"head_s": hello.header_s, "stalled_s": hello.stalled_s}),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=END_S,
    )
    server = Quiet(config)
    listening = asyncio.ensure_future(line.listen())
    line.say(Up())
    await server.serve(sockets=[socket.socket(fileno=listener_number)])
    listening.cancel()


def take_files() -> None:
    """Let this process open what the system lets it: each client takes a file, and a shell's bound is often 1024."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM):  # of a terminal or a launcher: rank 0 hears it, too
        signal.signal(each, signal.SIG_IGN)
    take_files()
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
    sys.stderr.flush()
    os._exit(0)
