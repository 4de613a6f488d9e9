"""The harmony markup of gpt-oss: its control tokens, and what the header of a message says.

    <|start|>assistant to=functions.rain<|channel|>commentary <|constrain|>json<|message|>{"town":"Ulm"}<|call|>
             ^role     ^recipient                  ^channel   ^content type            ^body

The recipient may stand behind the channel too, and the content type without <|constrain|>. Who is none of the roles is
a tool, by its name: `functions.rain to=assistant`. Source: openai/harmony, docs/format.md and src/encoding.rs.

A header comes here as a string in which <|channel|> and <|constrain|> are CHANNEL and CONSTRAIN, two lone surrogates:
no decoder gives those, so that a model which spells a token's name in letters has written letters.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

CHANNEL, CONSTRAIN = "\ud800", "\ud801"
ROLES = ("user", "assistant", "system", "developer", "tool")

# Unicode's White_Space. Python's has four more, and its `split` takes all of them, where harmony takes ASCII's.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_CHANNEL = re.compile(f"{CHANNEL}([^<{CHANNEL}{CONSTRAIN}{_SPACE}]*)")
_FIRST_WORD = re.compile(f"[{_SPACE}]*([^{CHANNEL}{CONSTRAIN}{_SPACE}]+)(?=[{CONSTRAIN}{_SPACE}]|\\Z)")
_BEFORE_TYPE = re.compile(f"{CONSTRAIN}[{_SPACE}]*")
_WORD = re.compile("[^ \t\n\f\r]+")
_CONTROL = re.compile(f"[{CHANNEL}{CONSTRAIN}]")


@dataclass(frozen=True)
class Markup:
    """The ids of harmony's control tokens in one vocabulary."""

    start: int
    channel: int
    message: int
    constrain: int | None
    ends: frozenset[int]  # <|end|>, <|return|>, <|call|>: those that there are

    @classmethod
    def of(cls, id_of: Callable[[str], int | None]) -> "Markup | None":
        """None for a vocabulary without <|start|>, <|channel|> or <|message|>."""
        start, channel, message = (id_of(f"<|{name}|>") for name in ("start", "channel", "message"))
        if start is None or channel is None or message is None:
            return None
        ends = (id_of(f"<|{name}|>") for name in ("end", "return", "call"))
        return cls(start, channel, message, id_of("<|constrain|>"), frozenset(id for id in ends if id is not None))

    @property
    def ids(self) -> frozenset[int]:
        """All of them."""
        others = {self.start, self.channel, self.message}
        return self.ends | others | (set() if self.constrain is None else {self.constrain})


@dataclass(frozen=True)
class Header:
    """What a header says of its message."""

    role: str = "assistant"
    name: str | None = None  # of a tool
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None  # with <|constrain|> in front where the model wrote it

    @property
    def is_answer(self) -> bool:
        """Whether the message is the assistant's answer to the user.

        That is one in the channel `final`, or without channel and recipient, as plain text is. It is neither analysis
        nor commentary: a call of a tool, or a word before it.
        """
        plain = self.channel is None and self.recipient is None
        return self.role == "assistant" and (self.channel == "final" or plain)


def parse(text: str, role: str | None) -> Header | None:
    """What a header says that <|message|> has ended; None when it is no header.

    Args:
        role: that is known already; None: the first word says it.
    """
    channel = _CHANNEL.search(text)
    if channel:
        text = text[: channel.start()] + text[channel.end() :]
    words: list[str] = _WORD.findall(_BEFORE_TYPE.sub(f" {CONSTRAIN}", text.strip(_SPACE)))
    name = None
    if role is None:
        first = words[0] if words else ""
        role = first if first in ROLES else "tool"
        if first != role:
            if len(words) < 2 and not first.startswith("to="):
                return None
            words = words[1:]
        name = first if role == "tool" else None
    if words[:1] == [role]:
        words = words[1:]
    content_type = recipient = None
    if words and (words[-1].startswith(CONSTRAIN) or (len(words) == 2 and not words[-1].startswith("to="))):
        content_type = words.pop()
    if words:
        recipient = words.pop().removeprefix("to=")
    plain = "".join((name or "", recipient or "", (content_type or "").removeprefix(CONSTRAIN)))
    if words or _CONTROL.search(plain) or (channel and not channel[1]):
        return None
    if content_type:
        content_type = content_type.replace(CONSTRAIN, "<|constrain|>")
    return Header(role, name, channel[1] if channel else None, recipient, content_type)


def salvage(text: str, role: str | None, prompt: int) -> tuple[Header, str]:
    """What can be read of something that is no header after all, and its other words, which are the message's text.

    Role and channel are read as in a header. Nothing else is taken away, spaces included.

    Args:
        prompt: so many characters at the beginning were the prompt's and are no text of the answer.
    """
    channel = _CHANNEL.search(text)
    if channel:
        text, prompt = _drop(text, prompt, channel.span())
    first = _FIRST_WORD.match(text)
    if first and (first[1] == role or (role is None and first[1] in ROLES)):
        role = first[1]
        text, prompt = _drop(text, prompt, first.span())
    header = Header(role or "assistant", channel=(channel[1] or None) if channel else None)
    return header, _CONTROL.sub("", text[prompt:])


def _drop(text: str, prompt: int, span: tuple[int, int]) -> tuple[str, int]:
    """Text without a span, and how many of its first `prompt` characters are left."""
    begin, end = span
    return text[:begin] + text[end:], prompt - max(0, min(prompt, end) - begin)
