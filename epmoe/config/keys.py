"""What a configuration key is: type, default, meaning and range, declared in one line and checked in one place.

    top_p: float = key(1.0, "draw from the smallest set of tokens with this probability", Range(above=0, high=1))

A key's value comes as a word of the command line (`Key.read`) or as a Python value (`Key.accept`), from a file or a
caller. A schema is a frozen dataclass of keys and of groups, which are schemas themselves.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from types import MappingProxyType, NoneType
from typing import Any, TypeVar, get_args, get_origin

from epmoe import strictjson
from epmoe.errors import UserError

Schema = TypeVar("Schema")
Variables = tuple[tuple[str, Any], ...]  # names and JSON values: a mapping that nobody changes
Biases = tuple[tuple[int, float], ...]  # token ids and numbers: likewise, the lowest id first

CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
LARGEST = {int: 2**63 - 1, float: sys.float_info.max}  # what a tensor can hold; no infinity
TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[str, ...]: "a list of texts that are not empty",
    Variables: "values by name, name.NAME=value",
}


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low`, or above `above`, to `high`; with `or_zero` 0 too."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    or_zero: bool = False

    def holds(self, value: float, kind: type = int) -> bool:
        """Whether `value` is one of them, and one that a tensor of `kind` can hold; NaN is not."""
        if self.or_zero and value == 0:
            return True
        low = -LARGEST[kind] if self.low is None else self.low
        high = LARGEST[kind] if self.high is None else self.high
        return low <= value <= high and (self.above is None or value > self.above)

    def words(self, what: str) -> str:
        if self.above is not None:
            return f"{what} above {self.above}" + ("" if self.high is None else f" and at most {self.high}")
        if self.low is not None and self.high is not None:
            return f"{what}{', 0 or' if self.or_zero else ''} from {self.low} to {self.high}"
        return what if self.low is None else f"{what},{' 0 or' if self.or_zero else ''} at least {self.low}"


@dataclass(frozen=True)
class Names:
    """These names and those of `table` ("module:ATTRIBUTE", imported when it is needed).

    `open`: also a class from anywhere, spelled package.module:Class; whoever looks it up imports it.
    """

    names: tuple[str, ...] = ()
    table: str = ""
    open: bool = False

    def known(self) -> list[str]:
        if not self.table:
            return list(self.names)
        module, attribute = self.table.split(":")
        return [*self.names, *getattr(import_module(module), attribute)]

    def holds(self, name: str) -> bool:
        return name in self.known() or (self.open and re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", name) is not None)

    def words(self) -> str:
        return "one of " + ", ".join(self.known()) + (", or package.module:Class" if self.open else "")


@dataclass(frozen=True)
class Numbers:
    """Several whole numbers, each in a range, with `between` between them on the command line."""

    each: Range = Range()
    between: str = ","
    ascending: bool = False
    empty: bool = False  # none at all is right, too
    form: str = ""  # what they are, spelled as on the command line

    def holds(self, values: Sequence[int]) -> bool:
        rises = all(first < second for first, second in pairwise(values))
        return all(self.each.holds(value) for value in values) and (rises or not self.ascending)

    def words(self, count: int | None) -> str:
        many = self.each.words({None: "whole numbers", 2: "two whole numbers"}.get(count, f"{count} whole numbers"))
        if count is None and not self.form:
            many += f", separated by {self.between!r}"
        many += ", the smaller one first" if self.ascending else ""
        many += ", or none" if self.empty else ""
        return f"{self.form}: {many}" if self.form else many


@dataclass(frozen=True)
class ByToken:
    """A number in a range for some token ids, on the command line ID:NUMBER with `,` between."""

    each: Range

    def holds(self, values: Biases) -> bool:
        ids = [id for id, _ in values]
        return len({*ids}) == len(ids) and all(id >= 0 and self.each.holds(value, float) for id, value in values)

    def words(self) -> str:
        return f"ID:NUMBER,… of token ids, {self.each.words('numbers')}, or none"


def key(
    default: Any, about: str, allowed: Range | Names | Numbers | ByToken | None = None, otherwise: Any = None
) -> Any:
    """A key of a schema: its default, what it means and which values of its type it takes (None: all).

    A group's key has an instance of the group as its default. Where the default is None, nothing, `otherwise` is what
    holds if nobody else says it.
    """
    return field(default=default, metadata={"about": about, "allowed": allowed, "otherwise": otherwise})


@dataclass(frozen=True)
class Key:
    """One key under its full name, such as sampling.seed.

    `kind` is the type of its value, None aside, which `optional` allows: bool, int, float, str, tuple[str, ...],
    tuple[int, ...], a tuple of so many ints, Biases, or Variables, whose names are the user's own.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    about: str
    allowed: Range | Names | Numbers | ByToken | None
    otherwise: Any = None

    @property
    def is_text(self) -> bool:
        """Whether the command line's characters are the value, whatever they are."""
        return self.kind is str and not isinstance(self.allowed, Names)

    @property
    def collects(self) -> bool:
        """Whether the key, given again, adds a value; given without one, it drops those before."""
        return self.kind == tuple[str, ...]

    @property
    def names_its_own(self) -> bool:
        """Whether it is given as key.NAME=value, with any name."""
        return self.kind == Variables

    def read(self, word: str) -> Any:
        """The value that a word of the command line spells.

        Raises:
            UserError: it spells none, or one that the key does not take.
        """
        if self.is_text:
            return self.accept(word)
        if self.collects:
            return self.accept((word,) if word else ())
        if self.names_its_own:
            raise self._refused(word)
        word = word.strip()
        if self.optional and not word:
            return None
        if "," in word and not isinstance(self.allowed, Numbers | ByToken):
            raise UserError(f"{self.name}={word!r} holds several values: it takes {self.wanted()}")
        try:
            value = self._parsed(word)
        except ValueError:
            raise self._refused(word) from None
        if isinstance(self.allowed, Numbers | ByToken) and not self._fits(value):
            raise self._refused(word)
        return self.accept(value)

    def accept(self, value: Any) -> Any:
        """`value` as the key's type: a whole number as a float, a list or one text as a tuple, where the key has those;
        a mapping of token ids, which JSON spells as texts, as pairs.

        Raises:
            UserError: it is of another type, no known name or out of range.
        """
        if value is None and self.optional:
            return None
        if self.names_its_own and isinstance(value, Mapping):
            value = tuple(value.items())
        if self.collects and isinstance(value, str):
            value = (value,)
        if isinstance(self.allowed, ByToken) and isinstance(value, Mapping):
            value = [(_id(id), each) for id, each in value.items()]
        if not self._fits(value):
            raise self._refused(value)
        if isinstance(self.allowed, Names) and not self.allowed.holds(value):
            raise UserError(f"{self.name}={value!r} is unknown{known_instead(value, self.allowed.known())}")
        if isinstance(self.allowed, Range) and not self.allowed.holds(value, self.kind):
            raise UserError(f"{self.name}={value} is out of range: it takes {self.wanted()}")
        if isinstance(self.allowed, ByToken):
            return tuple(sorted((id, float(each)) for id, each in value))
        if get_origin(self.kind) is tuple:
            return tuple(value)
        return float(value) if self.kind is float else value

    def wanted(self) -> str:
        """What the key takes, in words."""
        match self.allowed:
            case Names():
                words = self.allowed.words()
            case Numbers():
                words = self.allowed.words(self._count)
            case ByToken():
                words = self.allowed.words()
            case Range():
                words = self.allowed.words(TYPES[self.kind])
            case None:
                words = TYPES[self.kind].replace("name.", f"{self.name}.")
        return words + (", or nothing" if self.optional and not self.is_text else "")

    def spelled(self, value: Any) -> str:
        """`value` as the command line spells it; nothing for None."""
        if value is None:
            return ""
        if isinstance(self.allowed, ByToken):
            return ",".join(f"{id}:{each}" for id, each in value)
        if isinstance(value, tuple):
            return (self.allowed.between if isinstance(self.allowed, Numbers) else ",").join(map(str, value))
        return str(value).lower() if isinstance(value, bool) else str(value)

    @property
    def _count(self) -> int | None:
        """How many whole numbers make a value; None: any number but none."""
        return None if Ellipsis in get_args(self.kind) else len(get_args(self.kind))

    def _parsed(self, word: str) -> Any:
        """A word as a value of the key's kind; ValueError when it is none."""
        if self.kind is bool:
            return {"true": True, "false": False}.get(word.lower(), word)
        if isinstance(self.allowed, ByToken):
            pairs = [part.split(":") for part in word.split(",")] if word else []
            return tuple((int(id), float(value)) for id, value in pairs)
        if isinstance(self.allowed, Numbers):
            parts = word.split(self.allowed.between) if word or not self.allowed.empty else []
            return tuple(int(part) for part in parts)
        return self.kind(word)

    def _fits(self, value: Any) -> bool:
        """Whether a Python value is of the key's type: a whole number is a number, true is none."""
        if self.collects:
            return isinstance(value, list | tuple) and all(isinstance(each, str) and each for each in value)
        if self.names_its_own:
            return isinstance(value, tuple) and all(str(name).isidentifier() and _is_json(each) for name, each in value)
        if isinstance(self.allowed, Numbers):
            fits = isinstance(value, list | tuple) and all(type(each) is int for each in value)
            least = 0 if self.allowed.empty else 1
            return fits and len(value) == (self._count or max(len(value), least)) and self.allowed.holds(value)
        if isinstance(self.allowed, ByToken):
            pairs = isinstance(value, list | tuple) and all(isinstance(each, list | tuple) for each in value)
            return pairs and all(_is_pair(*each) for each in value) and self.allowed.holds(value)
        if self.kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        return type(value) is self.kind

    def _refused(self, value: Any) -> UserError:
        return UserError(f"{self.name}={value!r} is not {self.wanted()}")


def keys_of(schema: type) -> Mapping[str, Key]:
    """Every key of a schema by its full name, those of its groups behind its own."""
    if schema not in _keys:
        _keys[schema] = MappingProxyType(_read_keys(schema))
    return _keys[schema]


_keys: dict[type, Mapping[str, Key]] = {}  # each request asks for those of SamplingParams


def _read_keys(schema: type) -> dict[str, Key]:
    own, grouped = {}, {}
    for item in fields(schema):
        if is_dataclass(item.type):
            assert isinstance(item.type, type)
            for name, each in keys_of(item.type).items():
                grouped[f"{item.name}.{name}"] = replace(each, name=f"{item.name}.{name}")
        else:
            kinds = [each for each in get_args(item.type) if each is not NoneType]
            optional = NoneType in get_args(item.type)
            own[item.name] = Key(
                item.name, kinds[0] if optional else item.type, optional, item.default, **item.metadata
            )
    return own | grouped


def groups_of(schema: type) -> Mapping[str, str]:
    """The names of a schema's groups → what they are."""
    return {item.name: item.metadata["about"] for item in fields(schema) if is_dataclass(item.type)}


def build(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """An instance with `values`, by full name, and defaults for all other keys."""
    own: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    for item in fields(schema):  # type: ignore[arg-type]
        if is_dataclass(item.type):
            assert isinstance(item.type, type)
            prefix = f"{item.name}."
            mine = {name.removeprefix(prefix): each for name, each in values.items() if name.startswith(prefix)}
            own[item.name] = build(item.type, mine)
    return schema(**own)


def respelled(values: Mapping[str, Any], spellings: Mapping[str, str]) -> dict[str, Any]:
    """`values` under the keys' own names; `spellings` are others that they may have. A None counts as not given.

    Raises:
        UserError: two spellings of one key are given, and their values differ.
    """
    found = {name: value for name, value in values.items() if name not in spellings}
    for other, name in spellings.items():
        if (value := values.get(other)) is None:
            continue
        if (own := found.get(name)) is not None and own != value:
            raise UserError(f"{other}={value} and {name}={own} are one key in two spellings: give one of them")
        found[name] = value
    return found


def accept_all(config: Any) -> None:
    """Check every value of a frozen schema that is being made, for its `__post_init__`, and bring it to its key's type.

    Raises:
        UserError: the first value that its key does not take.
    """
    for each in keys_of(type(config)).values():
        object.__setattr__(config, each.name, each.accept(getattr(config, each.name)))


def scalar(name: str, word: str) -> Any:
    """What a word of the command line stands for where any type may: JSON, or else the text as it is.

    true, false and null may begin with a capital letter, as Python writes them.

    Raises:
        UserError: it begins like a list, an object or a text of JSON, and is none.
    """
    if (constant := word.strip().lower()) in CONSTANTS:
        return CONSTANTS[constant]
    try:
        return strictjson.loads(word)
    except ValueError as error:
        if word.lstrip().startswith(("[", "{", '"')):
            raise UserError(f"{name}={word!r} begins like JSON and is none ({error}): mend it, or quote it") from error
        return word


def _id(name: Any) -> Any:
    """A token id as JSON spells the name of a field; anything else as it is, to be refused."""
    return int(name) if isinstance(name, str) and name.isdecimal() else name


def _is_pair(*pair: Any) -> bool:
    """Whether it is a whole number and any number."""
    return len(pair) == 2 and type(pair[0]) is int and type(pair[1]) in (int, float)


def _is_json(value: Any) -> bool:
    try:
        return isinstance(json.dumps(value, allow_nan=False), str)
    except (ValueError, TypeError, RecursionError):
        return False


def known_instead(wrong: str, known: Sequence[str], candidates: Sequence[str] = ()) -> str:
    """The end of a message: what would have been right, and which of it (or of `candidates`) is close to `wrong`."""
    close = get_close_matches(wrong, candidates or known, n=1)
    return f"; known: {', '.join(known)}" + (f" (did you mean {close[0]}?)" if close else "")
