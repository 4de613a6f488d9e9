"""HTTP/1.1 as uvicorn has it: bounds on the time of a head and on bytes that wait, and one end for each request."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LOOKS = 4  # in `stalled_s`
LEAST = 4096  # bytes that must be taken in that time, where so many wait


class Bounded(H11Protocol):
    """A connection that is closed when a head does not come in time (a new one's, or the next of one that is open), and
    when the client takes next to nothing of what waits for it, as if it had gone away.
    """

    head_s, stalled_s = 30.0, 60.0  # a subclass of the server's own has the configuration's
    timer: asyncio.TimerHandle | None = None
    looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.counted = _Counted(transport)
        super().connection_made(self.counted)  # type: ignore[arg-type]
        self.taken, self.taken_s = 0, self.loop.time()
        self._look()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        if self.looking is not None:
            self.looking.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self._answers():
            self._settle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self._answers():  # the next head may have come already
            self._wait()

    def _look(self) -> None:
        """Now and then: whether the client has taken enough."""
        waiting, now = self.counted.get_write_buffer_size(), self.loop.time()
        taken = self.counted.written - waiting
        if taken >= self.taken + LEAST or not waiting:
            self.taken, self.taken_s = taken, now
        elif now - self.taken_s >= self.stalled_s:
            self.counted.abort()  # `close` would wait for it
            return
        self.looking = self.loop.call_later(self.stalled_s / LOOKS, self._look)

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP, or no body; only a request that has no answer yet gets one."""
        if self.cycle is not None and self._answers():  # it has its answer now, and nothing more of it comes
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _answers(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._settle()
        self.timer = self.loop.call_later(self.head_s, self.transport.close)

    def _settle(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class _Counted:
    """A transport that counts the bytes that it was given."""

    def __init__(self, transport: Any) -> None:
        self.transport, self.written = transport, 0

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self.transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)
