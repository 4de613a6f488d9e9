"""Keys: words and Python values become values of the declared type, or one line that says what the key takes."""

from dataclasses import dataclass
from typing import Any

import pytest

from epmoe.config.keys import Key, Names, Numbers, Range, accept_all, build, groups_of, key, keys_of
from epmoe.errors import UserError


@dataclass(frozen=True)
class Inner:
    """A group."""

    share: float = key(0.5, "a part of it", Range(above=0, high=1))
    name: str | None = key(None, "one of two", Names(("first", "second")))


@dataclass(frozen=True)
class Outer:
    """One key of each kind."""

    truth: bool = key(True, "a truth value")
    count: int = key(1, "a number of things", Range(low=1))
    cold: float = key(0.0, "zero or more", Range(1e-6, or_zero=True))
    any_number: float = key(0.0, "a number", Range())
    text: str = key("", "a text")
    absent: str | None = key(None, "a text or none")
    texts: tuple[str, ...] = key((), "texts")
    backend: str = key("auto", "a backend", Names(("auto",), open=True))
    sizes: tuple[int, ...] = key((1, 2), "sizes", Numbers(Range(above=0)))
    pair: tuple[int, int] | None = key((2, 3), "a pair", Numbers(Range(low=0), "x", form="AxB"))
    rising: tuple[int, int] = key((1, 2), "two", Numbers(Range(above=0), ascending=True))
    inner: Inner = key(Inner(), "a group")


KEYS = keys_of(Outer)

# key → words and what they spell
WORDS: dict[str, dict[str, Any]] = {
    "truth": {"true": True, "False": False, " TRUE ": True},
    "count": {"7": 7, " 7 ": 7, "9223372036854775807": 2**63 - 1},
    "cold": {"0": 0.0, "1e-6": 1e-6, "3": 3.0},
    "any_number": {"-1e300": -1e300},
    "text": {"": "", " a,b ": " a,b ", "null": "null"},
    "absent": {"": "", "null": "null"},
    "texts": {"": (), "a,b": ("a,b",)},
    "backend": {"auto": "auto", "package.module:Class": "package.module:Class"},
    "sizes": {"4": (4,), "1,16, 64": (1, 16, 64)},
    "pair": {"8x2048": (8, 2048), "": None, "0x0": (0, 0)},
    "rising": {"32,160": (32, 160)},
    "inner.share": {"1": 1.0, "1e-9": 1e-9},
    "inner.name": {"first": "first", "": None},
}


@pytest.mark.parametrize("name", WORDS)
def test_words(name: str) -> None:
    for word, value in WORDS[name].items():
        found = KEYS[name].read(word)
        assert found == value and type(found) is type(value)
        assert KEYS[name].accept(value) == value


# key → words that spell no value of it, and what the message must say
WRONG: dict[str, dict[str, str]] = {
    "truth": {"yes": "is not true or false", "1": "is not", "": "is not", "true,false": "holds several values"},
    "count": {
        "0": "out of range: it takes a whole number, at least 1",
        "1.0": "is not",
        "": "is not",
        "1,2": "several",
    },
    "cold": {
        "-1": "a number, 0 or at least 1e-06",
        "1e-7": "out of range",
        "nan": "out of range",
        "inf": "out of range",
    },
    "any_number": {"nan": "out of range", "-inf": "out of range", "x": "any_number='x' is not a number"},
    "backend": {"none": "unknown; known: auto", "module:": "unknown", ":Class": "unknown", "a-b:C": "unknown"},
    "sizes": {"1,0": "sizes='1,0' is not whole numbers above 0, separated by ','", "": "is not", "1x2": "is not"},
    "pair": {"8": "pair='8' is not AxB: two whole numbers, at least 0, or nothing", "1x2x3": "is not", "1,2": "is not"},
    "rising": {
        "8,8": "two whole numbers above 0, the smaller one first",
        "1": "is not",
        "1,2,3": "is not",
        "0,1": "not",
    },
    "inner.share": {"0": "inner.share=0.0 is out of range: it takes a number above 0 and at most 1", "1.1": "out of"},
    "inner.name": {"frist": "inner.name='frist' is unknown; known: first, second (did you mean first?)"},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_words_are_one_line(name: str) -> None:
    for word, says in WRONG[name].items():
        with pytest.raises(UserError) as caught:
            KEYS[name].read(word)
        assert str(caught.value).startswith(f"{name}=") and says in str(caught.value)


# key → Python values that are none of it
FOREIGN: dict[str, list[Any]] = {
    "truth": [1, "true", None],
    "count": [1.0, True, "1", None, 2**63],
    "cold": ["1", True, None, 10**400],
    "text": [None, 1, b"x"],
    "absent": [1],
    "texts": ["", [""], [1], None, {"a": 1}],
    "backend": [None, 1, ["auto"]],
    "sizes": [(), 1, "1,2", [1.0], [True], None],
    "pair": ["8x2048", (1,), (1, 2, 3), (-1, 2)],
    "rising": [(2, 1), None],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_python_values_of_another_type_are_refused(name: str) -> None:
    for value in FOREIGN[name]:
        with pytest.raises(UserError, match=f"^{name}="):
            KEYS[name].accept(value)


def test_python_values_come_to_the_type() -> None:
    assert KEYS["texts"].accept(["a", "b"]) == ("a", "b") and KEYS["texts"].accept("ab") == ("ab",)
    assert KEYS["pair"].accept([1, 2]) == (1, 2)
    assert type(KEYS["cold"].accept(1)) is float and KEYS["absent"].accept(None) is None


def test_spelled_reads_back() -> None:
    for each in KEYS.values():
        if each.default is not None:
            assert each.read(each.spelled(each.default)) == each.default
    assert KEYS["pair"].spelled((8, 2048)) == "8x2048" and KEYS["truth"].spelled(False) == "false"
    assert KEYS["pair"].spelled(None) == ""


@pytest.mark.parametrize(
    "allowed, words",
    [
        (Range(), "a number"),
        (Range(low=1), "a number, at least 1"),
        (Range(1, 3), "a number from 1 to 3"),
        (Range(above=0), "a number above 0"),
        (Range(above=0, high=1), "a number above 0 and at most 1"),
        (Range(2, or_zero=True), "a number, 0 or at least 2"),
    ],
)
def test_ranges_say_what_they_take(allowed: Range, words: str) -> None:
    assert Key("x", float, False, 0.0, "a number", allowed).wanted() == words


def test_a_table_is_imported_when_it_is_needed() -> None:
    names = Names(("auto",), "epmoe.moe.placement:PLACEMENTS")
    assert names.known() == ["auto", "contiguous"] and names.holds("contiguous") and not names.holds("a:b")
    with pytest.raises(ModuleNotFoundError):
        Names(table="epmoe.nowhere:TABLE").known()


def test_schemas_nest() -> None:
    assert [*KEYS][-2:] == ["inner.share", "inner.name"] and groups_of(Outer) == {"inner": "a group"}
    made = build(Outer, {"count": 3, "inner.share": 0.25})
    assert made == Outer(count=3, inner=Inner(share=0.25))
    assert build(Outer, {}) == Outer()


def test_accept_all() -> None:
    made: Any = Inner(share=1, name="second")
    accept_all(made)
    assert type(made.share) is float
    with pytest.raises(UserError, match=r"^share=2 is out of range"):
        accept_all(Inner(share=2))
