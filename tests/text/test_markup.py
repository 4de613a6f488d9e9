"""Markup: what a header says, what can be read of one that is none, which message is the answer."""

import re

import pytest

from epmoe.text.markup import CHANNEL, CONSTRAIN, Header, Markup, parse, salvage


def spelled(text: str) -> str:
    return text.replace("<|channel|>", CHANNEL).replace("<|constrain|>", CONSTRAIN)


JSON = "<|constrain|>json"
HEADERS = {
    "assistant": Header(),
    " assistant\n": Header(),
    "user": Header("user"),
    "assistant<|channel|>final": Header(channel="final"),
    f"assistant<|channel|>final {JSON}": Header(channel="final", content_type=JSON),
    f"assistant<|channel|>final{JSON}": Header(channel="final", content_type=JSON),
    "assistant<|channel|>final <|constrain|> json": Header(channel="final", content_type=JSON),
    "assistant to=a<|channel|>commentary": Header(channel="commentary", recipient="a"),
    f"assistant to=a<|channel|>commentary {JSON}": Header("assistant", None, "commentary", "a", JSON),
    f"assistant<|channel|>commentary to=a {JSON}": Header("assistant", None, "commentary", "a", JSON),
    f"assistant<|channel|>commentary to=a{JSON}": Header("assistant", None, "commentary", "a", JSON),
    "assistant<|channel|>commentary to=a <|constrain|> json": Header("assistant", None, "commentary", "a", JSON),
    "assistant<|channel|>analysis to=python code": Header("assistant", None, "analysis", "python", "code"),
    "assistant<|channel|>analysis python": Header(channel="analysis", recipient="python"),
    "functions.a to=assistant<|channel|>commentary": Header("tool", "functions.a", "commentary", "assistant"),
    "assistant<|channel|>fin\u2003": Header(channel="fin"),
    "assistant to=a\u00a0b": Header(recipient="a\u00a0b"),  # words end at ASCII's spaces alone
}


@pytest.mark.parametrize("text", HEADERS)
def test_headers(text: str) -> None:
    assert parse(spelled(text), None) == HEADERS[text]
    if text.startswith("assistant"):
        assert parse(spelled(text.removeprefix("assistant")), "assistant") == HEADERS[text]


NONE = {
    "weird": (Header(), "weird"),
    "": (Header(), ""),
    "<|channel|>": (Header(), ""),
    "assistant<|channel|> x": (Header(), " x"),
    "assistant<|channel|>final The answer is\n 42. ": (Header(channel="final"), " The answer is\n 42. "),
    "user to=a to=b": (Header("user"), " to=a to=b"),
    "assistant<|channel|>a<|channel|>b": (Header(channel="a"), "assistantb"),
    "<|constrain|>x <|constrain|>y": (Header(), "x y"),
    "weird <|channel|>final<|constrain|>y z": (Header(channel="final"), "weird y z"),
}


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_header_keeps_its_words(text: str) -> None:
    assert parse(spelled(text), None) is None
    assert salvage(spelled(text), None, 0) == NONE[text]
    assert salvage(spelled(text), "assistant", 0)[1] == NONE[text][1].replace(" to=a to=b", "user to=a to=b")


@pytest.mark.parametrize(
    ("prompt", "own", "expected"),
    [
        ("assistant<|channel|>", "final 42", (Header(channel="final"), " 42")),
        ("assistant<|channel|>fi", "nal 42", (Header(channel="final"), " 42")),
        ("assistant<|channel|>final to", "=a b", (Header(channel="final"), "=a b")),
        ("assis", "tant 42", (Header(), " 42")),
        ("we", "ird", (Header(), "ird")),
        ("weird ", "<|channel|>final 42", (Header(channel="final"), " 42")),
    ],
)
def test_the_prompts_words_are_no_text(prompt: str, own: str, expected: tuple[Header, str]) -> None:
    assert salvage(spelled(prompt + own), None, len(spelled(prompt))) == expected


ANSWERS = {
    Header(): True,
    Header(channel="final"): True,
    Header(channel="final", content_type=JSON): True,
    Header(channel="analysis"): False,
    Header(channel="commentary"): False,  # a word to the user before a call is not the answer yet
    Header(channel="commentary", recipient="functions.a"): False,
    Header(recipient="functions.a"): False,
    Header("user"): False,
    Header("tool", "functions.a", "final"): False,
}


@pytest.mark.parametrize("header", ANSWERS)
def test_which_message_is_the_answer(header: Header) -> None:
    assert header.is_answer == ANSWERS[header]


def test_a_vocabulary_may_lack_all_but_three_tokens() -> None:
    names = {"<|start|>": 1, "<|channel|>": 2, "<|message|>": 3, "<|end|>": 4}
    markup = Markup.of(names.get)
    assert markup == Markup(1, 2, 3, None, frozenset({4})) and markup.ids == {1, 2, 3, 4}
    for name in [*names][:3]:
        assert Markup.of({other: id for other, id in names.items() if other != name}.get) is None


def test_spaces_are_read_in_linear_time() -> None:
    """A pattern such as " +$" would try each of them anew: minutes."""
    spaces = " " * 10**6
    assert parse(f"assistant{spaces}x{spaces}y z", None) is None
    assert parse(f"{spaces}assistant{spaces}{CHANNEL}final{spaces}", None) == Header(channel="final")
    header, text = salvage(f"{spaces}assistant{spaces}x", None, 0)
    assert header == Header() and re.fullmatch(" +x", text)
