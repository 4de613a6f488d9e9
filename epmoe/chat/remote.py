"""Remote: a model behind OpenAI's interface, /v1/chat/completions as a stream, by the standard library alone."""

import http.client
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from epmoe.chat.talk import Message, Show
from epmoe.config.schema import ChatConfig
from epmoe.errors import UserError
from epmoe.server.openai.spoken import CALL, CONTENT, REASONING, Delta
from epmoe.text.variables import configured

CONNECT_S = 10.0
WAIT_S = 600.0  # for the next piece: other users' requests may stand before
LINE = 1 << 22  # most bytes of an event
KEY = "EPMOE_API_KEY"  # of the environment

# Keys of sampling → fields, where they are given.
FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)


class Remote:
    """Raises UserError where there is no such server, or it refuses the key."""

    def __init__(self, config: ChatConfig) -> None:
        self.place = f"base_url={config.base_url}"
        self.url = urlsplit(config.base_url)
        try:
            known = self.url.scheme in ("http", "https") and bool(self.url.hostname) and self.url.port != 0
        except ValueError:
            known = False
        if not known:
            raise UserError(f"{self.place} is no address: write http://HOST:PORT/v1")
        self.fields = fields(config)
        self.name = self.fields["model"] = config.model or self._first()

    def answer(self, messages: Sequence[Message], show: Show) -> str:
        """See `Source`."""
        reason = "stop"
        with closing(self._connection()) as connection:
            asked = {**self.fields, "messages": list(messages), "stream": True}
            for event in self._events(self._asked(connection, "POST", "/chat/completions", asked)):
                for choice in event.get("choices") or ():
                    for delta in deltas(choice.get("delta") or {}):
                        show(delta)
                    reason = choice.get("finish_reason") or reason
        return reason

    def close(self) -> None:
        """See `Source`: each answer has a connection of its own."""

    def _first(self) -> str:
        """The first model that it lists."""
        with closing(self._connection()) as connection:
            found = _object(self._asked(connection, "GET", "/models").read(LINE))
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.place} lists no models: name one with model=") from None

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        return kind(self.url.hostname or "", self.url.port, timeout=CONNECT_S)

    def _asked(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any = None
    ) -> http.client.HTTPResponse:
        """The answer, whose body may be read; raises UserError for any other than 200."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            connection.sock.settimeout(WAIT_S)
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self.url.path.rstrip("/") + path, data, headers)
            found = connection.getresponse()
            if found.status != 200:
                raise UserError(f"{self.place}: {told(_object(found.read(LINE)))} (HTTP {found.status})")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.place} does not answer ({error}): is a server there?") from error
        return found

    def _events(self, found: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """Those of a stream, to its end; raises UserError for an error among them, or none."""
        try:
            while line := found.readline(LINE):
                name, _, data = line.partition(b":")
                if name != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                event = _object(data)
                if "error" in event:
                    raise UserError(f"{self.place}: {told(event)}")
                yield event
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.place} has gone away ({error}): ask again") from error
        raise UserError(f"{self.place} has gone away before the answer's end: ask again")


def fields(config: ChatConfig) -> dict[str, Any]:
    """What the configuration says of answers, as fields of a request.

    Raises:
        UserError: a file of tools that cannot be read.
    """
    given = {name: getattr(config.sampling, name) for name in FIELDS}
    found = {name: value for name, value in given.items() if value is not None and value is not False and value != ()}
    if config.max_new_tokens is not None:
        found["max_tokens"] = config.max_new_tokens
    variables = configured(config)
    found |= {name: variables.pop(name) for name in ("reasoning_effort", "tools") if name in variables}
    return {**found, "chat_template_kwargs": variables} if variables else found


def deltas(given: dict[str, Any]) -> Iterator[Delta]:
    """What a chunk adds to an answer."""
    if text := given.get("reasoning") or given.get("reasoning_content"):
        yield Delta(REASONING, text)
    if text := given.get("content"):
        yield Delta(CONTENT, text)
    for call in given.get("tool_calls") or ():
        function = call.get("function") or {}
        yield Delta(CALL, function.get("arguments") or "", call.get("index") or 0, call.get("id"), function.get("name"))


def told(found: dict[str, Any]) -> str:
    """What an error says."""
    error = found.get("error")
    return str(error.get("message")) if isinstance(error, dict) else str(error or found or "no word of why")


def _object(data: bytes) -> dict[str, Any]:
    """A JSON object; anything else is none of its fields."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
