"""Values of a message that are what a chat template takes them for: text where it prints them, parts or an object where
it goes into them.

Servers send one thing in two shapes, and a template knows one of them, or does something that nobody foresaw. So it is
not told apart beforehand: a value has both faces, and the template's own operation chooses.

    Parts       content: prints as its text; a loop, an index or a filter for lists finds the parts
    Arguments   of a call, given as a JSON text: prints as that text; loops, keys, `items` and `tojson` find the object
    Object      the same, given as an object: prints as JSON

`plain` is what stands in the JSON of a whole message.
"""

import json
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, Self

from epmoe import strictjson
from epmoe.errors import UserError


class Parts(str):
    """The text of content, and its parts; `given` is how it came."""

    parts: list[Any]
    given: Any

    def __new__(cls, text: str, parts: list[Any], given: Any) -> Self:
        made = super().__new__(cls, text)
        made.parts, made.given = parts, given
        return made

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __getitem__(self, at: Any) -> Any:
        """Of a list the part; of a text the letter. A slice has both faces again."""
        if isinstance(at, slice):
            return Parts(str(self)[at], self.parts[at], self.given)
        return self.given[at]


class Arguments(str):
    """The JSON text of a call's arguments; `place` names it in messages."""

    place: str

    def __new__(cls, text: str, place: str) -> Self:
        made = super().__new__(cls, text)
        made.place = place
        return made

    @property
    def value(self) -> Any:
        """What the text spells; no text at all stands for no arguments.

        Raises:
            UserError: it is no JSON.
        """
        if not self.strip():
            return {}
        try:
            return strictjson.loads(str(self))
        except ValueError as error:
            raise UserError(f"{self.place}: the text of `arguments` is not JSON ({error}): give an object") from error

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value)

    def __getitem__(self, at: Any) -> Any:
        return self.value[at] if isinstance(at, str) else str(self)[at]

    def get(self, name: str, default: Any = None) -> Any:
        """As an object has it."""
        return self.value.get(name, default)

    def keys(self) -> KeysView[Any]:
        """As an object has it."""
        return self.value.keys()

    def values(self) -> ValuesView[Any]:
        """As an object has it."""
        return self.value.values()

    def items(self) -> ItemsView[Any, Any]:
        """As an object has it."""
        return self.value.items()


class Object(dict[str, Any]):
    """A call's arguments as an object, which prints as JSON and can stand in a sum of texts."""

    def __str__(self) -> str:
        return json.dumps(plain(self), ensure_ascii=False)

    def __add__(self, other: str) -> str:
        return str(self) + other

    def __radd__(self, other: str) -> str:
        return other + str(self)


def plain(value: Any) -> Any:
    """A value as it stands in JSON: content as it was given, arguments as an object, however they came."""
    match value:
        case Parts():
            return value.given
        case Arguments():
            return value.value
        case dict():
            return {key: plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
    return value
