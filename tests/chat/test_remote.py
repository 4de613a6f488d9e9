"""Remote: a server's stream, and servers that are none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answering import answering
from conversations import WEATHER
from served import Server, served

from epmoe.chat.remote import Remote, deltas, fields
from epmoe.config.compose import parse
from epmoe.config.schema import ChatConfig
from epmoe.errors import UserError
from epmoe.server.openai.spoken import CALL, CONTENT, REASONING, Delta

USER: list[dict[str, Any]] = [{"role": "user", "content": "In the days"}]
KEY = "s3cret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("remote") / "run", env={"EPMOE_API_KEY": KEY}, forked=True) as one:
        yield one


def remote(port: int, *keys: str) -> Remote:
    return Remote(parse([f"base_url=http://127.0.0.1:{port}/v1/", *keys], ChatConfig))


def test_a_server_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"API key.*401"):
        remote(server.port)
    monkeypatch.setenv("EPMOE_API_KEY", KEY)
    found, said = remote(server.port, "max_tokens=8", "sampling.temperature=0"), list[Delta]()
    assert found.name == server.model and found.answer(USER, said.append) == "length"
    body = {"messages": USER, "max_tokens": 8, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    whole = server.ask("/v1/chat/completions", body, headers)[1]["choices"][0]["message"]["content"]
    assert "".join(each.text for each in said) == whole and {each.kind for each in said} == {CONTENT}
    with pytest.raises(UserError, match="no model 'x'"):
        remote(server.port, "model=x").answer(USER, said.append)
    with pytest.raises(UserError, match="content"):
        found.answer([{"role": "user", "content": 3}], said.append)


def test_what_is_stopped_ends_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPMOE_API_KEY", KEY)
    found = remote(server.port, "max_tokens=400", "sampling.ignore_eos=true")

    def stop(_: Delta) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found.answer(USER, stop)
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(400):
        text = server.ask("/metrics", headers=headers)[1]
        if "\nepmoe_requests_running 0.0" in text and "\nepmoe_cache_usage_ratio 0.0" in text:
            break
    (count,) = (line.split()[1] for line in text.splitlines() if line.startswith("epmoe_completion_tokens_total"))
    assert float(count) < 300


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 200, "before the answer's end"),
        (b'data: {"choices": []}\n\n', 200, "before the answer's end"),
        (b'data: {"error": {"message": "no room"}}\n\n', 200, "no room"),
        (b'{"error": {"message": "too long"}}', 400, r"too long \(HTTP 400\)"),
        (b"<html>", 502, "HTTP 502"),
        (b'{"error": "x"}', 404, "x"),
    ],
)
def test_servers_that_fail(body: bytes, status: int, says: str) -> None:
    with answering(body, status) as port, pytest.raises(UserError, match=says):
        remote(port, "model=m").answer(USER, lambda _: None)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"data": []}', b'{"data": [{}]}'])
def test_servers_without_models(body: bytes) -> None:
    with answering(body) as port, pytest.raises(UserError, match="name one with model="):
        remote(port)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "localhost:8000", "http://x:y/v1", "http://x:99999/v1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match="is no address"):
        Remote(parse([f"base_url={url}", "model=m"], ChatConfig))


def test_nobody_listens() -> None:
    with answering(b"") as port:
        pass
    with pytest.raises(UserError, match="does not answer"):
        remote(port)


def test_fields_are_what_was_given(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    assert fields(parse(["base_url=http://x/v1"], ChatConfig)) == {}
    keys = ("sampling.temperature=0", "sampling.stop=a", "max_tokens=3", "reasoning_effort=low", "template.budget=5")
    assert fields(parse([*keys, f"tools={tmp_path / 'tools.json'}", "sampling.ignore_eos=true"], ChatConfig)) == {
        "temperature": 0.0, "stop": ("a",), "max_tokens": 3, "reasoning_effort": "low", "tools": [WEATHER],
        "chat_template_kwargs": {"budget": 5}, "ignore_eos": True,
    }  # fmt: skip


def test_chunks_of_others() -> None:
    """Reasoning under either name, and calls."""
    assert [*deltas({"reasoning_content": "a", "content": "b"})] == [Delta(REASONING, "a"), Delta(CONTENT, "b")]
    call = {"index": 1, "id": "c", "function": {"name": "f", "arguments": None}}
    assert [*deltas({"reasoning": "a", "tool_calls": [call]})] == [Delta(REASONING, "a"), Delta(CALL, "", 1, "c", "f")]
    assert [*deltas({"role": "assistant", "content": None})] == []
