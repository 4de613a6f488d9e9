"""A request for a response: what it asks chat for, what is refused; docs/serving.md names its fields."""

from pathlib import Path
from typing import Any

import pytest

from epmoe.server.errors import ApiError
from epmoe.server.openai.chat import ChatRequest
from epmoe.server.openai.fields import Sampled, typed
from epmoe.server.openai.items import listed
from epmoe.server.openai.responses import WITHIN, ResponseRequest

DOCS = Path(__file__).resolve().parents[3] / "docs" / "serving.md"
SCHEMA = {"type": "object", "properties": {"town": {"type": "string"}}}


def chat(**body: Any) -> ChatRequest:
    asked = typed({"input": "Rain?", **body}, ResponseRequest)
    asked.check()
    return asked.chat(listed(asked.input))


def test_it_asks_chat_for_the_same() -> None:
    found = chat(
        instructions="Be brief.", temperature=0.5, top_k=3, seed=4, stop=["x"], max_output_tokens=9, stream=True,
        reasoning={"effort": "high", "summary": "auto"}, parallel_tool_calls=False, top_logprobs=2,
        include=["message.output_text.logprobs", "reasoning.encrypted_content"], priority=1,
        tools=[{"type": "function", "name": "rain", "parameters": SCHEMA, "strict": True, "description": None}],
        tool_choice={"type": "function", "name": "rain"},
        text={"format": {"type": "json_schema", "name": "t", "schema": SCHEMA, "strict": True}, "verbosity": "medium"},
    )  # fmt: skip
    expected = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}],
        "temperature": 0.5, "top_k": 3, "seed": 4, "stop": ["x"], "max_completion_tokens": 9, "stream": True,
        "reasoning_effort": "high", "parallel_tool_calls": False, "logprobs": True, "top_logprobs": 2, "priority": 1,
        "tools": [{"type": "function", "function": {"name": "rain", "parameters": SCHEMA, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "rain"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA, "strict": True}},
    }  # fmt: skip
    assert found == typed(expected, ChatRequest)


def test_defaults_are_chats() -> None:
    expected = {"messages": [{"role": "user", "content": "Rain?"}], "tool_choice": "auto"}
    assert chat() == typed(expected, ChatRequest)


@pytest.mark.parametrize("name", sorted(WITHIN))
def test_of_groups_what_asks_for_nothing_is_taken(name: str) -> None:
    group, leaf = name.split(".")
    for value in (None, *(WITHIN[name] or ())):
        chat(**{group: {leaf: value}})
    with pytest.raises(ApiError) as caught:
        chat(**{group: {"other": 1}})
    assert caught.value.param == f"{group}.other"


def test_the_document_names_every_field() -> None:
    section = DOCS.read_text().partition("\n## Responses\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [name.strip(" `") for row in rows for name in row.split(",")]
    assert sorted(named) == sorted({*ResponseRequest.__struct_fields__} - {*Sampled.__struct_fields__})
