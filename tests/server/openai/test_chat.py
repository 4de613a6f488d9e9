"""Chat on a model that says what it was written to: channels, calls of tools, what the template is told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from conversations import WEATHER
from scripted import scripted
from served import Server, served

from epmoe.server.errors import ApiError
from epmoe.server.openai.chat import ChatRequest
from epmoe.server.openai.fields import typed

CALL = (
    "t", "<|channel|>", "commentary to=functions.weather ", "<|constrain|>", "json", "<|message|>",
    '{"city"', ': "Ul', 'm"}', "<|call|>",
)  # fmt: skip
THOUGHT = ("t", "<|channel|>", "analysis", "<|message|>", "They ask", " for rain.", "<|end|>")
TEMPLATE = (
    "{%- if tools %}{{- '<|start|>developer<|message|>' + tools[0].function.name + '<|end|>' }}{%- endif %}"
    "{%- if reasoning_effort is defined %}{{- reasoning_effort }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}{{- '<|start|>assistant' }}"
)
USER: Any = [{"role": "user", "content": "Rain?"}]
TOOLS: Any = [WEATHER]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat")


def written(folder: Path, chain: tuple[str, ...]) -> Path:
    path = scripted(folder / "checkpoint", chain)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with served(folder / "run", f"checkpoint={written(folder, CALL)}", "sampling=greedy", forked=True) as one:
        assert one.model == "checkpoint"
        yield one


def test_a_call_of_a_tool(server: Server) -> None:
    asked: dict[str, Any] = {"model": server.model, "messages": USER, "tools": TOOLS, "tool_choice": "auto"}
    found = server.client().chat.completions.create(**asked)
    (choice,) = found.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or [None]
    assert call is not None and call.type == "function"
    assert call.function.name == "weather" and call.function.arguments == '{"city": "Ulm"}'
    chunks = [each.choices[0] for each in server.client().chat.completions.create(**asked, stream=True)]
    deltas = [call for each in chunks for call in each.delta.tool_calls or ()]
    assert [each.index for each in deltas] == [0] * len(deltas)
    assert deltas[0].id and deltas[0].function and deltas[0].function.name == "weather"
    assert "".join(each.function.arguments or "" for each in deltas if each.function) == '{"city": "Ulm"}'
    assert [each.finish_reason for each in chunks if each.finish_reason] == ["tool_calls"]
    with server.client().chat.completions.stream(**asked) as stream:  # the client puts them together
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls and final.tool_calls[0].function.arguments == '{"city": "Ulm"}'
    cut = server.client().chat.completions.create(**asked, max_tokens=6)
    assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.tool_calls
    assert cut.choices[0].message.tool_calls[0].function.arguments == '{"city"'


def test_what_the_template_is_told(server: Server) -> None:
    """Tools unless the choice is none; the effort; nothing that it does not read."""

    def tokens(**more: Any) -> list[int]:
        status, found, _ = server.ask("/tokenize", {"messages": USER, **more})
        assert status == 200, found
        ids: list[int] = found["tokens"]
        return ids

    plain = tokens()
    assert len(tokens(tools=TOOLS)) > len(plain) == len(tokens(tools=TOOLS, tool_choice="none"))
    assert len(tokens(reasoning_effort="high")) == len(tokens(chat_template_kwargs={"reasoning_effort": "high"}))
    assert len(tokens(reasoning_effort="high")) == len(plain) + 4
    for wrong, says in (
        ({"chat_template_kwargs": {"colour": "red"}}, "colour"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"max_tokens": 3}}, "chat_template_kwargs"),
        ({"tools": [{"type": "web_search"}]}, r"tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
    ):
        for path in ("/tokenize", "/v1/chat/completions"):
            status, answer, _ = server.ask(path, {"messages": USER, **wrong})
            assert status == 400 and says in answer["error"]["message"], answer


def test_reasoning_has_both_names(folder: Path) -> None:
    with served(folder / "thought", f"checkpoint={written(folder, THOUGHT)}", "sampling=greedy", forked=True) as one:
        body = {"messages": USER, "max_tokens": 6}
        message = one.ask("/v1/chat/completions", body)[1]["choices"][0]["message"]
        assert message["reasoning"] == message["reasoning_content"] == "They ask for rain."
        assert message["content"] == "" and "tool_calls" not in message
        text = one.ask("/v1/chat/completions", {**body, "stream": True})[1]
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        deltas = [each["choices"][0]["delta"] for each in chunks if each["choices"]]
        for name in ("reasoning", "reasoning_content"):
            assert "".join(each.get(name, "") for each in deltas) == "They ask for rain."
        with pytest.raises(openai.NotFoundError):
            one.client().chat.completions.create(model="else", messages=USER)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
    ],
)
def test_refused_before_anything_is_asked(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        typed(body, ChatRequest).check()
    assert caught.value.status == 400 and caught.value.param == param
