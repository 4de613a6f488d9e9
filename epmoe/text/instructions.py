"""Instructions to a model: the key `system`, and the system's and developer's messages of a conversation.

Many templates take the first message as the instructions, whether it is the system's or the developer's, and know no
other: what stands in a second one would vanish without a word. So a conversation is rendered again with each of its
instructions changed, and refused where that changes nothing.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate
from epmoe.text.messages import Message, text_of

ROLES = ("system", "developer")


def rendered(chat: ChatTemplate, messages: Sequence[Message], system: str | None, **variables: Any) -> str:
    """The conversation as text, with all its instructions.

    `system` becomes the first message of a conversation that has no system message. A template that would drop the
    developer's message behind it, or refuses it there, gets both in one, in this order, as the developer's.

    Raises:
        UserError: the template refuses the messages, or drops one of their instructions.
    """
    variables["strftime_now"] = datetime.now().strftime  # one moment for all that is compared
    names = [f"messages[{number}] ({message['role']})" for number, message in enumerate(messages)]
    if system is None or any(message["role"] == "system" for message in messages):
        return _whole(chat, messages, names, variables)
    asked = [{"role": "system", "content": system}, *messages], [f"system={system!r}", *names]
    if messages[0]["role"] != "developer":
        return _whole(chat, *asked, variables)
    try:
        return _whole(chat, *asked, variables)
    except UserError:
        return _whole(chat, [_merged(system, messages[0]), *messages[1:]], names, variables)


def _merged(system: str, developer: Message) -> Message:
    words = text_of(developer.get("content"))
    return {**developer, "content": f"{system}\n\n{words}" if words else system}


def _whole(chat: ChatTemplate, messages: Sequence[Message], names: Sequence[str], variables: dict[str, Any]) -> str:
    """What the template makes, once it has been seen to depend on every instruction; `names` are for the refusal."""
    text = chat.render(messages, **variables)
    for number, (message, name) in enumerate(zip(messages, names, strict=True)):
        words = text_of(message.get("content"))
        if message["role"] not in ROLES or not words.strip():
            continue
        changed = {**message, "content": f"{words} {words}"}
        if chat.render([*messages[:number], changed, *messages[number + 1 :]], **variables) == text:
            raise UserError(
                f"{name}: the checkpoint's chat template drops these words: "
                "write them into the first message, or into a user's"
            )
    return text
