"""/v1/responses: its paths, and a response on its way to a client, at once or as a stream of events.

response.created · response.in_progress · events of each item (openai/outputs.py) · response.completed
                                                                                 or .incomplete, or .failed
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response as Answer
from starlette.routing import Route

from epmoe.server.errors import ApiError, refused
from epmoe.server.front import Front
from epmoe.server.kept import Kept, Limits
from epmoe.server.openai.fields import typed
from epmoe.server.openai.outputs import Event, Outputs
from epmoe.server.openai.responses import Response, ResponseRequest, usage
from epmoe.server.replies import Answering, Send
from epmoe.server.watched import Watched
from epmoe.text.completion import Completion
from epmoe.text.delivery import Piece

Body = Callable[[Request], Awaitable[dict[str, Any]]]


class Responses:
    """The endpoints.

    Args:
        body: reads a request's object.
    """

    def __init__(self, front: Front, body: Body, limits: Limits | None = None) -> None:
        self.front, self.body = front, body
        self.kept = Kept(limits or replace(Limits(), number=front.hello.responses))
        self.routes = [
            Route("/v1/responses", self.create, methods=["POST"]),
            Route("/v1/responses/{id}", self.get, methods=["GET"]),
            Route("/v1/responses/{id}", self.delete, methods=["DELETE"]),
            Route("/v1/responses/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def create(self, request: Request) -> "ResponseReply":
        asked = typed(await self.body(request), ResponseRequest)
        self.front.check_model(asked.model)
        keeps = self.kept.limits.number > 0
        if asked.store and not keeps:
            raise refused("store", "this server keeps no responses (serve.responses=0): leave it out")
        before = [] if asked.previous_response_id is None else self._found(asked.previous_response_id, 400)[1]
        made = Response(
            self.front, asked, before, f"resp_{secrets.token_hex(24)}", kept=keeps and asked.store is not False
        )
        return ResponseReply(self.front, made, self.kept, request.scope["watched"])

    async def get(self, request: Request) -> Answer:
        for name in request.query_params:
            if name != "include":  # what is kept has all that there is
                raise refused(name, "not served: a response is given as it is")
        return _json(self._found(request.path_params["id"], 404)[0])

    async def delete(self, request: Request) -> Answer:
        id = request.path_params["id"]
        self._found(id, 404)
        self.kept.drop(id)
        return _json({"id": id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Answer:
        self._found(request.path_params["id"], 404)
        raise ApiError(400, "only a response in the background could be cancelled, and there are none", param="id")

    def _found(self, id: str, status: int) -> tuple[dict[str, Any], list[Any]]:
        """A response that is kept, and its conversation; else an error with this status."""
        if (found := self.kept.get(id)) is not None:
            return found
        param, code = ("previous_response_id", "previous_response_not_found") if status == 400 else ("id", "not_found")
        raise ApiError(
            status, f"there is no response {id!r} (any more): send the whole conversation", param=param, code=code
        )


class ResponseReply(Answering):
    """One response."""

    def __init__(self, front: Front, made: Response, kept: Kept, watched: Watched) -> None:
        super().__init__(front, made.requests, made.asked.stream, watched)
        self.made, self.kept = made, kept
        self.number = 0  # of the next event

    async def fresh(self, send: Send, number: int, pieces: list[Piece], ended: set[int]) -> None:
        if not self.number:
            begun = self.made.object("in_progress")
            await self._events(send, [{"type": f"response.{kind}", "response": begun} for kind in _BEGIN])
        for piece in pieces:
            self.outputs.heard(piece.ids, piece.logprobs)
        await self._events(send, self.outputs.fresh(cut=self._cut))

    async def close(self, send: Send) -> None:
        events, done = self._end()
        await self._events(send, [*events, {"type": f"response.{done['status']}", "response": done}])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        self.outputs.heard(completions[0].ids, completions[0].logprobs)
        return self._end()[1]

    async def fail(self, send: Send, error: ApiError) -> None:
        said = self.outputs.objects
        await self._events(
            send, [{"type": "response.failed", "response": self.made.object("failed", said, error=error)}]
        )

    @cached_property
    def outputs(self) -> Outputs:
        """What has come, from the first token on."""
        chat, parser = self.made.chat.asked, self.deliveries[0].parts[0].answer.parser
        top = (chat.top_logprobs or 0) if chat.logprobs else None
        return Outputs(self.front.tokenizer, parser, several=chat.parallel_tool_calls, top=top)

    @property
    def _cut(self) -> bool:
        """Whether the answer has ended because of its length."""
        return self.deliveries[0].parts[0].answer.finish_reason == "length"

    def _end(self) -> tuple[list[Event], dict[str, Any]]:
        """The last events of the items, and the response, which can be asked for now."""
        (delivery,) = self.deliveries
        (part,) = delivery.parts
        assert part.result is not None
        events = self.outputs.fresh(cut=self._cut)
        tokens = (len(delivery.prompt.ids), part.result.cached_tokens, part.given)
        used = usage(*tokens, self.outputs.reasoning_tokens)
        done = self.made.object("incomplete" if self._cut else "completed", self.outputs.objects, used)
        if self.made.kept:
            self.kept.keep(self.made.id, done, [*self.made.items, *self.outputs.objects])
        return events, done

    async def _events(self, send: Send, events: list[Event]) -> None:
        for each in events:
            data = msgspec.json.encode({**each, "sequence_number": self.number})
            await self.event(send, b"event: " + each["type"].encode() + b"\ndata: " + data)
            self.number += 1


_BEGIN = ("created", "in_progress")


def _json(value: Any) -> Answer:
    return Answer(msgspec.json.encode(value), media_type="application/json")
