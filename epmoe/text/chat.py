"""A conversation → the text that a model was trained to answer: the checkpoint's chat template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from epmoe.errors import UserError
from epmoe.text.habits import Habits
from epmoe.text.messages import Message, shaped

DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of templates, where a checkpoint has several


class ChatTemplate:
    """A checkpoint's jinja template, in the environment that transformers gives to chat templates.

    Templates come with checkpoints from strangers, hence the sandbox.

    Args:
        source: the template, or several by name: "tool_use" is taken where there are tools, "default" else.
        special: bos_token, eos_token and the like, which templates may use as variables.
    Raises:
        UserError: the template is no valid jinja; of several, the default one.
    """

    def __init__(self, source: str | Mapping[str, str], special: Mapping[str, str]) -> None:
        self.sources: Mapping[str, str] = {DEFAULT: source} if isinstance(source, str) else source
        self.special = dict(special)
        if DEFAULT in self.sources:
            _compiled(self.sources[DEFAULT])

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The conversation as text, up to where the assistant begins to answer.

        The messages come in any of the shapes that `messages.py` names.

        Raises:
            UserError: the template refuses the messages, or there is none for them.
        """
        template, habits = self.chosen(tools=variables.get("tools") is not None)
        values = {"tools": None, "documents": None, "add_generation_prompt": True, **self.special, **variables}
        conversation = shaped(messages, habits)
        try:
            return template.render(messages=conversation, **values)
        except Exception as error:  # a template is a program of a stranger: it may raise anything
            raise UserError(f"the checkpoint's chat template refuses the messages: {_said(error)}") from error

    def chosen(self, *, tools: bool) -> tuple[jinja2.Template, Habits]:
        """The template for conversations with or without tools; raises UserError where there is none that works."""
        name = WITH_TOOLS if tools and WITH_TOOLS in self.sources else DEFAULT
        if name not in self.sources:
            known = ", ".join(sorted(self.sources)) or "none"
            raise UserError(f"the checkpoint's chat templates ({known}) have none named {DEFAULT!r}: use chat=off")
        return _compiled(self.sources[name])


@cache
def _compiled(source: str) -> tuple[jinja2.Template, Habits]:
    try:
        parsed = _environment().parse(source)
        return _environment().from_string(source), Habits.of(parsed)
    except Exception as error:  # the parser's and Python's own; what is nested too deep, a constant too large
        raise UserError(f"the checkpoint's chat template is no valid jinja ({_said(error)}): use chat=off") from error


def _said(error: Exception) -> str:
    """A MemoryError, for one, says nothing itself."""
    return str(error) or type(error).__name__


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
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
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
