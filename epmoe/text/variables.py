"""What a chat template is told beside the messages: reasoning_effort, tools, and whatever else it reads.

    reasoning_effort=high   tools=FILE   template.NAME=value      for all prompts of a run
    {"prompt": "…", "reasoning_effort": "low", "tools": […], NAME: …}   for the prompt of this line, in place of those

A value of null counts as not given. What the template does not read is refused: it would change nothing, silently.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epmoe import strictjson
from epmoe.config.keys import known_instead
from epmoe.config.schema import LLMConfig
from epmoe.errors import UserError
from epmoe.text.chat import ChatTemplate

Variables = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None  # objects as OpenAI's

NAMED = ("reasoning_effort", "tools")  # those with keys of their own


def configured(config: LLMConfig) -> dict[str, Any]:
    """The variables that the configuration gives to all prompts; reads the file of tools.

    Raises:
        UserError: one is given twice, or the file cannot be read, or holds no list of objects.
    """
    found = dict(config.template)
    for name in NAMED:
        if (value := getattr(config, name)) and name in found:
            raise UserError(f"{name}={value} and template.{name} exclude each other: give one of them")
    if config.reasoning_effort is not None:
        found["reasoning_effort"] = config.reasoning_effort
    if config.tools:
        found["tools"] = _read_tools(config.tools)
    check_variables("the configuration", found)
    return found


def with_tools(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an `LLM` whose `tools` are a list, and no file: it is the template's variable then.

    Raises:
        UserError: they are no objects, or given as template.tools, too.
    """
    tools, template = keys.get("tools"), keys.get("template")
    if not isinstance(tools, list | tuple):
        return dict(keys)
    if "template.tools" in keys or (isinstance(template, Mapping) and "tools" in template):
        raise UserError("tools and template.tools exclude each other: give one of them")
    check_variables("LLM", {"tools": list(tools)})
    return {**{name: value for name, value in keys.items() if name != "tools"}, "template.tools": list(tools)}


def _read_tools(name: str) -> Any:
    try:
        value = strictjson.loads(Path(os.path.expanduser(name)).read_bytes())
    except OSError as error:
        raise UserError(f"tools={name} cannot be read ({error.strerror}): give a file with a JSON list") from error
    except ValueError as error:
        raise UserError(f"tools={name} is not JSON ({error}): give a file with a list of objects") from error
    check_variables(f"tools={name}", {"tools": value})
    return value


def check_variables(origin: str, variables: Variables) -> None:
    """Raises UserError for tools that are no list of objects, and a reasoning effort that is no text."""
    tools, effort = variables.get("tools"), variables.get("reasoning_effort")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(each, dict) and each for each in tools)):
        raise UserError(f"{origin}: tools are not a list of objects: give each as an object, as for OpenAI")
    if not isinstance(effort, str | None):
        raise UserError(f"{origin}: reasoning_effort={effort!r} is not text")


def told(chat: ChatTemplate | None, given: Variables, own: Variables, known: Sequence[str]) -> dict[str, Any]:
    """The variables for one prompt: those `given` for all, under its `own`; those that are null left out.

    `known` are the other keys that the prompt may have, for the refusal of one that is none.

    Raises:
        UserError: the template does not read one of them, or there is none (`chat`: None).
    """
    values = {name: value for name, value in {**given, **own}.items() if value is not None}
    reads = () if chat is None else chat.reads(tools="tools" in values)
    for name in {**given, **own}:
        if name in reads:
            continue
        if name in own and name not in NAMED:
            raise UserError(f"unknown key {name!r}{known_instead(name, [*known, *NAMED, *_others(reads)])}")
        if name not in values:
            continue  # nothing was asked for
        spelled = name if name in NAMED else f"template.{name}"
        if chat is None:
            raise UserError(f"{spelled} needs the checkpoint's chat template: leave it out, or use chat=on")
        raise UserError(
            f"{spelled}: the checkpoint's chat template reads no variable {name!r}; it reads: "
            f"{', '.join(reads) or 'none'}"
        )
    return values


def _others(reads: Sequence[str]) -> list[str]:
    return [name for name in reads if name not in NAMED]
