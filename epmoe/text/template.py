"""A chat template of a checkpoint, compiled and rendered by jinja as transformers does it.

It is a program of a stranger, hence the sandbox, and `epmoe.text.bounded`, in whose process all of this runs: only
`chat.py` calls it, through `answer`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_items, do_reverse
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from epmoe.errors import UserError
from epmoe.text.faces import Arguments, Parts, plain
from epmoe.text.habits import Habits
from epmoe.text.messages import Message, shaped
from epmoe.text.reads import read_names

OWN = ("messages", "add_generation_prompt")  # variables that every conversation has

_MOST = 16_000_000  # characters that a rendering may have beside four times those of its messages


def answer(call: Mapping[str, Any]) -> dict[str, Any]:
    """What `chat.py` asks for, by JSON: {source} → {reads}, or {source, messages, variables, now} → {text}.

    In place of either, {broken}: it is no template; {refused}: what it raised, {wrong}: what is wrong with a message.
    """
    try:
        template = _compiled(call["source"])
        if "messages" not in call:
            return {"reads": sorted(template.reads)}
    except MemoryError:
        raise
    except Exception as error:  # the parser's and Python's own; what is nested too deep, a constant too large
        return {"broken": _said(error)}
    try:
        return {"text": template.render(**{name: call[name] for name in ("messages", "variables", "now")})}
    except MemoryError:
        raise
    except UserError as error:
        return {"wrong": str(error)}
    except Exception as error:  # it may raise anything
        return {"refused": _said(error)}


def _said(error: Exception) -> str:
    """A RecursionError of C, for one, may say nothing itself."""
    return str(error) or type(error).__name__


@dataclass(frozen=True)
class Template:
    """A compiled template; raises what jinja and Python raise for what is none."""

    source: str

    @cached_property
    def program(self) -> jinja2.Template:
        """What jinja makes of it."""
        return _environment().from_string(self.source)

    @cached_property
    def habits(self) -> Habits:
        """Which shapes of messages it is written for."""
        return Habits.of(_environment().parse(self.source))

    @cached_property
    def reads(self) -> frozenset[str]:
        """The variables that it reads of those that it may be given; not those that it sets before."""
        return read_names(_environment().parse(self.source), {*_environment().globals, *OWN})

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any], now: str) -> str:
        """The conversation as text; `now` is the moment that strftime_now tells, in ISO's form.

        Raises:
            UserError: a message that cannot be brought into the template's shape.
        """
        conversation = shaped(messages, self.habits)
        moment = datetime.fromisoformat(now)
        most = _MOST + 4 * len(json.dumps([messages, variables]))
        pieces, length = [], 0
        for piece in self.program.generate(**variables, messages=conversation, strftime_now=moment.strftime):
            pieces.append(piece)
            length += len(piece)
            if length > most:
                raise ValueError(f"it writes more than {most:,} characters")
        return "".join(pieces)


@cache
def _compiled(source: str) -> Template:
    """With all that can fail but the rendering."""
    made = Template(source)
    assert made.program and made.habits and made.reads is not None
    return made


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.filters["items"] = _items
    made.filters["reverse"] = _reverse
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = None  # `render` gives it
    made.globals["namespace"] = _Namespace
    return made


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: training marks the assistant's words with it; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: what is set within ends with it.
        return nodes.CallBlock(self.call_method("_body"), [], [], body, lineno=line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Namespace(Namespace):
    """jinja's namespace without private names, which could give an object methods that Python calls by itself."""

    def __init__(*args: Any, **values: Any) -> None:
        self, given = args[0], dict(*args[1:], **values)
        for name in given:
            _refuse_private(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no private name such as {name}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja's own filter escapes characters for HTML."""
    spelled = str(value) if isinstance(value, Parts) else plain(value)  # parts are the sender's; the model reads text
    return json.dumps(spelled, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _items(value: Any) -> Any:
    return do_items(value.value if isinstance(value, Arguments) else value)


def _reverse(value: Any) -> Any:
    return do_reverse(value.given if isinstance(value, Parts) else value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
