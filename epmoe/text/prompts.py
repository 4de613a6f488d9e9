"""Prompts: from the command line, a file, JSON lines or standard input → the engine's requests, the same on every rank.

    prompt="…"            one prompt
    prompts=file.txt      the whole file is one prompt
    prompts=file.jsonl    one prompt a line: {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}, and
                          any key of the group `sampling`, max_new_tokens (or max_tokens) and variables of the chat
                          template for this prompt alone; null counts as not given; .ndjson is the same
    prompts=-             all of standard input is one prompt

Rank 0 alone reads and encodes: the others may have no standard input and no such file, and a chat template may ask for
the date. They wait for the requests, so standard input must end within runtime.start_timeout_s.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epmoe import strictjson
from epmoe.config.keys import known_instead, respelled
from epmoe.config.schema import SPELLINGS, Config
from epmoe.engine.request import Request, SamplingParams
from epmoe.errors import UserError
from epmoe.streams import tell
from epmoe.text.defaults import decided
from epmoe.text.instructions import rendered
from epmoe.text.messages import Message, check_conversation
from epmoe.text.tokenizer import Tokenizer
from epmoe.text.variables import Variables, check_variables, configured, told

if TYPE_CHECKING:  # it brings torch
    from epmoe.ranks.mesh import Ranks

# What the embedded model continues when nothing is asked.
DEFAULT_PROMPT = "It was a fine morning, and"

SAMPLING = tuple(item.name for item in fields(SamplingParams))
KEYS = ("prompt", "messages", *SAMPLING, *SPELLINGS)  # of a line, beside variables
LINES = (".jsonl", ".ndjson")  # how the name of a file with a prompt a line ends, in any case


@dataclass(frozen=True)
class Prompt:
    """A text or a conversation; `origin` says where it came from, for messages about it.

    `variables` are its own ones for the chat template.

    Raises:
        UserError: neither of them, or variables that cannot be.
    """

    origin: str
    content: str | Sequence[Message]
    params: SamplingParams
    variables: Variables = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.content, str):
            check_conversation(self.origin, self.content)
        check_variables(self.origin, self.variables)

    @classmethod
    def of(cls, origin: str, given: Mapping[str, Any], default: SamplingParams) -> "Prompt":
        """From an object with `prompt` or `messages`, sampling that differs from `default`, and variables.

        A null counts as not given.

        Raises:
            UserError: with `origin`, wrong types, values out of range. Unknown names are for `encode` to refuse, which
                knows what the template reads.
        """
        others = {name: value for name, value in given.items() if name not in KEYS}
        if ("prompt" in given) == ("messages" in given):
            if others and "prompt" not in given:  # one of them, misspelled?
                name = next(iter(others))
                raise UserError(f"{origin}: unknown key {name!r}{known_instead(name, KEYS)}")
            raise UserError(f"{origin}: give either prompt or messages")
        content = given["prompt"] if "prompt" in given else given["messages"]
        if "prompt" in given and not isinstance(content, str):
            raise UserError(f"{origin}: prompt={content!r} is not text")
        if "messages" in given:
            check_conversation(origin, content)
        try:
            own = respelled({name: given[name] for name in (*SAMPLING, *SPELLINGS) if name in given}, SPELLINGS)
            params = replace(default, **{name: value for name, value in own.items() if value is not None})
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None
        return cls(origin, content, params, others)


def get_requests(
    config: Config, tokenizer: Tokenizer, ranks: "Ranks", default: SamplingParams | None = None
) -> list[Request]:
    """All requests of this run, in order; a collective.

    Args:
        default: of rank 0, what a prompt leaves out; None: the configuration's alone.
    Raises:
        UserError: no prompt, an unreadable file, a bad line (with its number), a template that refuses the messages.
    """

    def found() -> list[Request]:
        prompts = read(config, default)
        chat = resolve_chat(config.chat, tokenizer)
        if config.chat == "auto":
            reason = "" if chat == "on" else ": the checkpoint has no chat template"
            tell(f"epmoe: chat={chat} (auto{reason})")
        given = configured(config)
        return [
            Request(
                tuple(encode(each, tokenizer, chat, config.system, given)),
                decided(each.origin, each.params, draw=False),  # the command can be run again
            )
            for each in prompts
        ]

    return share(ranks, found)


def share(ranks: "Ranks", make: Callable[[], list[Request]]) -> list[Request]:
    """What `make` gives on rank 0, on every rank; a collective.

    Raises:
        UserError: that `make` raised on rank 0, on every rank.
    """
    if ranks.size == 1:
        return make()
    shared: dict[str, Any] = {}
    if ranks.is_main:
        try:
            shared["requests"] = [each.to_json() for each in make()]
        except UserError as error:
            shared["error"] = str(error)
    ranks.meet()  # standard input, or another node's download, may have taken its time
    shared = ranks.broadcast_json(shared)
    if "error" in shared:
        raise UserError(shared["error"])
    return [Request.of_json(each) for each in shared["requests"]]


def read(config: Config, default: SamplingParams | None = None) -> list[Prompt]:
    """The prompts that the configuration names; `default` as for `get_requests`."""
    default = default or SamplingParams(**vars(config.sampling), max_new_tokens=config.max_new_tokens)
    if config.prompts.lower().endswith(LINES):
        return _json_lines(config.prompts, default)
    if config.prompts == "-":
        if sys.stdin.isatty():
            tell("epmoe: reading the prompt from standard input; end it with Ctrl-D")
        return [Prompt("standard input", _decoded(sys.stdin.buffer.read(), "standard input"), default)]
    if config.prompts:
        return [Prompt(config.prompts, _read_file(config.prompts), default)]
    if config.prompt is not None:
        return [Prompt("prompt", config.prompt, default)]
    if config.checkpoint:
        raise UserError("no prompt: give prompt='some text', prompts=FILE, or prompts=- for standard input")
    tell(f"epmoe: no prompt given, continuing {DEFAULT_PROMPT!r}")
    return [Prompt("prompt", DEFAULT_PROMPT, default)]


def resolve_chat(wanted: str, tokenizer: Tokenizer) -> str:
    """`chat` as on or off; auto is on where the checkpoint has a chat template."""
    if wanted != "auto":
        return wanted
    return "off" if tokenizer.chat is None else "on"


def encode(
    prompt: Prompt, tokenizer: Tokenizer, chat: str, system: str | None, given: Variables | None = None
) -> list[int]:
    """Token ids of a prompt, through the chat template if `chat` is on, or auto and the checkpoint has one.

    `system` becomes the first message of a conversation that has no system message of its own: see `rendered`. `given`
    are variables for the template, where the prompt has no others: see `told`.

    Raises:
        UserError: the prompt cannot be what `chat`, `system` and `given` ask for, the template refuses its messages,
            drops some of their instructions or reads no such variable, or the vocabulary cannot spell it.
    """
    is_text = isinstance(prompt.content, str)
    template = tokenizer.chat if resolve_chat(chat, tokenizer) == "on" else None
    if chat == "on" and template is None:
        raise UserError("chat=on, but the checkpoint has no chat template: use chat=off")
    if template is None and not is_text:
        raise UserError(f"{prompt.origin}: messages need the checkpoint's chat template: give a prompt, or chat=on")
    if template is None and system is not None:
        raise UserError(f"system={system!r} needs the checkpoint's chat template: leave it out, or use chat=on")
    if prompt.content == "":
        raise UserError(f"{prompt.origin} is empty: give some text")
    messages = [_user(prompt.content)] if isinstance(prompt.content, str) else prompt.content
    try:
        variables = told(template, given or {}, prompt.variables, KEYS)
        if template is None:
            assert isinstance(prompt.content, str)
            return tokenizer.encode(prompt.content, special=True)
        return tokenizer.encode(rendered(template, messages, system, variables), special=False)
    except UserError as error:
        raise UserError(f"{prompt.origin}: {error}") from None


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _read_file(name: str) -> str:
    try:
        return _decoded(Path(os.path.expanduser(name)).read_bytes(), f"prompts={name}")
    except OSError as error:
        raise UserError(f"prompts={name} cannot be read ({error.strerror}): give a file, or - for stdin") from error


def _decoded(data: bytes, origin: str) -> str:
    """UTF-8 text without the newline that ends a file's last line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{origin} is not UTF-8 text (byte {error.start}): convert it") from error
    return text.removesuffix("\n").removesuffix("\r")


def _json_lines(name: str, default: SamplingParams) -> list[Prompt]:
    text = _read_file(name)
    # Not splitlines(): JSON strings may hold line separators such as U+2028.
    lines = [(f"{name}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"prompts={name} has no lines: give one JSON object a line")
    return [_json_line(origin, line, default) for origin, line in lines]


def _json_line(origin: str, line: str, default: SamplingParams) -> Prompt:
    """Raises UserError with `origin` for what is no JSON object, and as `Prompt.of`."""
    try:
        given = strictjson.loads(line)
    except ValueError as error:
        raise UserError(f"{origin}: not JSON ({error})") from error
    if not isinstance(given, dict):
        raise UserError(f'{origin}: {type(given).__name__}, expected an object such as {{"prompt": "…"}}')
    return Prompt.of(origin, given, default)
