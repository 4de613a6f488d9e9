"""What a caller hands to `LLM` → prompts: one or several, texts, conversations, token ids, or objects as in a line.

"text"   [{"role": …}, …]   [1, 2, 3]   {"prompt": "text", "seed": 3}   {"messages": […], "tools": […]}
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from epmoe.config.schema import LLMConfig
from epmoe.engine.request import Request, SamplingParams
from epmoe.errors import UserError
from epmoe.text.defaults import decided
from epmoe.text.messages import Message
from epmoe.text.prompts import Prompt, encode
from epmoe.text.tokenizer import Tokenizer
from epmoe.text.variables import check_variables, configured

PromptLike = str | Sequence[Message] | Sequence[int] | Mapping[str, Any]
Prompts = PromptLike | Sequence[PromptLike]
Params = SamplingParams | Sequence[SamplingParams] | None
Conversations = Sequence[Message] | Sequence[Sequence[Message]]


def listed(prompts: Prompts) -> list[PromptLike]:
    """One prompt as a list of one; raises UserError for what is neither one nor several."""
    if not isinstance(prompts, str | Mapping | list | tuple):
        raise UserError(f"{shown(prompts)} is no prompt: give text, messages, a list of token ids, or a list of these")
    first = None if isinstance(prompts, str | Mapping) or not prompts else prompts[0]
    message = isinstance(first, Mapping) and "prompt" not in first and "messages" not in first
    if isinstance(prompts, str | Mapping) or isinstance(first, int) or message:
        one: Any = list(prompts) if isinstance(prompts, tuple) else prompts
        return [one]
    many: Any = [list(each) if isinstance(each, tuple) else each for each in prompts]
    for number, each in enumerate(many, 1):
        if not isinstance(each, str | Mapping | list):
            raise UserError(f"prompt {number}: {shown(each)} is no prompt: give text, messages or a list of token ids")
    return many


def conversations(messages: Conversations, tools: Sequence[Mapping[str, Any]] | None) -> list[PromptLike]:
    """The objects that `generate` takes for one conversation or several, each with these tools (None: no word of them).

    Raises:
        UserError: no conversation, or tools that are no list of objects.
    """
    many: Any = messages if _is_several(messages) else [messages]
    for number, each in enumerate(many, 1):
        if not isinstance(each, list | tuple):
            raise UserError(f"conversation {number}: {shown(each)} is no list of messages: give [{{'role': …}}, …]")
    own = {} if tools is None else {"tools": list(tools) if isinstance(tools, tuple) else tools}
    check_variables("chat", own)
    return [{"messages": list(each), **own} for each in many]


def _is_several(messages: Any) -> bool:
    return isinstance(messages, list | tuple) and len(messages) > 0 and not isinstance(messages[0], Mapping)


def each_of(call: str, params: Params, count: int) -> list[SamplingParams]:
    """The parameters of each of so many prompts; `call` is for messages.

    Raises:
        UserError: something that is no SamplingParams, or another number of them.
    """
    one: Any = SamplingParams() if params is None else params
    each: list[Any] = list(params) if isinstance(params, list | tuple) else [one] * count
    for wrong in (item for item in each if not isinstance(item, SamplingParams)):
        raise UserError(f"{call}: {shown(wrong)} is no SamplingParams: give one for all prompts, or one for each")
    if len(each) != count:
        raise UserError(f"{len(each)} SamplingParams for {count} prompts: give one for all, or one for each")
    return each


def encoded(
    prompts: Sequence[PromptLike], params: Sequence[SamplingParams], tokenizer: Tokenizer, config: LLMConfig
) -> list[Request]:
    """The requests, as `config` says of chat template, system message and variables; with seeds, drawn where needed.

    Raises:
        UserError: with the prompt's number, what `Prompt` and `encode` refuse, and what is no prompt.
    """
    found, given = [], configured(config)
    for number, (prompt, each) in enumerate(zip(prompts, params, strict=True), 1):
        origin = f"prompt {number}"
        if isinstance(prompt, str | Mapping) or (prompt and isinstance(prompt[0], Mapping)):
            content: Any = prompt
            is_object = isinstance(prompt, Mapping)
            text = Prompt.of(origin, content, each) if is_object else Prompt(origin, content, each)
            ids, each = encode(text, tokenizer, config.chat, config.system, given), text.params
        else:
            given_ids: Sequence[Any] = prompt
            if not set(map(type, given_ids)) <= {int} or min(given_ids, default=0) < 0:
                raise UserError(f"{origin} is no text, no messages and no list of token ids: give one of them")
            ids = list(given_ids)
        found.append(Request(tuple(ids), decided(origin, each, draw=True)))
    return found


def shown(value: object) -> str:
    """A value and what it is, for a message."""
    return f"{value!r} ({type(value).__name__})"


def digest(value: Any) -> str:
    """Of anything that JSON can hold; eight characters, for messages about calls that differ."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:8]
