"""Text ↔ token ids: tokenizer.json, the chat template, and text that comes out while ids come in.

    prompt ──ChatTemplate.render──▶ text ──Tokenizer.encode──▶ ids
    id ──TextStream.feed──▶ piece ──StopStrings.feed──▶ piece to print

Special tokens are not text and are left out. In the harmony format of gpt-oss an answer is a row of messages,

    <|channel|>analysis<|message|> … <|end|><|start|>assistant<|channel|>final<|message|> … <|return|>

of which the bodies are text: what stands between <|start|> or <|channel|> and <|message|> is a header and left out too,
and a blank line separates two bodies.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from epmoe.checkpoint import Checkpoint
from epmoe.errors import UserError

HEADER_BEGINS, HEADER_ENDS = ("<|start|>", "<|channel|>"), "<|message|>"
BETWEEN_MESSAGES = "\n\n"
REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character, or not one yet


class ChatTemplate:
    """A checkpoint's jinja template, in the environment that transformers gives to chat templates.

    Templates come with checkpoints from strangers, hence the sandbox.

    Args:
        special: bos_token, eos_token and the like, which templates may use as variables.
    Raises:
        UserError: the template is no valid jinja.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.special = dict(special)
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the checkpoint's chat template is no valid jinja ({error}): use chat=off") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation as text, up to where the assistant begins to answer.

        Raises:
            UserError: the template refuses the messages.
        """
        values = {"tools": None, "documents": None, "add_generation_prompt": True, **self.special, **variables}
        try:
            return self.template.render(messages=list(messages), **values)
        except Exception as error:  # a template is a program of a stranger: it may raise anything
            raise UserError(f"the checkpoint's chat template refuses the messages: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class Tokenizer:
    """tokenizer.json and what stands beside it.

    Raises:
        UserError: the checkpoint has no tokenizer.json, or one that cannot be read.
    """

    def __init__(self, file: Path, chat_template: str | None = None, special: Mapping[str, str] | None = None) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{file} cannot be read as a tokenizer ({error}): download it again") from error
        # Settings for training batches, which some checkpoints leave in the file.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.chat = None if chat_template is None else ChatTemplate(chat_template, special or {})
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        ends = self.tokenizer.token_to_id(HEADER_ENDS)
        begins = [self.tokenizer.token_to_id(name) for name in HEADER_BEGINS]
        harmony = ends is not None and None not in begins
        self.header_ends = ends if harmony else None
        self.header_begins = frozenset(begins if harmony else ())

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """The tokenizer of a checkpoint."""
        if checkpoint.tokenizer_file is None:
            raise UserError(f"checkpoint {checkpoint.path} has no tokenizer.json: download it beside the weights")
        return cls(checkpoint.tokenizer_file, checkpoint.chat_template, _special_tokens(checkpoint.tokenizer_config))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special` lets the tokenizer add what it puts around a plain text. A template brings its own.

        Raises:
            UserError: half of a surrogate pair, which JSON's \\u escapes can spell and no text encoding can.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text has a lone surrogate (character {error.start}): remove it") from error
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids as they are, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{bos_token: text, …} of tokenizer_config.json; a token stands there as text or as an object with `content`."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def eos_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Ids that end a text: eos_token_id, a number or a list, of generation_config.json, else of config.json."""
    for name, config in (("generation_config", checkpoint.generation_config), ("config", checkpoint.config)):
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if not all(type(each) is int for each in ids) and value is not None:
            raise UserError(f"{checkpoint.path}/{name}.json: eos_token_id={value!r} is neither an id nor a list of ids")
        if value is not None:
            return tuple(ids)
    return ()


class TextStream:
    """Ids of one answer in, text out. A character is given out when its last byte has come.

    The pieces of `feed` and the last one of `flush` add up to the whole text: with a byte-level tokenizer exactly to
    what it decodes at once from ids without special ones, bytes that are no UTF-8 (shown as U+FFFD) included.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # ids[context:] are decoded. Those before `fresh` were given out, and stay as context since some decoders
        # treat a text's first token differently (no space before it).
        self.ids: list[int] = []
        self.context, self.fresh = 0, 0
        self.in_header, self.said_something, self.owes_break = False, False, False

    def feed(self, token: int) -> str:
        """The text that this id completes, "" when there is none."""
        if token in self.tokenizer.special_ids:
            piece = self.flush()
            if token in self.tokenizer.header_begins:
                self.in_header = True
            elif token == self.tokenizer.header_ends:
                self.in_header, self.owes_break = False, self.said_something
            return piece
        if self.in_header:
            return ""
        self.ids.append(token)
        piece = self._fresh_text()
        # U+FFFD at the end may be the beginning of a character.
        return "" if piece.endswith(REPLACEMENT) else self._give(piece)

    def flush(self) -> str:
        """What is left: the bytes of a character that was not finished. No later id will finish it."""
        piece = self._give(self._fresh_text())
        self.context = self.fresh
        return piece

    def _fresh_text(self) -> str:
        before = self.tokenizer.decode(self.ids[self.context : self.fresh])
        return self.tokenizer.decode(self.ids[self.context :])[len(before) :]

    def _give(self, piece: str) -> str:
        if len(self.ids) > self.fresh:
            self.context, self.fresh = self.fresh, len(self.ids)
        if piece and self.owes_break:
            piece, self.owes_break = BETWEEN_MESSAGES + piece, False
        self.said_something = self.said_something or bool(piece)
        return piece


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string, wherever the pieces' borders are.

    Of several stop strings in the text the one that ends first counts; of two that end together, the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""  # may be the beginning of a stop string
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that can be printed now; nothing after a stop string was found."""
        if self.found:
            return ""
        text = self.held + piece
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)[1]]
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        keep = next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-n:]) for stop in self.stops)
            ),
            0,
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self.held = self.held, ""
        return held
