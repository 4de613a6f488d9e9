"""langchain-openai: a tool and its result, at once and streamed, answers of a type, completions; chat and Responses.

usage: langchain.py URL MODEL URL MODEL     of a server whose model calls `weather`, and of one with any model
"""

import json
import sys
from typing import Any, Literal

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field, create_model


class Town(BaseModel):
    """A town and its weather."""

    name: str = Field(max_length=8)
    rain: Literal["much", "little", "none"]


@tool
def weather(city: str) -> str:
    """Where it rains."""
    return f"rain in {city}"


def chat(url: str, name: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, model=name, api_key="none", max_retries=0, **more)


def one(calling: list[str], plain: list[str], **more: Any) -> dict[str, Any]:
    bound = chat(*calling, **more).bind_tools([weather])
    begun: list[Any] = [HumanMessage("Rain?")]
    call = bound.invoke(begun)
    (asked,) = call.tool_calls
    results: list[Any] = [ToolMessage(weather.invoke(asked["args"]), tool_call_id=asked["id"])]
    whole: Any = AIMessageChunk("")
    for piece in bound.stream(begun):
        whole += piece
    said = bound.invoke([*begun, call, *results])
    pieces = [piece.text for piece in bound.stream([*begun, call, *results])]
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 100, **more}
    typed = chat(*plain, **settings).with_structured_output(Town, method="json_schema")
    town = typed.invoke("A town:")
    place = create_model("weather", city=(str, ...))  # all that this model calls
    forced = chat(*calling, **settings).with_structured_output(place, method="function_calling").invoke("Rain?")
    return {
        "called": [asked["name"], asked["args"]],
        "streamed call": [whole.tool_calls[0]["name"], whole.tool_calls[0]["args"]],
        "said": said.text,
        "streamed": "".join(pieces),
        "tokens": said.usage_metadata["output_tokens"],
        "typed": isinstance(town, Town) and town.model_dump(),
        "forced": isinstance(forced, place) and forced.model_dump(),
    }


def main() -> dict[str, Any]:
    calling, plain = sys.argv[1:3], sys.argv[3:5]
    found: dict[str, Any] = {
        "chat": one(calling, plain),
        "responses": one(calling, plain, use_responses_api=True),
    }
    text = OpenAI(base_url=plain[0], model=plain[1], api_key="none", max_retries=0, temperature=0, max_tokens=12)
    found["completions"] = [text.invoke("He said"), "".join(text.stream("He said")), *text.batch(["He said", "In the"])]
    return found


print(json.dumps(main()))
