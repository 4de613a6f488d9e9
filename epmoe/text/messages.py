"""A conversation's messages: what they must be, and the shape in which a chat template wants them.

    null values of a message are left out, as if the key had not been given
    reasoning stands under the names that templates read, whichever it came with
    content that is a list of text parts prints as their text, and is parts for a template that goes over them
    a tool call's arguments are an object where a template encodes them, a JSON text where it prints them (faces.py)

The first two are what transformers does; the others are what real clients send and what templates are written for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from epmoe.errors import UserError
from epmoe.text.faces import Arguments, Object, Parts
from epmoe.text.habits import REASONING, Habits

Message = Mapping[str, Any]


def check_conversation(origin: str, value: Any) -> None:
    """Raises UserError for what is no conversation. Other keys of a message are for its chat template to judge."""
    if not (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    ):
        raise UserError(f"{origin}: messages must be a list of objects, each with a text `role`, and not empty")
    for number, message in enumerate(value):
        _check_content(f"{origin}: messages[{number}] ({message['role']})", message)


def _check_content(place: str, message: Message) -> None:
    """Content is text, null, or a list of text parts; what a tool gave may be any value."""
    content = message.get("content")
    if content is None or isinstance(content, str) or (message["role"] == "tool" and not _looks_like_parts(content)):
        return
    if not isinstance(content, list):
        raise UserError(f"{place}: content is neither text nor a list of parts: give text")
    for number, part in enumerate(content):
        match part:
            case {"type": "text", "text": str()}:
                continue
            case {"type": str(kind)} if kind != "text":
                raise UserError(f"{place}: content[{number}] is of type {kind!r}, but only text is read: leave it out")
        raise UserError(f'{place}: content[{number}] is no part such as {{"type": "text", "text": "…"}}')


def _looks_like_parts(content: Any) -> bool:
    """Whether it is a list of parts, and not just a tool's list."""
    return isinstance(content, list) and content != [] and all(_is_part(each) for each in content)


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "type" in value


def text_of(content: Any) -> str:
    """The text of content: parts are pieces of one text, with nothing between, as templates that read parts do it."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content) if _is_texts(content) else ""


def _is_texts(content: Any) -> bool:
    """Whether it is a list of text parts and nothing else."""
    return _looks_like_parts(content) and all(
        part["type"] == "text" and isinstance(part.get("text"), str) for part in content
    )


def shaped(messages: Sequence[Message], habits: Habits) -> list[dict[str, Any]]:
    """The messages as a template with such habits wants them; the given ones stay as they are.

    Raises:
        UserError: a tool call's arguments that the template wants as an object, and that are no JSON.
    """
    return [_shaped(number, message, habits) for number, message in enumerate(messages)]


def _shaped(number: int, message: Message, habits: Habits) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if value is not None}
    result = _with_reasoning(kept, habits)
    if "content" in result:
        result["content"] = _shaped_content(result["content"], habits, tool=message.get("role") == "tool")
    if isinstance(calls := result.get("tool_calls"), list):
        place = f"messages[{number}].tool_calls"
        result["tool_calls"] = [_shaped_call(f"{place}[{i}]", call, habits) for i, call in enumerate(calls)]
    return result


def _shaped_content(content: Any, habits: Habits, *, tool: bool) -> Any:
    """A list stays one for a template that asks whether it is; else it prints as its text, too."""
    if isinstance(content, str):
        if not habits.knows_parts:  # then a loop goes over letters
            return content
        return Parts(content, [{"type": "text", "text": content}], content)
    if not (_is_texts(content) or (content == [] and not tool)) or (habits.reads_parts and habits.tests_content):
        return content
    return Parts(text_of(content), list(content), content)


def _with_reasoning(message: dict[str, Any], habits: Habits) -> dict[str, Any]:
    """Reasoning under the name `reasoning_content`, and `thinking` where none stands there.

    A template that reads `reasoning` and none of these gets it there.
    """
    found = next((message[name] for name in REASONING if name in message), None)
    if found is None:
        return message
    message = {"thinking": found, **message, "reasoning_content": found}
    if habits.reasoning == {"reasoning"}:
        message["reasoning"] = found
    return message


def _shaped_call(place: str, call: Any, habits: Habits) -> Any:
    """A tool call, with its name and arguments in `function` or in itself."""
    if not isinstance(call, dict):
        return call
    if isinstance(function := call.get("function"), dict):
        return {**call, "function": _shaped_call(f"{place}.function", function, habits)}
    arguments = call.get("arguments")
    if isinstance(arguments, dict):
        return {**call, "arguments": Object(arguments)}
    if not isinstance(arguments, str):
        return call
    text = Arguments(arguments, place)
    if habits.prints_arguments:
        return {**call, "arguments": text}
    value = text.value  # for one that asks whether it is an object
    return {**call, "arguments": Object(value) if isinstance(value, dict) else value}
