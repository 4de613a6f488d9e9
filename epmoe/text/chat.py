"""A conversation → the text that a model was trained to answer: the checkpoint's chat template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from epmoe.errors import UserError


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
