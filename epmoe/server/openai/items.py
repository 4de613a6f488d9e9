"""Input items of /v1/responses → a conversation's messages, as the chat template takes them.

    message                user, system, developer, assistant: a message each, its parts as one text
    reasoning              of the assistant's next message, or call
    function_call          a call in the assistant's message; calls that follow each other stand in one
    function_call_output   a message of the tool

Reasoning, words and a call behind each other become the words and then reasoning with the call: templates know no
message that has all three.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from epmoe.server.errors import ApiError
from epmoe.text.harmony import BETWEEN_MESSAGES

Item = Mapping[str, Any]
Message = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
INSTRUCT = ("system", "developer")
TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")  # types of parts


def listed(given: Any) -> list[Item]:
    """A request's `input`, text or items, as items.

    Raises:
        ApiError: it is neither, or empty.
    """
    if isinstance(given, str) and given:
        return [{"type": "message", "role": "user", "content": given}]
    if isinstance(given, list) and given and all(isinstance(each, dict) for each in given):
        return given
    raise ApiError(400, "input is neither text nor a list of items, or is empty", param="input")


def messages(instructions: str | None, items: Sequence[Item]) -> list[Message]:
    """The conversation of these items; `instructions` go before it, into its first message where that instructs, too.

    Raises:
        ApiError: an item that is not served, or damaged; it names the item by its number.
    """
    turns = _Turns()
    for number, item in enumerate(items):
        turns.add(f"input[{number}]", item)
    turns.rest()
    found = turns.messages
    if not instructions:
        return found
    if found and found[0]["role"] in INSTRUCT:
        return [{**found[0], "content": f"{instructions}{BETWEEN_MESSAGES}{found[0]['content']}"}, *found[1:]]
    return [{"role": "system", "content": instructions}, *found]


class _Turns:
    """Messages so far."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.names: dict[str, str] = {}  # of functions, by their calls' ids
        self.reasoning = ""  # of the message to come

    def add(self, place: str, item: Item) -> None:
        """Take the next item; `place` names it."""
        match item:
            case {"type": "reasoning"}:
                self._reason(place, item)
            case {"type": "function_call", "call_id": str(id), "name": str(name), "arguments": str(arguments)}:
                self.names[id] = name
                self._call({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
            case {"type": "function_call_output", "call_id": str(id), "output": output}:
                if id not in self.names:
                    raise _wrong(f"{place}: no function_call before it has the call_id {id!r}")
                self.rest()
                content = _text(f"{place}.output", output)
                self.messages.append({"role": "tool", "tool_call_id": id, "name": self.names[id], "content": content})
            case {"type": "function_call" | "function_call_output" as kind}:
                needs = "name and arguments, as text" if kind == "function_call" else "output"
                raise _wrong(f"{place}: a {kind} needs call_id, {needs}")
            case {"role": str(role), "content": content} if item.get("type") in (None, "message"):
                if role not in ROLES:
                    raise _wrong(f"{place}: role {role!r} is none of {', '.join(ROLES)}")
                self._message(role, _text(f"{place}.content", content))
            case {"type": str(kind)} if kind != "message":
                served = "message, reasoning, function_call and function_call_output"
                raise _wrong(f"{place} is of type {kind!r}, and only {served} are served")
            case _:
                raise _wrong(f"{place} is no item: a message has a role and content")

    def rest(self) -> None:
        """Reasoning that nothing of the assistant's follows: the answer was cut within it."""
        if self.reasoning:
            self._message("assistant", "")

    def _message(self, role: str, text: str) -> None:
        if role != "assistant":
            self.rest()
        self.messages.append({"role": role, "content": text, **self._thought()})

    def _call(self, call: Message) -> None:
        last = self.messages[-1] if self.messages and self.messages[-1]["role"] == "assistant" else None
        thought = self._thought()
        if last is None or thought:
            self.messages.append({"role": "assistant", **thought, "tool_calls": [call]})
        elif "tool_calls" in last:
            last["tool_calls"].append(call)
        elif "reasoning_content" in last:
            moved = last.pop("reasoning_content")
            if not last["content"]:
                self.messages.pop()
            self.messages.append({"role": "assistant", "reasoning_content": moved, "tool_calls": [call]})
        else:
            last["tool_calls"] = [call]

    def _reason(self, place: str, item: Item) -> None:
        given = item.get("content") or item.get("summary") or []
        if not given and item.get("encrypted_content"):
            raise _wrong(f"{place}: encrypted reasoning is another server's: leave the item out")
        text = _text(f"{place}.content", given)
        self.reasoning += (BETWEEN_MESSAGES if self.reasoning and text else "") + text

    def _thought(self) -> Message:
        found, self.reasoning = self.reasoning, ""
        return {"reasoning_content": found} if found else {}


def _text(place: str, content: Any) -> str:
    """Text, or a list of parts that are text, as one."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(f"{place} is neither text nor a list of parts")
    found = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise _wrong(f"{place}[{number}] is no part with a type")
        if kind not in TEXTS:
            raise _wrong(f"{place}[{number}] is of type {kind!r}: only text is read")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise _wrong(f"{place}[{number}] has no text")
        found.append(text)
    return "".join(found)


def _wrong(text: str) -> ApiError:
    return ApiError(400, text, param="input")
