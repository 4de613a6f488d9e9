"""Random answers in harmony's markup, right and wrong, as symbols: independent of any vocabulary.

A symbol is the name of a control token, a text, or an int: a byte alone. `oracle` has openai-harmony judge them.
"""

import base64
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmoe.text.tokenizer import Tokenizer

CONTROLS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>")
ENDS = CONTROLS[-3:]
NAMES = re.compile("|".join(map(re.escape, CONTROLS)))
ROLES = ("assistant", "assistant", "assistant", "user", "tool", "functions.rain", "weird", "", " assistant ")
CHANNELS = ("analysis", "commentary", "final", "final", "", " ", "fin<al", "東")
RECIPIENTS = ("", "", "", " to=functions.rain", " to=assistant", " to=", "to=a", " python", " to=a to=b")
TYPES = ("", "", "", " json", " <|constrain|>json", "<|constrain|>json", "  <|constrain|> json", "<|constrain|>")
BODIES = ("They ask.\n", " Paris", "", "naïve 東京 🙂", "{}", " a  b\n", "assistant", "<", "\u00a0x", "\ufffd")

Symbol = str | int


def split(text: str) -> list[Symbol]:
    """A text with names of control tokens as symbols."""
    return [each for each in re.split(f"({NAMES.pattern})", text) if each]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [id for each in split(text) for id in tokenizer.encode(str(each), special=False)]


def body(rng: random.Random) -> Iterator[Symbol]:
    """Text, some of it bytes that are cut anywhere, now and then a control token."""
    for _ in range(rng.randrange(4)):
        text: str = rng.choice(BODIES)
        if rng.random() < 0.3:
            data = text.encode()
            yield from data[rng.randrange(2) : len(data) - rng.randrange(2)]
        else:
            yield text
        if rng.random() < 0.05:
            yield rng.choice(CONTROLS)


def header(rng: random.Random) -> Iterator[Symbol]:
    """What stands between <|start|>, or the role of the prompt, and <|message|>."""
    recipient, kind = rng.choice(RECIPIENTS), rng.choice(TYPES)
    channel = "<|channel|>" + rng.choice(CHANNELS) if rng.random() < 0.8 else ""
    yield from split(recipient + channel + kind if rng.random() < 0.5 else channel + recipient + kind)
    if rng.random() < 0.1:
        odd: list[Symbol] = [" more", " words here", *CONTROLS, 0xC3]
        yield rng.choice(odd)


def walk(rng: random.Random) -> list[Symbol]:
    """Messages that are mostly in order; each step may be left out."""
    found: list[Symbol] = []
    for number in range(rng.randrange(1, 5)):
        if number and rng.random() < 0.95:
            found.append("<|start|>")
        if (number or rng.random() < 0.1) and rng.random() < 0.95:
            found.append(rng.choice(ROLES))
        found += header(rng)
        if rng.random() < 0.9:
            found.append("<|message|>")
        found += body(rng)
        if rng.random() < 0.9:
            found.append(rng.choice(ENDS))
    return [each for each in found if each != ""]


def noise(rng: random.Random) -> list[Symbol]:
    """No order at all."""
    texts: list[Any] = [*CONTROLS, *CONTROLS, *ROLES[:-2], *CHANNELS[:3], " to=x", " ", "東", 0xE6, 0x9D]
    return [rng.choice(texts) for _ in range(rng.randrange(30))]


def sequences(count: int, seed: int) -> Iterator[list[Symbol]]:
    """Three walks to one of noise; the same for the same seed."""
    rng = random.Random(seed)
    for number in range(count):
        yield (noise if number % 4 == 3 else walk)(rng)


@dataclass(frozen=True)
class Told:
    """What openai-harmony said of some ids.

    `prompted`: the prompt ended with <|start|>assistant; otherwise with nothing. `begun`: and the first id does not end
    that at once. `strict`: a header that <|message|> does not end is an error.
    """

    prompted: bool
    begun: bool
    strict: bool
    messages: list[dict[str, Any]]  # role, name, channel, recipient, content_type, text
    whole: bool  # it came to the end


@dataclass(frozen=True)
class Library:
    """openai-harmony and its vocabulary."""

    encoding: Any
    words: dict[bytes, int]  # without control tokens

    @classmethod
    def found(cls) -> "Library | str":
        """Or why there is none."""
        folder = os.environ.get("TIKTOKEN_ENCODINGS_BASE", "")
        file = Path(folder, "o200k_base.tiktoken")
        if not folder or not file.is_file():
            return "TIKTOKEN_ENCODINGS_BASE names no folder with o200k_base.tiktoken"
        try:
            import openai_harmony
        except ImportError:
            return "openai-harmony is not installed"
        encoding = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        return cls(encoding, {base64.b64decode(word): int(id) for word, id in lines})

    def control(self, name: str) -> int:
        (id,) = self.encoding.encode(name, allowed_special="all")
        return int(id)

    def byte(self, value: int) -> int:
        return self.words[bytes([value])]


def oracle(encoding: Any, ids: Sequence[int], *, prompted: bool, strict: bool) -> Told:
    """openai-harmony's messages, those before an error too."""
    from openai_harmony import HarmonyError, Role, StreamableParser

    parser = StreamableParser(encoding, Role.ASSISTANT if prompted else None, strict=strict)
    whole = True
    try:
        for id in ids:
            parser.process(id)
        parser.process_eos()
    except HarmonyError:
        whole = False
    found = []
    for message in parser.messages:
        fields = message.to_dict()
        (content,) = fields.pop("content")
        found.append({name: value for name, value in fields.items() if value is not None} | {"text": content["text"]})
        found[-1]["role"] = message.author.role.value
    ends = {id for name in ENDS for id in encoding.encode(name, allowed_special="all")}
    return Told(prompted, prompted and not ends & {*ids[:1]}, strict, found, whole)


def byte_ids(symbols: Sequence[Symbol], control: Callable[[str], Any], byte: Callable[[int], int]) -> list[int]:
    """Symbols as ids of a vocabulary that has every byte."""
    found: list[int] = []
    for each in symbols:
        if isinstance(each, int):
            found.append(byte(each))
        elif each in CONTROLS:
            found.append(control(each))
        else:
            found += map(byte, each.encode())
    return found
