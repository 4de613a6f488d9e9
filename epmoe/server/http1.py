"""HTTP/1.1 as uvicorn has it, with a bound on the time in which a request's head must come, and one end for each."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Bounded(H11Protocol):
    """A connection that is closed when a head does not come in time: a new one's, or the next of one that is open."""

    head_s = 30.0  # a subclass of the server's own has the configuration's
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self._answers():
            self._settle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self._answers():  # the next head may have come already
            self._wait()

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
