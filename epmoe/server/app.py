"""The application: which path answers what, and what stands before all of them: the key, bounds, errors, the log."""

import asyncio
import hmac
import json
import os
from collections.abc import MutableMapping
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from epmoe.engine.call import Stopped
from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.server import errors, page
from epmoe.server.errors import ApiError
from epmoe.server.front import Front
from epmoe.server.metrics import Metrics
from epmoe.server.openai.chat import Chat, ChatRequest
from epmoe.server.openai.completions import CompletionRequest, Completions
from epmoe.server.openai.fields import decoded, typed
from epmoe.server.replies import Reply
from epmoe.server.responses import Responses
from epmoe.server.watched import Watched

OPEN = frozenset(("/health", "/ready", *page.FILES))  # for probes, which have no key, and a page that asks for one
TWO_LENGTHS = "two_lengths"  # the code of such an error
DISCARDED = 8  # times max_body: what is read of a body that is too large, so that its sender hears of it


class App:
    """All endpoints, over one front."""

    def __init__(self, front: Front) -> None:
        self.front, self.line, self.hello = front, front.line, front.hello
        self.metrics = Metrics(self.hello.model, lambda: self.line.load)
        self.log = open(self.hello.log, "a", encoding="utf-8", buffering=1) if self.hello.log else None  # noqa: SIM115
        self.bodies = 0  # bytes of requests that are being answered
        get, post = ["GET"], ["POST"]
        routes = [
            *page.routes(),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/chat/completions", self.chat, methods=post),
            *Responses(self.front, self._body).routes,
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.model, methods=get),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
            Route("/health", self.health, methods=get),
            Route("/ready", self.is_ready, methods=get),
            Route("/metrics", self.exposed, methods=get),
            Route("/version", self.version, methods=get),
        ]
        handled = (ApiError, UserError, Stopped, HTTPException, ClientDisconnect, Exception)
        self.routed = Starlette(routes=routes, exception_handlers=dict.fromkeys(handled, _said))
        self.routed.router.redirect_slashes = False  # to wherever the request's own Host says
        self.known = {route.path for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server speaks nothing else"
        watched = Watched(self.metrics, scope["path"] if scope["path"] in self.known else "other")
        scope["watched"] = watched

        async def noted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                watched.status = message["status"]
            await send(message)

        self.line.begin()
        try:
            if (refusal := self._refusal(scope)) is not None:
                await _response(refusal)(scope, receive, noted)
            else:
                await self.routed(scope, receive, noted)
        finally:
            self.line.finish()
            self._hold(watched, -watched.body)
            self._note(watched, scope["method"])

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why this request is not looked at."""
        if {b"transfer-encoding", b"content-length"} <= {name for name, _ in scope["headers"]}:
            # A proxy in front may have believed the other one, and what follows would be another client's.
            both = "the request has Transfer-Encoding and Content-Length, which exclude each other: send one of them"
            return ApiError(400, both, code=TWO_LENGTHS)
        if self.hello.api_key and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.hello.api_key.encode()):
                return ApiError(401, "wrong or no API key: send `Authorization: Bearer …`", code="invalid_api_key")
        if scope["method"] == "POST":
            if self.line.draining or self.line.over:
                return ApiError(503, "the server comes to its end, and takes no new requests", code="draining")
            if self.line.ready is None:
                return ApiError(503, "the model is not ready: see /ready", code="not_ready")
            if self.line.active > self.hello.most_requests:  # before any of it takes memory
                return ApiError(429, f"{self.hello.most_requests} requests are in flight", code="rate_limit_exceeded")
        return None

    def _note(self, watched: Watched, method: str) -> None:
        record = watched.record()
        self.metrics.requests.labels(watched.path, str(record["status"])).inc()
        if self.log is not None and method == "POST":
            try:
                self.log.write(json.dumps(record) + "\n")
            except OSError:  # a full disk ends no answer
                self.log = None

    # Answers of the model

    async def completions(self, request: Request) -> Reply:
        asked = typed(await self._body(request), CompletionRequest)
        self.front.check_model(asked.model)
        return Reply(self.front, Completions(self.front, asked), asked, request.scope["watched"])

    async def chat(self, request: Request) -> Reply:
        asked = typed(await self._body(request), ChatRequest)
        self.front.check_model(asked.model)
        return Reply(self.front, Chat(self.front, asked), asked, request.scope["watched"])

    # About the model

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self.front.check_model(request.path_params["name"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.hello.model,
            "object": "model",
            "created": self.hello.created,
            "owned_by": "epmoe",
            "max_model_len": self.hello.max_positions,
        }

    async def tokenize(self, request: Request) -> Response:
        found = await self._body(request)
        special = found.pop("add_special_tokens", True)
        name = found.pop("model", None)
        self.front.check_model(name if isinstance(name, str) else None)
        match found:
            case {"prompt": str(text), **rest} if not rest and isinstance(special, bool):
                ids = await asyncio.to_thread(self.front.tokenizer.encode, text, special=special)
            case {"messages": _}:
                asked = typed(found, ChatRequest)
                asked.check()
                params = SamplingParams()
                found_requests = self.front.requests
                (one,) = await asyncio.to_thread(found_requests, [asked.conversation()], params, 1, chat=True)
                ids = list(one.ids)
            case _:
                raise ApiError(400, "give prompt, a text, with add_special_tokens, true or false; or messages")
        return _json({"count": len(ids), "max_model_len": self.hello.max_positions, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        found = await self._body(request)
        ids = found.get("tokens")
        if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < self.hello.vocab for id in ids):
            raise ApiError(400, f"tokens are no list of ids from 0 to {self.hello.vocab - 1}", param="tokens")
        return _json({"prompt": await asyncio.to_thread(self.front.tokenizer.decode, ids)})

    # About the server

    async def health(self, request: Request) -> Response:
        """Alive; and how many replicas of the model serve, once they do."""
        load = self.line.load
        return _json({"status": "ok"} | ({} if load is None else {"replicas": len(load.replicas)}))

    async def is_ready(self, request: Request) -> Response:
        """Whether requests may come: 503 before the graphs are captured, and from the first signal on."""
        if self.line.ready is None or self.line.draining or self.line.over:
            raise ApiError(503, "the model is not ready, or the server comes to its end", code="not_ready")
        return _json({"status": "ready"})

    async def exposed(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        return _json({"version": self.hello.release, "fingerprint": self.front.fingerprint, "pid": os.getpid()})

    async def _body(self, request: Request) -> dict[str, Any]:
        """The request's object.

        Raises:
            ApiError: too large or too slow a body, another type than JSON, what is no object; too many are held.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: send `Content-Type: application/json`")
        most, data, size, crowded = self.hello.max_body, bytearray(), 0, False
        watched: Watched = request.scope["watched"]
        try:
            async with asyncio.timeout(self.hello.header_s):
                async for piece in request.stream():
                    size += len(piece)
                    if size > DISCARDED * most:
                        break
                    crowded |= self.bodies + len(piece) > self.hello.max_bodies
                    if size > most or crowded:  # the rest is read and let go of, so that its sender hears of it
                        data.clear()
                        self._hold(watched, -watched.body)
                        continue
                    data += piece
                    self._hold(watched, len(piece))
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.hello.header_s:g} s (serve.header_s)") from None
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes (serve.max_body): send less", code="too_large")
        if crowded:
            raise ApiError(
                429,
                f"requests with {self.bodies} bytes are being answered (serve.max_bodies={self.hello.max_bodies}): "
                "come again when some have their answers",
                code="rate_limit_exceeded",
            )
        return decoded(bytes(data))

    def _hold(self, watched: Watched, size: int) -> None:
        """So many bytes more of a request's body are here until its end."""
        self.bodies += size
        watched.body += size


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _response(error: ApiError) -> Response:
    ends = error.status in (408, 413) or error.code == TWO_LENGTHS  # nobody knows where the next request begins
    headers = dict(error.headers) | ({"connection": "close"} if ends else {})
    return Response(msgspec.json.encode(error.body), error.status, headers, "application/json")


async def _said(request: Request, error: Exception) -> Response:
    """An error as a response; 404 and 405 are starlette's own."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    if isinstance(error, ClientDisconnect):
        request.scope["watched"].gone = True
        error = ApiError(400, "the client has gone away")
    return _response(errors.of(error))
