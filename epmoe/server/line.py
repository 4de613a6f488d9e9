"""Line: the HTTP process' end of the line to rank 0: what a `Service` is to those in its own process."""

import asyncio
import os
import socket
from collections.abc import Callable, Sequence

from epmoe.engine.call import Call, Stopped
from epmoe.engine.request import Request
from epmoe.server.calls import Calls
from epmoe.server.frames import (
    PIECE,
    Abort,
    Bye,
    Damaged,
    Drain,
    Frame,
    Frames,
    FromRank0,
    Hello,
    Idle,
    Load,
    Opened,
    Ready,
    packed,
)  # fmt: skip


class Line(Calls):
    """One a process; all of it runs in the event loop's thread.

    Args:
        end: called when rank 0 says goodbye, or is gone.
    """

    def __init__(self, own: socket.socket, end: Callable[[], None]) -> None:
        super().__init__()
        self.socket, self.end = own, end
        self.ready: Ready | None = None
        self.load: Load | None = None
        self.draining = False
        self.active = 0  # requests of clients that are being answered
        self.over = False  # nothing can be asked any more

    async def greet(self) -> Hello:
        """Open the line; rank 0's first frame."""
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self.socket)
        self.frames, self.early = Frames(FromRank0), list[Frame]()
        while not self.early:
            piece = await self.reader.read(PIECE)
            if not piece:
                os._exit(0)  # rank 0 has gone: there is nobody to tell
            self.early += self.frames.feed(piece)
        hello = self.early.pop(0)
        assert isinstance(hello, Hello)
        return hello

    def say(self, frame: Frame) -> None:
        """For rank 0. It reads at once, so nothing piles up here."""
        self.writer.write(packed(frame))

    async def listen(self) -> None:
        """Hear rank 0 until it says goodbye or is gone; all calls have ended then."""
        try:
            for frame in self.early:
                self._hear(frame)
            while not self.over and (piece := await self.reader.read(PIECE)):
                for frame in self.frames.feed(piece):
                    self._hear(frame)
        except (OSError, Damaged):
            pass
        finally:
            self.over = True
            for call in [*self.calls.values()]:
                self.fail(call, Stopped("the model's ranks have ended, and all requests with them"))
            self.end()

    def submit(self, prompts: Sequence[tuple[Request, Sequence[Call]]]) -> None:
        """Let the calls of these prompts wait for their turn, all or none; a refusal comes to their listeners.

        Raises:
            Stopped: there is no service any more, or not yet.
        """
        if self.over or self.ready is None:
            raise Stopped("the model is not ready" if not self.over else "the model's ranks have ended")
        self.say(self.asked(prompts))

    def abort(self, calls: Sequence[Call]) -> None:
        if (numbers := self.left(calls)) and not self.over:
            self.say(Abort(numbers))

    def begin(self) -> None:
        """A client's request is being answered."""
        self.active += 1

    def finish(self) -> None:
        """One is answered."""
        self.active -= 1
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self.draining and not self.active and not self.over:
            self.say(Idle())

    def _hear(self, frame: Frame) -> None:
        match frame:
            case Ready():
                self.ready = frame
                self.say(Opened())
            case Load():
                self.load = frame
            case Drain():
                self.draining = True
                self._tell_idle()
            case Bye():
                self.over = True
            case _:
                self.heard(frame)
