"""/v1/responses: a conversation of items, and the response that stands around the items of its answer.

ResponseRequest ─▶ ChatRequest ─▶ the engine's requests      what both endpoints have in common is chat's to judge
input, or that of an earlier response ─▶ messages            items.py
the answer's messages ─▶ items and events                    outputs.py
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from epmoe.engine.request import Request
from epmoe.server.errors import ApiError, refused
from epmoe.server.front import Front
from epmoe.server.openai.chat import Chat, ChatRequest
from epmoe.server.openai.fields import Sampled
from epmoe.server.openai.items import Item, listed, messages

LOGPROBS = "message.output_text.logprobs"  # of include
# Of tools that this server does not have, and of reasoning that it does not hide: they ask for nothing.
INCLUDED = frozenset({
    LOGPROBS, "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
})  # fmt: skip
# Of reasoning and text: the values that are taken; None: any, which others judge.
WITHIN: Mapping[str, tuple[str, ...] | None] = {
    "reasoning.effort": None, "reasoning.summary": ("auto",), "reasoning.generate_summary": ("auto",),
    "text.format": None, "text.verbosity": ("medium",),
}  # fmt: skip
# Chat's names of fields → those of this endpoint, for what is refused.
NAMES = {
    "response_format.json_schema": "text.format", "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens", "messages": "input",
    "reasoning_effort": "reasoning.effort", "logprobs=true": f"include={LOGPROBS}",
}  # fmt: skip


class ResponseRequest(Sampled, kw_only=True):
    """A request's body."""

    input: Any = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: list[dict[str, Any]] = msgspec.field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any] = msgspec.field(default_factory=dict)
    text: dict[str, Any] = msgspec.field(default_factory=dict)
    max_output_tokens: int | None = None
    top_logprobs: int = 0
    include: list[str] = msgspec.field(default_factory=list)
    truncation: str = "disabled"
    background: bool = False
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    user: str | None = None

    def check(self) -> None:
        """Raises ApiError for what is not served, or cannot be."""
        if self.background:
            raise refused("background", "not served: leave it out, and read the stream")
        if self.truncation != "disabled":
            raise refused("truncation", "only disabled is served: what is too long is refused")
        if self.max_tokens is not None:
            raise refused("max_tokens", "write max_output_tokens")
        if self.n not in (None, 1):
            raise refused("n", "a response has one answer")
        if self.return_token_ids:
            raise refused("return_token_ids", "not served: /v1/chat/completions has them")
        for name in self.include:
            if name not in INCLUDED:
                raise refused("include", f"{name!r} is nothing that a response has here")
        for group in ("reasoning", "text"):
            for name, value in getattr(self, group).items():
                taken = WITHIN.get(f"{group}.{name}", ())
                if value is not None and taken is not None and value not in taken:
                    raise refused(f"{group}.{name}", f"{value!r} is not served: leave it out")

    def chat(self, items: Sequence[Item]) -> ChatRequest:
        """The same as /v1/chat/completions asks for it, with this conversation.

        Raises:
            ApiError: an item or a tool that is not served.
        """
        shared = {name: getattr(self, name) for name in Sampled.__struct_fields__}
        wants = LOGPROBS in self.include
        return ChatRequest(
            **shared,
            messages=messages(self.instructions, items),
            tools=[_tool(number, each) for number, each in enumerate(self.tools)] or None,
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=self.reasoning.get("effort"),
            response_format=_format(self.text.get("format")),
            logprobs=wants,
            top_logprobs=self.top_logprobs if wants or self.top_logprobs else None,
            max_completion_tokens=self.max_output_tokens,
        )


class Response:
    """The object around an answer.

    Args:
        before: the items of the conversation that it goes on with.
        kept: whether it can be asked for afterwards.
    """

    def __init__(self, front: Front, asked: ResponseRequest, before: Sequence[Item], id: str, *, kept: bool) -> None:
        asked.check()
        self.front, self.asked, self.id, self.kept = front, asked, id, kept
        self.items = [*before, *listed(asked.input)]
        self.created = int(time.time())
        with _renamed():
            self.chat = Chat(front, asked.chat(self.items))
        self.params = front.defaults  # the request's own, once it is made

    def requests(self) -> list[Request]:
        """What the engine is asked for; raises as `Front.requests`."""
        with _renamed():
            (found,) = self.chat.requests()
        self.params = found.params
        return [found]

    def object(
        self,
        status: str,
        output: Sequence[Mapping[str, Any]] = (),
        usage: Mapping[str, Any] | None = None,
        error: ApiError | None = None,
    ) -> dict[str, Any]:
        """The response as it stands."""
        asked = self.asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": str(error)},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "model": self.front.hello.model,
            "output": list(output),
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.get("effort"), "summary": None},
            "store": self.kept,
            "temperature": self.params.temperature,
            "text": {"format": asked.text.get("format") or {"type": "text"}},
            "tool_choice": asked.tool_choice,
            "tools": asked.tools,
            "top_logprobs": asked.top_logprobs,
            "top_p": self.params.top_p,
            "truncation": asked.truncation,
            "usage": usage,
            "user": asked.user,
        }


def usage(prompt_tokens: int, cached_tokens: int, answer_tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    """Tokens, by this endpoint's names."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": prompt_tokens + answer_tokens,
    }


def _tool(number: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function as chat has it."""
    if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
        raise ApiError(400, f"tools[{number}] is no function with a name: only functions are served", param="tools")
    own = {name: tool[name] for name in ("name", "description", "parameters", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": own}


def _choice(choice: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A choice of tools as chat has it."""
    match choice:
        case {"type": "function", "name": name}:
            return {"type": "function", "function": {"name": name}}
    return choice if isinstance(choice, str) else dict(choice)


def _format(given: Any) -> dict[str, Any] | None:
    """A format of the answer as chat has it."""
    match given:
        case None:
            return None
        case {"type": "json_schema", **schema}:
            return {"type": "json_schema", "json_schema": schema}
        case dict():
            return given
    raise ApiError(400, "text.format is no object with a type", param="text.format")


@contextmanager
def _renamed() -> Iterator[None]:
    """What chat refuses, by this endpoint's names."""
    try:
        yield
    except ApiError as error:
        text = str(error)
        for name, own in NAMES.items():
            text = text.replace(name, own)
        raise ApiError(error.status, text, param=NAMES.get(error.param or "", error.param), code=error.code) from None
