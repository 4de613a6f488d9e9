"""AsyncLLM: requests that come and go, each with an answer that comes in pieces; for servers and asyncio programs.

    async with AsyncLLM("openai/gpt-oss-20b") as llm:
        async for event in llm.generate("Why is the sky blue?", SamplingParams(max_tokens=64)):
            print(event.text, end="") if isinstance(event, Piece) else print(event.finish_reason)

Requests come to rank 0. One thread of each rank runs the loop of epmoe/engine/service.py.
"""

import asyncio
import atexit
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from epmoe.config.compose import from_keys
from epmoe.config.schema import ServeConfig
from epmoe.engine.call import Stopped
from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.ranks.launch import use_on_this_thread
from epmoe.ranks.mesh import fail
from epmoe.server.replicas import service_of
from epmoe.text.asked import PromptLike
from epmoe.text.completion import Completion
from epmoe.text.delivery import Delivery, Piece
from epmoe.text.variables import with_tools
from epmoe.weights.update import NamedTensors

LOOK_S = 1.0  # how often a wait for the engine's thread looks whether it still lives


class AsyncLLM:
    """A model that answers many callers at a time, from any thread or event loop.

    Under torchrun each rank makes one; requests come to rank 0 (`is_main`), and the others follow until it closes.

    Args:
        checkpoint, ranks, keys: as `LLM`, and the group `serve`: `serve={"queue_requests": 64}`.
    Raises:
        UserError: as `LLM`.
    """

    def __init__(self, checkpoint: str | Path = "", *, ranks: int = 1, **keys: Any) -> None:
        config = from_keys(with_tools({"checkpoint": str(checkpoint), **keys}), ServeConfig)
        own = {name: value for name, value in keys.items() if name.partition(".")[0] != "serve"}
        self.llm = LLM(checkpoint, ranks=ranks, **own)
        self.is_main = self.llm.ranks.is_main
        self.service = service_of(self.llm.engine, config.serve)
        self.closed = False
        atexit.register(self.close)  # comes before the LLM's own end
        try:
            self._begin()
        except BaseException:
            self.close()  # it holds memory
            raise

    async def generate(
        self, prompt: PromptLike, params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[Piece | Completion]:
        """The answer to one prompt: pieces as they come, at last the whole of it.

        Leaving the loop, closing the iterator or cancelling its task ends the request within a step (of several ranks:
        within two), and frees its memory. A reader that is slow gets larger pieces.

        Args:
            prompt: as `LLM.generate`'s: text, messages, token ids or an object. It is rendered and encoded here, on
                another thread, in bounded time.
            params: what they leave out as for `LLM.generate`. With n > 1 pieces say by `index` whose they are.
            priority: of those that wait the lower goes first; one that runs is never put back for it.
        Raises:
            UserError: a prompt or parameters that cannot be; this is not rank 0, or it is closed.
            QueueFull: a UserError: so many wait already that this one is refused.
            Stopped: the LLM was closed meanwhile, or its engine has failed.
        """
        self._check_open("generate")
        if not self.is_main:
            raise UserError(f"generate was called on rank {self.llm.ranks.rank}: requests come to rank 0 alone")
        loop, fresh = asyncio.get_running_loop(), asyncio.Event()
        request = await asyncio.to_thread(self.llm.request, prompt, params, priority)
        delivery = Delivery(self.llm.tokenizer, request, partial(loop.call_soon_threadsafe, fresh.set))
        self.service.submit(delivery.calls)
        try:
            completion = None
            while completion is None:
                await fresh.wait()
                fresh.clear()
                pieces, completion = delivery.take()
                for piece in pieces:
                    yield piece
            yield completion
        finally:
            for call in delivery.calls:
                self.service.abort(call)

    async def update_weights(self, tensors: NamedTensors) -> None:
        """`LLM.update_weights` between two steps: requests that come meanwhile wait. Under torchrun a collective.

        Raises:
            UserError: requests wait or run: no answer is made of two models. What `LLM.update_weights` refuses.
        """
        await asyncio.to_thread(self._update, tensors)

    def _update(self, tensors: NamedTensors) -> None:
        self._check_open("update_weights")
        if self.is_main:
            self.service.stop()
        self._thread.join()  # until rank 0 stops, or fails: its watch sees to that
        self._check_open("update_weights")
        try:
            use_on_this_thread(self.llm.ranks.device)
            self.llm.update_weights(tensors)
        finally:
            self._begin()

    def close(self) -> None:
        """End all requests, give memory back, part from the other ranks. Nothing can be asked afterwards.

        On rank 0 at once; the others wait here until rank 0 closes. Main thread only where there are several ranks.
        """
        self._end()
        if not self.closed:
            self.closed = True
            atexit.unregister(self.close)
            self.llm.close()

    def _end(self) -> None:
        if self.is_main:
            self.service.stop(Stopped("the LLM was closed before the answer's end"))
        self._thread.join()

    def _begin(self) -> None:
        """Start the engine's thread; returns when requests may come.

        Raises:
            what has gone wrong on its way there.
        """
        self._thread = threading.Thread(target=self._serve, name="epmoe-engine", daemon=True)
        self._thread.start()
        while not self.service.is_running(LOOK_S) and self._thread.is_alive():
            pass
        if (error := self.service.failure) is not None:
            raise error

    def _serve(self) -> None:
        try:
            use_on_this_thread(self.llm.ranks.device)
            self.llm.serve(self.service)
        except BaseException as error:
            if self.is_main:  # another's calls are rank 0's, which asks another replica where it goes on without this
                self.service.fail(error)
            if (watch := self.llm.ranks.watch) is not None:
                fail(watch, error)  # the others wait for this rank in a collective

    def _check_open(self, call: str) -> None:
        if self.closed:
            raise UserError(f"{call} was called after close: make another AsyncLLM")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._end)  # other tasks hear of their requests' end meanwhile
        self.close()
