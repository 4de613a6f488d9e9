"""Local: the model in this process. What was said before is in the cache when the next turn comes."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from epmoe.async_llm import AsyncLLM
from epmoe.chat.talk import Message, Show
from epmoe.config.compose import to_keys
from epmoe.config.keys import keys_of
from epmoe.config.schema import ChatConfig, LLMConfig
from epmoe.engine.request import Request
from epmoe.server.openai.spoken import Spoken
from epmoe.server.openai.usage import REASONS
from epmoe.text.delivery import Delivery


class Local:
    """Raises UserError as `AsyncLLM`."""

    def __init__(self, config: ChatConfig) -> None:
        keys: dict[str, Any] = {name: value for name, value in to_keys(config).items() if name in keys_of(LLMConfig)}
        self.llm = AsyncLLM(keys.pop("checkpoint"), **{**keys, "system": None})  # the conversation brings its own
        self.runner = asyncio.Runner()
        self.name = config.checkpoint or "epmoe-demo"

    def answer(self, messages: Sequence[Message], show: Show) -> str:
        """See `Source`."""
        return self.runner.run(self._answer(messages, show))

    def close(self) -> None:
        """See `Source`."""
        self.runner.close()
        self.llm.close()

    async def _answer(self, messages: Sequence[Message], show: Show) -> str:
        loop, fresh = asyncio.get_running_loop(), asyncio.Event()
        request = await asyncio.to_thread(self.request, messages)
        delivery = Delivery(self.llm.llm.tokenizer, request, partial(loop.call_soon_threadsafe, fresh.set))
        (part,), (call,) = delivery.parts, delivery.calls
        spoken = Spoken(part.answer.parser)
        self.llm.service.submit([call])
        try:
            completion = None
            while completion is None:
                await fresh.wait()
                fresh.clear()
                completion = delivery.take()[1]
                with delivery.lock:
                    deltas = spoken.fresh()
                for each in deltas:
                    show(each)
        finally:
            self.llm.service.abort(call)
        return "tool_calls" if spoken.calls else REASONS.get(completion.finish_reason, completion.finish_reason)

    def request(self, messages: Sequence[Message]) -> Request:
        """What the engine is asked: with all the room that there is, where nobody says how long an answer may be."""
        llm = self.llm.llm
        request = llm.request(list(messages))
        if llm.defaults.max_new_tokens is None:
            room = min(llm.architecture.max_positions, llm.cache.pages.room)
            length = max(1, room - len(request.ids))
            request = replace(request, params=replace(request.params, max_new_tokens=length))
        llm.check([request])
        return request
