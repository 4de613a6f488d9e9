"""openai-agents: a tool in a loop, at once and streamed, and an answer of a type; by the Responses API and by chat.

usage: agents.py URL MODEL URL MODEL     of a server whose model calls `weather`, and of one with any model
"""

import asyncio
import json
import sys
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

KINDS: Any = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}


class Town(BaseModel):
    name: str = Field(max_length=8)
    rain: Literal["much", "little", "none"]


async def one(kind: str, calling: list[str], plain: list[str]) -> dict[str, Any]:
    told = []

    @function_tool(strict_mode=kind == "chat")
    def weather(city: str) -> str:
        """Where it rains."""
        told.append(city)
        return f"rain in {city}"

    def model(url: str, name: str) -> Any:
        return KINDS[kind](name, AsyncOpenAI(base_url=url, api_key="none", max_retries=0))

    agent = Agent("forecaster", "Be brief.", model=model(*calling), tools=[weather])
    found = await Runner.run(agent, "Rain?", max_turns=2)
    more: list[Any] = [*found.to_input_list(), {"role": "user", "content": "And now?"}]
    stream = Runner.run_streamed(agent, more, max_turns=2)
    pieces = []
    async for event in stream.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            pieces.append(event.data.delta)
    settings = ModelSettings(max_tokens=100, temperature=0)
    typed = Agent("geographer", model=model(*plain), model_settings=settings, output_type=Town)
    town = (await Runner.run(typed, "A town:")).final_output
    return {
        "told": told,
        "said": found.final_output,
        "streamed": [stream.final_output, "".join(pieces)],
        "requests": found.context_wrapper.usage.requests,
        "typed": isinstance(town, Town) and town.model_dump(),
    }


async def main() -> dict[str, Any]:
    return {kind: await one(kind, sys.argv[1:3], sys.argv[3:5]) for kind in KINDS}


print(json.dumps(asyncio.run(main())))
