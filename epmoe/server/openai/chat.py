"""/v1/chat/completions: a conversation through the checkpoint's chat template, and its answer by channels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from epmoe.engine.request import Request, TokenLogprobs
from epmoe.server.errors import ApiError
from epmoe.server.front import Front
from epmoe.server.openai.fields import Sampled
from epmoe.server.openai.spoken import CALL, CONTENT, Delta, Spoken
from epmoe.server.openai.structured import Offer, Structure, form, offer
from epmoe.server.openai.usage import REASONS, chat_logprobs
from epmoe.text.completion import Choice
from epmoe.text.delivery import Delivery, Piece
from epmoe.text.prompts import KEYS

MOST_TOP = 20  # of top_logprobs, as OpenAI has it


class ChatRequest(Sampled, kw_only=True):
    """A request's body."""

    messages: list[dict[str, Any]] = msgspec.field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None

    def check(self) -> None:
        """Raises ApiError for what is not served, or cannot be."""
        form(self, self.response_format)
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_TOP:
            raise ApiError(400, f"top_logprobs takes a number from 0 to {MOST_TOP}", param="top_logprobs")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", param="max_tokens")
        for number, tool in enumerate(self.tools or ()):
            match tool:
                case {"type": "function", "function": {"name": str()}}:
                    continue
            raise ApiError(400, f"tools[{number}] is no function with a name: only functions are served", param="tools")
        self.offer()

    def offer(self) -> Offer:
        """The tools that may be called; raises ApiError for a choice that cannot be."""
        return offer(self.tools or (), self.tool_choice, several=self.parallel_tool_calls)

    def conversation(self) -> dict[str, Any]:
        """The prompt, as `LLM.generate` takes it, with variables for the template."""
        own = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            own["reasoning_effort"] = self.reasoning_effort
        if self.tools and self.tool_choice != "none":
            own["tools"] = self.tools
        for name in own.keys() & set(KEYS):  # of a request, and no variables of a template
            raise ApiError(400, f"chat_template_kwargs cannot have {name}", param="chat_template_kwargs")
        return {**own, "messages": self.messages}


class Chat:
    """What /v1/chat/completions makes of an answer."""

    echo: ClassVar = False
    prefix: ClassVar = "chatcmpl-"
    whole: ClassVar = "chat.completion"
    part: ClassVar = "chat.completion.chunk"

    def __init__(self, front: Front, asked: ChatRequest) -> None:
        self.front, self.asked = front, asked
        self.spoken: dict[int, Spoken] = {}  # by answer
        asked.check()
        self.form = form(asked, asked.response_format)

    def requests(self) -> list[Request]:
        asked, structure = self.asked, Structure(self.form, self.asked.offer())
        given = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
        length = given if given is not None else self.front.defaults.max_new_tokens
        logprobs = max(1, asked.top_logprobs or 0) if asked.logprobs else 0
        params = asked.params(self.front.defaults, max_new_tokens=length, logprobs=logprobs)
        found = self.front.requests([asked.conversation()], params, length, chat=True)
        return structure.bind(self.front.tokenizer, found)

    def opening(self, number: int, delivery: Delivery, index: int) -> dict[str, Any] | None:
        """What comes before the first token."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, number: int, delivery: Delivery, piece: Piece) -> list[dict[str, Any]]:
        """What a piece of an answer adds: a chunk for each kind of text; the first one has the tokens."""
        deltas = [_delta(each) for each in self._spoken(delivery, piece.index).fresh()]
        more = {"logprobs": self._logprobs(piece.ids, piece.logprobs), **self.asked.ids(piece.ids)}
        if any(more.values()):
            deltas = deltas or [{}]
        return [{"delta": each, **(more if not at else {"logprobs": None})} for at, each in enumerate(deltas)]

    def closing(self, reason: str, delivery: Delivery, index: int) -> dict[str, Any]:
        """The last of an answer in a stream."""
        return {"delta": {}, "logprobs": None, "finish_reason": self._reason(reason, self._spoken(delivery, index))}

    def choice(self, number: int, delivery: Delivery, choice: Choice) -> dict[str, Any]:
        """An answer at once."""
        spoken = self._spoken(delivery, choice.index)
        message = spoken.message()
        logprobs = self._logprobs(choice.ids, choice.logprobs)
        reason = self._reason(choice.finish_reason, spoken)
        return {"message": message, "logprobs": logprobs, "finish_reason": reason, **self.asked.ids(choice.ids)}

    def _logprobs(self, ids: Sequence[int], found: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not (self.asked.logprobs and ids):
            return None
        return chat_logprobs(self.front.tokenizer, ids, found, self.asked.top_logprobs or 0)

    def _spoken(self, delivery: Delivery, index: int) -> Spoken:
        if index not in self.spoken:
            parser = delivery.parts[index].answer.parser
            several, alone = self.asked.parallel_tool_calls, self.form is not None
            self.spoken[index] = Spoken(parser, several=several, alone=alone)
        return self.spoken[index]

    @staticmethod
    def _reason(reason: str, spoken: Spoken) -> str:
        return "tool_calls" if spoken.calls and reason in ("eos", "stop") else REASONS[reason]


def _delta(each: Delta) -> dict[str, Any]:
    if each.kind == CONTENT:
        return {"content": each.text}
    if each.kind != CALL:
        return {"reasoning": each.text, "reasoning_content": each.text}
    begins = {} if each.id is None else {"id": each.id, "type": "function"}
    function = {"arguments": each.text} if each.name is None else {"name": each.name, "arguments": each.text}
    return {"tool_calls": [{"index": each.index, **begins, "function": function}]}
