"""One request for an answer, from its prompts to the last byte, at once or as server-sent events.

    requests (on a thread) ─▶ Line.submit ─▶ Delivery.take, whenever there is news ─▶ chunks, or one object at the end

The status is sent when the first token or the first refusal is there, so that a full queue is a 429 in a stream, too. A
client that goes away cancels all of it, and that aborts its calls.
"""

import asyncio
import secrets
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, ClassVar, Protocol

import msgspec

from epmoe.engine.request import Request
from epmoe.server import errors
from epmoe.server.errors import ApiError
from epmoe.server.front import SCORES, Front
from epmoe.server.openai.fields import Sampled
from epmoe.server.openai.usage import usage
from epmoe.server.watched import Watched
from epmoe.text.completion import Choice, Completion
from epmoe.text.delivery import Delivery, Piece

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class Kind(Protocol):
    """What an endpoint makes of an answer; `number` is the prompt's among those of the request."""

    prefix: ClassVar[str]  # of an answer's id
    whole: ClassVar[str]  # the `object` of an answer
    part: ClassVar[str]  # of a chunk

    @property
    def echo(self) -> bool: ...  # the prompt is a part of it
    def requests(self) -> list[Request]: ...
    def opening(self, number: int, delivery: Delivery, index: int) -> dict[str, Any] | None: ...
    def piece(self, number: int, delivery: Delivery, piece: Piece) -> list[dict[str, Any]]: ...
    def closing(self, reason: str, delivery: Delivery, index: int) -> dict[str, Any]: ...
    def choice(self, number: int, delivery: Delivery, choice: Choice) -> dict[str, Any]: ...


class Answering(ABC):
    """An ASGI application for one request, up to the form of what is sent.

    Args:
        requests: makes what the engine is asked for, on a thread of its own.
    """

    def __init__(self, front: Front, requests: Callable[[], list[Request]], stream: bool, watched: Watched) -> None:
        self.front, self.requests, self.stream, self.watched = front, requests, stream, watched
        self.deliveries: list[Delivery] = []
        self.streaming = False  # the status was sent

    @abstractmethod
    async def fresh(self, send: Send, number: int, pieces: list[Piece], ended: set[int]) -> None:
        """What is new of one prompt's answers, in a stream."""

    @abstractmethod
    async def close(self, send: Send) -> None:
        """The end of a stream."""

    @abstractmethod
    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        """All of it at once; perhaps on another thread."""

    @property
    def scores(self) -> int:
        """Log-probabilities of all prompts and answers."""
        params = [each.prompt.params for each in self.deliveries]
        answers = [sum(part.given for part in each.parts) for each in self.deliveries]
        return sum(map(_of_prompt, self.deliveries)) + sum(
            tokens * (1 + each.logprobs) for tokens, each in zip(answers, params, strict=True) if each.logprobs
        )

    @abstractmethod
    async def fail(self, send: Send, error: ApiError) -> None:
        """What a stream says that cannot go on."""

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._run(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.watched.gone = True
                work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            if not work.cancelled():
                work.result()
        finally:
            gone.cancel()
            work.cancel()

    async def _run(self, send: Send) -> None:
        requests = await asyncio.to_thread(self.requests)
        fresh = asyncio.Event()
        self.deliveries = [Delivery(self.front.tokenizer, each, fresh.set) for each in requests]
        self.watched.asked(self.deliveries)
        self.front.line.submit([(each.prompt, each.calls) for each in self.deliveries])
        try:
            await self._answer(send, fresh)
        except Exception as error:
            if not self.streaming:
                raise
            if (told := errors.of(error)) is not error and told.status == 500:
                traceback.print_exception(error)
            self.watched.failed(told.status)
            await self.fail(send, told)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.front.line.abort([call for each in self.deliveries for call in each.calls])
            self.watched.said(self.deliveries)

    async def _answer(self, send: Send, fresh: asyncio.Event) -> None:
        """Until all answers have ended."""
        completions: dict[int, Completion] = {}
        while len(completions) < len(self.deliveries):
            await fresh.wait()
            fresh.clear()
            for number, delivery in enumerate(self.deliveries):
                if number in completions:
                    continue
                pieces, completion = delivery.take()
                # As of now: while what follows is sent an answer may end, after tokens that the next take has.
                ended = {index for index, part in enumerate(delivery.parts) if part.result is not None}
                self.watched.came(number, pieces)
                if completion is not None:
                    completions[number] = completion
                for part in delivery.parts:
                    if part.result is not None and part.result.finish_reason == "error":
                        raise _failed(part.result.failure)
                if self.stream:
                    await self.fresh(send, number, pieces, ended)
        if self.stream:
            await self.close(send)
            return
        found = [completions[number] for number in sorted(completions)]
        data = await self.front.written(self.scores, lambda: self.whole(found))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(sum(map(len, data))).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for each in data:
            await send({"type": "http.response.body", "body": each, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def event(self, send: Send, *data: bytes) -> None:
        """Send an event's lines, which may come in pieces."""
        if not self.streaming:
            headers = [(name.encode(), value.encode()) for name, value in EVENTS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            self.streaming = True
        *before, last = data
        for each in before:
            await send({"type": "http.response.body", "body": each, "more_body": True})
        await send({"type": "http.response.body", "body": last + b"\n\n", "more_body": True})


class Reply(Answering):
    """Completions and chat: chunks of choices."""

    def __init__(self, front: Front, kind: Kind, asked: Sampled, watched: Watched) -> None:
        super().__init__(front, kind.requests, asked.stream, watched)
        self.kind, self.asked = kind, asked
        self.id, self.created = f"{kind.prefix}{secrets.token_hex(12)}", int(time.time())
        self.begun: set[tuple[int, int]] = set()  # answers whose opening was given
        self.ended: set[tuple[int, int]] = set()

    async def fresh(self, send: Send, number: int, pieces: list[Piece], ended: set[int]) -> None:
        """The chunks of what is new of one prompt's answers."""
        delivery = self.deliveries[number]
        by_index = {piece.index: piece for piece in pieces}
        for index, part in enumerate(delivery.parts):
            piece, key = by_index.get(index), (number, index)
            if piece is None and (index not in ended or key in self.ended):
                continue
            if key not in self.begun:
                self.begun.add(key)
                await self._open(send, key)
            for count, each in enumerate(() if piece is None else _slices(piece)):
                if count:
                    await asyncio.sleep(0)  # others' turn
                for choice in self.kind.piece(number, delivery, each):
                    await self._chunk(send, key, choice)
            if index in ended and key not in self.ended:
                self.ended.add(key)
                await self._chunk(send, key, self.kind.closing(part.answer.finish_reason, delivery, index))

    async def _open(self, send: Send, key: tuple[int, int]) -> None:
        """What comes before an answer's first token; with an echo perhaps long."""
        number, index = key
        delivery = self.deliveries[number]
        if not self.kind.echo or (scores := _of_prompt(delivery)) <= SCORES:
            if (opening := self.kind.opening(number, delivery, index)) is not None:
                await self._chunk(send, key, opening)
            return
        first, *rest = await self.front.written(
            scores, lambda: self._said(key, self.kind.opening(number, delivery, index) or {})
        )
        await self.event(send, b"data: " + first, *rest)

    async def _chunk(self, send: Send, key: tuple[int, int], choice: dict[str, Any]) -> None:
        await self._event(send, self._said(key, choice))

    def _said(self, key: tuple[int, int], choice: dict[str, Any]) -> dict[str, Any]:
        made = {"index": self._index(*key), "finish_reason": None, **choice}
        said = {**self.front.envelope(self.id, self.kind.part, self.created), "choices": [made]}
        if self.asked.usage.continuous_usage_stats:
            said["usage"] = self._usage()
        return said

    async def close(self, send: Send) -> None:
        if self.asked.usage.include_usage:
            said = {**self.front.envelope(self.id, self.kind.part, self.created), "choices": [], "usage": self._usage()}
            await self._event(send, said)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def fail(self, send: Send, error: ApiError) -> None:
        await self._event(send, error.body)

    async def _event(self, send: Send, said: dict[str, Any]) -> None:
        await self.event(send, b"data: " + msgspec.json.encode(said))

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        choices = [
            {"index": self._index(number, choice.index), **self.kind.choice(number, self.deliveries[number], choice)}
            for number, completion in enumerate(completions)
            for choice in completion.outputs
        ]
        envelope = self.front.envelope(self.id, self.kind.whole, self.created)
        return {**envelope, "choices": choices, "usage": self._usage()}

    def _index(self, number: int, index: int) -> int:
        return number * len(self.deliveries[0].parts) + index

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(each.prompt.ids) for each in self.deliveries)
        parts = [part for each in self.deliveries for part in each.parts]
        cached = sum(each.parts[0].result.cached_tokens for each in self.deliveries if each.parts[0].result)
        return usage(prompt, sum(part.given for part in parts), cached)


def _of_prompt(delivery: Delivery) -> int:
    """Log-probabilities of its prompt's tokens."""
    params, tokens = delivery.prompt.params, len(delivery.prompt.ids)
    return 0 if params.prompt_logprobs is None else tokens * (1 + params.prompt_logprobs)


def _slices(piece: Piece) -> Iterator[Piece]:
    """The same in pieces of so few log-probabilities that nobody waits while one is spelled; the first has the text."""
    width = 1 + len(piece.logprobs[0].top) if piece.logprobs else 0
    if width * len(piece.ids) <= SCORES:
        yield piece
        return
    size = max(1, SCORES // width)
    for begin in range(0, len(piece.ids), size):
        part = slice(begin, begin + size)
        yield Piece(piece.index, "" if begin else piece.text, piece.ids[part], piece.logprobs[part])


def _failed(grammar: str) -> ApiError:
    """Why an answer cannot go on: what has failed of its grammar, which is the request's own; or its numbers."""
    if grammar:
        return ApiError(400, f"the answer's grammar has failed on the way ({grammar}): simplify it")
    return ApiError(500, "the model's numbers are none for this prompt")


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
