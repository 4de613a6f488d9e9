"""Requests as they come over a connection, damaged: what a kind and a seed make of a valid one.

json      a value of the body            fields    fields more, with any values
body      its bytes                      type      media types and encodings
framing   lengths that lie, chunks       head      methods, targets, versions, headers, floods of them
raw       any bytes of the request       pipeline  several at once, some of them whole
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from epmoe.server.openai.chat import ChatRequest
from epmoe.server.openai.completions import CompletionRequest
from epmoe.server.openai.fields import ACCEPTED, NEUTRAL
from epmoe.server.openai.responses import ResponseRequest
from scripts.fuzzing.damage import HOSTILE, changed_bytes, changed_json

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "maxLength": 5}}},
        "strict": True,
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "It was", "max_tokens": 3, "temperature": 0.7, "seed": 3, "top_p": 0.9, "top_k": 5}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "n": 2, "temperature": 1, "stop": ["x", "yz"]}),
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2, "echo": True, "logprobs": 2, "stop_token_ids": [9]}),
    ("/v1/completions", {
        "prompt": "He", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
        "repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"70": 5, "8": -1},
        "min_tokens": 1, "ignore_eos": True, "priority": 3, "return_token_ids": True, "min_p": 0.1,
    }),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "allowed_token_ids": [65, 66, 67], "user": "x"}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 4, "structured_outputs": {"regex": "[a-c]{2,4}"}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 4, "guided_choice": ["yes", "no"], "stream": True}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 4, "guided_grammar": 'start: "a" | "b" start'}),
    ("/v1/chat/completions", {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "model": "epmoe-demo",
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_tokens": 6, "response_format": FORMAT, "stream": True,
    }),
    ("/v1/chat/completions", {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "fair"},
        ],
        "max_tokens": 2, "chat_template_kwargs": {}, "metadata": {"a": "b"},
    }),
    ("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "tool_choice": "none", "max_tokens": 2,
    }),
    ("/v1/responses", {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Well"}]},
            {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "fair"},
        ],
        "max_output_tokens": 3, "instructions": "Be brief.", "include": ["message.output_text.logprobs"],
        "top_logprobs": 2, "metadata": {"a": "b"}, "text": {"format": {"type": "text"}}, "store": False,
    }),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 3, "stream": True, "temperature": 1, "seed": 1}),
    ("/v1/responses/resp_1/cancel", {}),
    ("/tokenize", {"prompt": "Hello, you", "add_special_tokens": False}),
    ("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]}),
    ("/detokenize", {"tokens": [65, 66, 67]}),
)  # fmt: skip
LONG = "a" * 100_000
CLOSE = ("Connection", "close")  # behind an answer
KNOWN = ("frobnicate", *sorted({
    *NEUTRAL, *ACCEPTED, *CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__,
    *ResponseRequest.__struct_fields__,
}))  # fmt: skip
NEST = (
    ("[", "]"),
    ('{"a": ', "}"),
    ('{"type": "object", "properties": {"a": ', "}}"),
    ('{"anyOf": [', "]}"),
    ('{"not": ', "}"),
)
VALUES = (
    *HOSTILE, "18446744073709551615", "-9223372036854775809", "1.5", "1e400", "-1e400", '"\\udc00\\ud800"', '"\\uFFFF"',
    '{"1": 2, "1": 3}', '{"-1": 1e999}', "[[1], 2]", '["a", 1]', '[""]', '"required"', '{"type": "x"}', "[-1]",
    '{"type": "json_object"}', '{"regex": "(a*)*b"}', '{"regex": "("}', '{"regex": "a{1,99999}"}', '{"json": {}}',
    '{"grammar": "start: start"}', '{"grammar": "start: /a/ start | \\"b\\" start start"}', '"\\u0000"', '["a", "a"]',
    '{"choice": []}', '{"choice": ["\\ud83d\\ude42"]}', '[{"role": "user", "content": "a"}]', '[{"role": 3}]', "[null]",
    '[{"type": "function", "function": {"name": "\\u0000", "parameters": {"$ref": "#"}}}]', '"<|endoftext|>"',
    '{"json": {"$ref": "#/a"}}', '{"json": {"pattern": "^(?=a)$"}}', '{"json": {"enum": [1e308, null, {}]}}',
)  # fmt: skip
TARGETS = (
    "/", "*", "//", "/v1/completions/", "/v1/completions//", "//v1/completions", "/v1/../v1/completions",
    "/v1/completions?x=1", "/v1/completions?" + "x=1&" * 9000, "/v1/completions#x", "/v1/completions%00", "/%ff%fe",
    "/v1%2Fcompletions", "http://x/v1/completions", "http://[/v1/completions", "https://a:b@c:d/", "x", "x:443",
    "/v1/models/%F0%9F%99%82", "/v1/models/" + "x" * 9000, "/v1/models/../../etc/passwd", "/v1/models/%2e%2e/x",
    "/v1/responses/%22%3C", "/v1/responses/", "/metrics/", "/health/", "/page.js/", "/..%2f..%2fetc/passwd",
    "/v1/responses/x?include=a&y=2", "/" + LONG, "/\u00e9", "/v1/compl etions", "/v1/models/\\..\\x", "/health\r\nX: y",
)  # fmt: skip
METHODS = (
    "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PRI", "post", "X" * 300, "", "PO ST",
    "G\0T",
)  # fmt: skip
VERSIONS = (
    "HTTP/1.0",
    "HTTP/0.9",
    "HTTP/2.0",
    "HTTP/1.2",
    "HTTP/9",
    "HTTP/1.1.1",
    "http/1.1",
    "",
    "HTTP/-1.1",
    "FTP/1.1",
)
HEADERS: tuple[tuple[str, str], ...] = (
    ("Host", "["), ("Host", "[::1"), ("Host", "a b"), ("Host", "x\0y"), ("Host", "\u00e9"), ("Host", "x:999999"),
    ("Host", "http://evil/"), ("Host", ""), ("Host", LONG), ("Host", "a@b"), ("Host", "x/y?z#u"), ("Host", "]["),
    ("Connection", "close, keep-alive"), ("Connection", "upgrade"), ("Connection", "\x01"), ("Connection", "TE"),
    ("Upgrade", "websocket"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAAQAAP__"), ("Sec-WebSocket-Key", "x"),
    ("Expect", "100-continue"), ("Expect", "200-ok"), ("Range", "bytes=0-1"), ("TE", "trailers, chunked;q=0"),
    ("Transfer-Encoding", "identity"), ("Transfer-Encoding", "chunked, chunked"), ("Transfer-Encoding", "gzip"),
    ("Transfer-Encoding", "xchunked"), ("Transfer-Encoding", " chunked"), ("Transfer-Encoding", "\tchunked"),
    ("Content-Length", "-1"), ("Content-Length", "+5"), ("Content-Length", "0x10"), ("Content-Length", "1, 1"),
    ("Content-Length", "9" * 30), ("Content-Length", ""), ("Content-Length", "\u0661"), ("Content-Length", "1e3"),
    ("Authorization", "Bearer"), ("Authorization", "\xff"), ("Cookie", "a=b; " * 900), ("X", LONG), ("X y", "z"),
    ("X\0", "z"), ("", "z"), ("X", "a\r\n b"), ("X", "a\nY: b"), (":authority", "x"), ("X-Forwarded-For", "127.0.0.1"),
    ("X-Forwarded-Host", "evil"), ("X-HTTP-Method-Override", "DELETE"), ("Content-Encoding", "gzip"), ("Trailer", "X"),
)  # fmt: skip
TYPES = (
    "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json;",
    "application/json; charset=utf-16", "APPLICATION/JSON", "application/json, text/plain", "application/jsonl",
    "\xff", "application/json\t; x", "json", "application/*", "application/json" + ";" * 9000,
)  # fmt: skip
CODECS = ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "utf-7")
SIZES = (
    "-1", "0x5", "+5", "", " 5", "5 ", "g", "ffffffffffffffff", "1" * 40, "7fffffff", "00000000000000005", "5;a=b",
    "5;" + "x" * 5000, "5\0", "5;\n", "\u0665",
)  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """A connection's worth of bytes.

    Args:
        answered: whether there must be an answer, with an object of OpenAI's where it is an error.
    """

    words: str
    data: bytes
    answered: bool = False


def made(kind: str, seed: int) -> Sent:
    """What is sent: the same for the same kind and seed."""
    rng = random.Random(f"{kind} {seed}")
    return KINDS[kind](rng)


def message(
    path: str,
    body: bytes,
    *more: tuple[str, str],
    line: str = "POST {} HTTP/1.1",
    media: str | None = "application/json",
    length: int | str | None = 0,
) -> bytes:
    """A request.

    Args:
        more: headers, which come before the others.
        media: its type; None: no such header.
        length: what Content-Length says; 0: the truth; None: no such header.
    """
    given = {name.lower() for name, _ in more}
    lines = [line.format(path), *(f"{name}: {value}" for name, value in more)]
    if "host" not in given:
        lines.append("Host: x")
    if media is not None:
        lines.append(f"Content-Type: {media}")
    if length is not None:
        lines.append(f"Content-Length: {length or len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body


def _valid(rng: random.Random) -> tuple[str, str]:
    path, body = rng.choice(BODIES)
    return path, json.dumps(body)


def _of_json(rng: random.Random) -> Sent:
    path, text = _valid(rng)
    words, text = changed_json(rng, text) if text != "{}" else ("nothing", text)
    return Sent(f"{path} {words}", message(path, text.encode("utf-8", "surrogatepass"), CLOSE), answered=True)


def _of_fields(rng: random.Random) -> Sent:
    path, text = _valid(rng)
    more = {name: _value(rng) for name in rng.sample(KNOWN, rng.choice((1, 1, 1, 2, 3)))}
    fields = ", ".join([text[1:-1], *(f'"{name}": {value}' for name, value in more.items())]).removeprefix(", ")
    data = f"{{{fields}}}".encode("utf-8", "surrogatepass")
    return Sent(f"{path} and {str(more)[:120]}", message(path, data, CLOSE), answered=True)


def _value(rng: random.Random) -> str:
    if rng.random() < 0.8:
        return rng.choice(VALUES)
    (begin, end), depth = rng.choice(NEST), rng.choice((20, 60, 200, 450, 900))
    return begin * depth + rng.choice(("1", "{}", '"a"')) + end * depth


def _of_body(rng: random.Random) -> Sent:
    path, text = _valid(rng)
    words, data = changed_bytes(rng, text.encode())
    return Sent(f"{path} {words}", message(path, data, CLOSE), answered=True)


def _of_type(rng: random.Random) -> Sent:
    path, text = _valid(rng)
    if rng.random() < 0.5:
        media = rng.choice((None, *TYPES))
        return Sent(f"{path} as {media!r:.60}", message(path, text.encode(), media=media))
    codec = rng.choice(CODECS)
    return Sent(f"{path} in {codec}", message(path, text.encode(codec, "replace"), CLOSE), answered=True)


def _of_head(rng: random.Random) -> Sent:
    path, text = _valid(rng)
    body = text.encode()
    way = rng.randrange(6)
    if way == 0:
        target = rng.choice(TARGETS)
        verb = rng.choice(("GET", "POST", "DELETE"))
        return Sent(f"{verb} {target!r:.60}", message(target, body, line=f"{verb} {{}} HTTP/1.1"))
    if way == 1:
        verb = rng.choice(METHODS)
        return Sent(f"method {verb!r:.60} {path}", message(path, body, line=f"{verb} {{}} HTTP/1.1"))
    if way == 2:
        version = rng.choice(VERSIONS)
        return Sent(f"version {version!r} {path}", message(path, body, line=f"POST {{}} {version}"))
    if way == 3:
        flood = [(f"X-{number}", "y" * rng.choice((1, 50))) for number in range(rng.choice((50, 500, 5000)))]
        return Sent(f"{len(flood)} headers {path}", message(path, body, *flood))
    more = rng.sample(HEADERS, rng.choice((1, 1, 2)))
    length: int | None = None if rng.random() < 0.2 else 0
    verb, target = rng.choice((("POST", path), ("GET", "/v1/models"), ("GET", "/nothing"), ("POST", path + "/")))
    data = message(target, body, *more, line=f"{verb} {{}} HTTP/1.1", length=length)
    return Sent(f"{verb} {target} {str(more)[:100]} length {length}", data)


def _of_framing(rng: random.Random) -> Sent:
    path, text = _valid(rng)
    body, chunked = text.encode(), ("Transfer-Encoding", "chunked")
    media = rng.choice(("application/json", "application/json", "text/plain"))  # which is refused before the body comes
    way = rng.randrange(7)
    if way == 0:
        length: int | str = rng.choice((1, len(body) - 1, len(body) + 1, len(body) + 1000, 10**12))
        return Sent(f"{path} of {length} for {len(body)}", message(path, body, length=length, media=media))
    if way == 1:
        words, data = changed_bytes(rng, chunks(rng, body))
        return Sent(f"{path} chunks: {words}", message(path, data, chunked, length=None, media=media))
    if way == 2:
        size = rng.choice(SIZES)
        data = f"{size}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        return Sent(f"{path} a chunk of {size!r:.40}", message(path, data, chunked, length=None, media=media))
    if way == 3:  # which of the two holds is where front ends and servers differ
        length = rng.choice((len(body), 1, 4, len(chunks(rng, body))))
        data = chunks(rng, body) + b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        return Sent(f"{path} chunks and length {length}", message(path, data, chunked, length=length, media=media))
    if way == 4:
        data = message(path, body, ("Content-Length", str(rng.choice((len(body), 3)))), media=media)
        return Sent(f"{path} two lengths", data)
    if way == 5:
        trailer = rng.choice(
            (b"X: y\r\n\r\n", b"Content-Length: 3\r\n\r\n", b"X" * 70_000, b"\0\r\n\r\n", b": y\r\n\r\n")
        )
        data = chunks(rng, body).removesuffix(b"\r\n") + trailer
        return Sent(f"{path} trailer {trailer[:20]!r}", message(path, data, chunked, length=None, media=media))
    return Sent(f"{path} whole chunks", message(path, chunks(rng, body), chunked, CLOSE, length=None), answered=True)


def chunks(rng: random.Random, body: bytes) -> bytes:
    """A body in chunks of any sizes."""
    data = b""
    while body:
        size = rng.randrange(1, len(body) + 1)
        data += b"%x\r\n%b\r\n" % (size, body[:size])
        body = body[size:]
    return data + b"0\r\n\r\n"


def _of_pipeline(rng: random.Random) -> Sent:
    parts, words = [], []
    for _ in range(rng.randrange(2, 6)):
        kind = rng.choice(("json", "framing", "get", "get", "head", "noise"))
        if kind == "get":
            parts.append(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        elif kind == "noise":
            parts.append(rng.choice((b"\r\n", b"\r\n\r\n\r\n", b"\0" * 9, b"GET\r\n\r\n", b"x" * 70_000, b"0\r\n\r\n")))
        elif (data := KINDS[kind](rng).data).startswith(b"HEAD "):  # whose answer's length is not that of a body
            continue
        else:
            parts.append(data.replace(b"Connection: close\r\n", b""))
        words.append(kind)
    return Sent(" ".join(words), b"".join(parts))


def _of_raw(rng: random.Random) -> Sent:
    path, text = _valid(rng)
    data = message(path, text.encode())
    words: Sequence[str] = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        said, data = changed_bytes(rng, data)
        words = [*words, said]
    return Sent(f"{path} {'; '.join(words)}", data)


KINDS: dict[str, Callable[[random.Random], Sent]] = {
    "json": _of_json,
    "fields": _of_fields,
    "body": _of_body,
    "type": _of_type,
    "head": _of_head,
    "framing": _of_framing,
    "pipeline": _of_pipeline,
    "raw": _of_raw,
}
