"""What an answer must obey, as its request's fields say → the grammar of the whole answer to each prompt.

    response_format, structured_outputs, guided_…    Form: of the answer to the user
    tools, tool_choice, parallel_tool_calls          Offer: what may be called, or must be
    both, each schema compiled once to judge it      Structure ─▶ requests with grammars

Wherever there is a grammar, calls obey their tools' schemas, strict or not. Tools that may be called, and need not,
are no reason for one unless a tool says strict, or there may be one call alone.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from epmoe.engine.matcher import MOST_CHARACTERS
from epmoe.engine.request import Request
from epmoe.errors import UserError
from epmoe.server.errors import ApiError, refused
from epmoe.server.openai.fields import Sampled, StructuredOutputs
from epmoe.text.grammar import JSON_OBJECT, Body, Tool, answer, check, of_choice, of_lark, of_regex, of_schema
from epmoe.text.tokenizer import Tokenizer

MAKERS: Mapping[str, Callable[[Any], Body]] = {
    "json": of_schema,
    "json_object": lambda _: of_schema(JSON_OBJECT),
    "regex": of_regex,
    "choice": of_choice,
    "grammar": of_lark,
}
NOTHING: Mapping[str, Any] = {"properties": {}, "additionalProperties": False}  # of a tool without parameters


@dataclass(frozen=True)
class Form:
    """Of an answer: what it is to be, where the request says so."""

    place: str
    kind: str  # of MAKERS
    value: Any


@dataclass(frozen=True)
class Offer:
    """Tools that an answer may call, by their places in the request."""

    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    needed: bool = False  # it must call one
    bound: bool = False  # it needs a grammar for their sake


class Structure:
    """What answers obey.

    Raises:
        ApiError: a schema, pattern or grammar that cannot be compiled, with its place and the reason.
    """

    def __init__(self, form: Form | None, offer: Offer | None = None) -> None:
        self.offer = offer or Offer()
        self.body: Body | None = None
        self.tools: list[Tool] = []
        bodies: dict[str, Body] = {}
        if form is not None:
            with _at(form.place):
                bodies[form.place] = self.body = MAKERS[form.kind](form.value)
        if form is not None or self.offer.bound or self.offer.needed:
            for place, tool in self.offer.tools.items():
                parameters = tool.get("parameters") or NOTHING
                if not isinstance(parameters, Mapping):
                    raise ApiError(400, f"{place}.parameters is no JSON schema: give an object", param="tools")
                # Arguments are an object, whether a schema says so or not.
                made = Tool(tool["name"], {"type": "object", **parameters})
                with _at(f"{place}.parameters"):
                    bodies[f"{place}.parameters"] = of_schema(made.parameters)
                self.tools.append(made)
        _check(bodies)

    def bind(self, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Request]:
        """The same requests, each with the grammar of its answer, where there is anything to obey.

        Raises:
            UserError: a tool's name that is none; a call is needed, and the prompt has no markup for one.
        """
        if self.body is None and not self.tools:
            return list(requests)
        choice = "required" if self.offer.needed else "auto"
        found = []
        for each in requests:
            grammar = answer(tokenizer, each.ids, self.body, self.tools, choice)
            own = each.params if grammar is None else replace(each.params, grammar=grammar)
            found.append(replace(each, params=own))
        return found


def form(asked: Sampled, response_format: Mapping[str, Any] | None) -> Form | None:
    """What the answer is to be; None: any text.

    Raises:
        ApiError: a format that is not served, or several.
    """
    found: list[Form] = []
    match response_format:
        case None | {"type": "text"}:
            pass
        case {"type": "json_object"}:
            found.append(Form("response_format", "json_object", True))
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            found.append(Form("response_format.json_schema.schema", "json", schema))
        case {"type": "json_schema"}:
            raise ApiError(400, "response_format.json_schema has no schema: give an object", param="response_format")
        case _:
            raise refused("response_format", "its type is one of text, json_object, json_schema")
    own = asked.structured_outputs or StructuredOutputs()
    given = {f"structured_outputs.{kind}": (kind, getattr(own, kind)) for kind in MAKERS}
    given |= {f"guided_{kind}": (kind, getattr(asked, f"guided_{kind}")) for kind in MAKERS if kind != "json_object"}
    found += [Form(place, *each) for place, each in given.items() if each[1] not in (None, False)]
    if len(found) > 1:
        names = " and ".join(each.place for each in found)
        raise ApiError(400, f"{names} say what the answer is to be: give one of them", param=_field(found[1].place))
    return found[0] if found else None


def offer(tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None, *, several: bool) -> Offer:
    """What may be called of a list of functions, of which each has a name.

    Raises:
        ApiError: a choice that is none, or of a tool that there is not.
    """
    named = {f"tools[{number}].function": tool["function"] for number, tool in enumerate(tools)}
    match choice:
        case "none":
            return Offer()
        case None | "auto":
            strict = any(each.get("strict") is True for each in named.values())
            return Offer(named, bound=bool(named) and (strict or not several))
        case "required":
            if not named:
                raise ApiError(400, "tool_choice=required without tools: give some", param="tool_choice")
            return Offer(named, needed=True)
        case {"type": "function", "function": {"name": str(name)}}:
            found = {place: each for place, each in named.items() if each["name"] == name}
            if not found:
                known = ", ".join(each["name"] for each in named.values()) or "none"
                raise ApiError(
                    400, f"tool_choice names {name!r}, which is no tool (there are: {known})", param="tool_choice"
                )
            return Offer(found, needed=True)
    raise refused("tool_choice", "it is auto, none, required, or names a function")


@contextmanager
def _at(place: str) -> Iterator[None]:
    """A mistake within the block is one at this place of the request."""
    try:
        yield
    except UserError as error:
        raise ApiError(400, f"{place}: {error}", param=_field(place)) from None


def _check(bodies: Mapping[str, Body]) -> None:
    """Compile each, which costs time by what it has."""
    size = sum(len(json.dumps(body)) for body in bodies.values())
    if size > MOST_CHARACTERS:
        names = ", ".join(bodies)[:200]
        raise ApiError(400, f"{names}: {size} characters, and at most {MOST_CHARACTERS} are taken: shorten it")
    for place, body in bodies.items():
        with _at(place):
            check(body)


def _field(place: str) -> str:
    return place.partition(".")[0].partition("[")[0]
