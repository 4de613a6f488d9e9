"""Whether our messages are openai-harmony's."""

import re
from typing import Any

from harmony_cases import NAMES, Told

from epmoe.text.harmony import Message, Messages

SPACES = re.compile(r"\s+")


def normal(told: dict[str, Any]) -> dict[str, Any] | None:
    """Its message as we write it; None when it has a control token for a word.

    It spells control tokens in letters, and takes a content type that stands alone for a recipient.
    """
    fields = {name: None for name in ("name", "channel", "recipient", "content_type")} | told
    fields["text"] = NAMES.sub("", told["text"])
    mark, recipient, kind = "<|constrain|>", fields["recipient"] or "", fields["content_type"]
    if recipient == mark and kind is not None:
        fields["recipient"], fields["content_type"] = None, mark + kind
    elif recipient.startswith(mark) and kind is None:
        fields["recipient"], fields["content_type"] = None, recipient
    words = [fields["name"], fields["channel"], fields["recipient"], (fields["content_type"] or "").removeprefix(mark)]
    return None if any(NAMES.search(word or "") for word in words) else fields


def differences(told: Told, parser: Messages) -> tuple[list[str], int]:
    """Where our messages are not its, and how many were compared: all up to one with a control token for a word.

    (<|start|> is one too, where there was no header: here it begins the next one.)

    What was no header (no `body` here) it gives only at the beginning, where the prompt named the role: with one space
    for several and none at the ends; even when there was nothing but control tokens. Later it drops the words.
    """
    lenient = told.begun and not told.strict
    ours = [
        (message, draft.body)
        for number, (message, draft) in enumerate(zip(parser.messages(), parser.drafts, strict=True))
        if draft.body or (not number and lenient)
    ]
    found: list[str] = []
    for number, message in enumerate(told.messages):
        expected = normal(message)
        own, body = ours[0] if ours else (Message(), True)
        if expected is None or (not number and lenient and "<|start|>" in message["text"]):
            return found, number
        got = {name: getattr(own, name) for name in expected}
        if not body:
            got["text"], expected["text"] = (SPACES.sub("", each["text"]) for each in (got, expected))
        empty = not number and lenient and not expected["channel"] and not expected["text"].strip()
        if got != expected and not empty:
            found.append(f"{got} is not {expected}")
        if got == expected or not empty:
            ours = ours[1:]
    if told.whole and ours:
        found.append(f"has {[each[0] for each in ours]} too")
    return found, len(told.messages)
