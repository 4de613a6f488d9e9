"""Instructions to a model: the key `system`, and the system's and developer's messages of a conversation.

Many templates take the first message as the instructions, whether it is the system's or the developer's, and know no
other: what stands in a second one would vanish without a word. So a conversation is rendered again with each of its
instructions changed, and refused where that changes nothing.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate
from epmoe.text.messages import Message, text_of

TURNS = ("user", "assistant", "tool", "function")  # roles of a conversation's turns; all others instruct

Render = Callable[[Sequence[Message]], str]


def rendered(
    chat: ChatTemplate, messages: Sequence[Message], system: str | None, variables: Mapping[str, Any] | None = None
) -> str:
    """The conversation as text, with all its instructions; `variables` are the template's.

    `system` becomes the first message of a conversation that has no system message. A template that would drop the
    developer's message behind it, or refuses it there, gets both in one, in this order, as the developer's.

    Raises:
        UserError: the template refuses the messages, or drops one of their instructions.
    """
    now = datetime.now()  # one moment for all that is compared

    def render(changed: Sequence[Message]) -> str:
        return chat.render(changed, now, **(variables or {}))

    names = [f"messages[{number}] ({message['role']})" for number, message in enumerate(messages)]
    if not system or any(message["role"] == "system" for message in messages):
        return _whole(render, messages, names)
    asked = [{"role": "system", "content": system}, *messages], [f"system={system!r}", *names]
    if messages[0]["role"] != "developer":
        return _whole(render, *asked)
    try:
        return _whole(render, *asked)
    except UserError:
        return _whole(render, [_merged(system, messages[0]), *messages[1:]], names)


def _merged(system: str, developer: Message) -> Message:
    words = text_of(developer.get("content"))
    return {**developer, "content": f"{system}\n\n{words}" if words else system}


def _whole(render: Render, messages: Sequence[Message], names: Sequence[str]) -> str:
    """What the template makes, once it has been seen to depend on every instruction; `names` are for the refusal.

    One more rendering tells it of all whose words stand in the text as they are, with a mark; each other one takes one.
    """
    text = render(messages)
    marks = {
        number: f"mark-{number}-{secrets.token_hex(8)}." for number, message in enumerate(messages) if _asks(message)
    }
    marked = render(_with_more(messages, marks)) if len(marks) > 1 else ""
    for number, mark in marks.items():
        if mark in marked:
            continue
        words = text_of(messages[number].get("content"))
        if render(_with_more(messages, {number: words})) == text:
            raise UserError(
                f"{names[number]}: the checkpoint's chat template drops these words: "
                "write them into the first message, or into a user's"
            )
    return text


def _asks(message: Message) -> bool:
    """Whether it is an instruction that says something: the system's, the developer's, or one by a misspelled role."""
    return message["role"] not in TURNS and text_of(message.get("content")).strip() != ""


def _with_more(messages: Sequence[Message], more: Mapping[int, str]) -> list[Message]:
    """The messages, with words added to some of them."""
    return [
        {**message, "content": f"{text_of(message.get('content'))} {more[number]}"} if number in more else message
        for number, message in enumerate(messages)
    ]
