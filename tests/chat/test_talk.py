"""Talk: what a source is asked, turn by turn, and what is on the screen."""

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from epmoe.chat.screen import Screen
from epmoe.chat.talk import Message, Said, Show, Talk
from epmoe.errors import UserError
from epmoe.server.openai.spoken import CALL, CONTENT, REASONING, Delta

THOUGHT, YES = Delta(REASONING, "They ask."), Delta(CONTENT, "Yes.")
CALLS = [
    Delta(CALL, "{", 0, "c1", "rain"), Delta(CALL, "}", 0), Delta(CALL, "", 1, "c2", "sun"), Delta(CALL, "{}", 1),
]  # fmt: skip


class Fake:
    """Says the next of its answers; an exception in one is raised there."""

    name = "fake"

    def __init__(self, *answers: Sequence[Delta | BaseException]) -> None:
        self.answers, self.asked = [*answers], list[list[Message]]()

    def answer(self, messages: Sequence[Message], show: Show) -> str:
        self.asked.append([*messages])
        for each in self.answers.pop(0):
            if isinstance(each, BaseException):
                raise each
            show(each)
        return "stop"

    def close(self) -> None: ...


Talked = Callable[..., tuple[str, str]]


@pytest.fixture
def talked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talked:
    """A conversation of these lines: standard output, standard error. `live`: as if at a terminal."""

    def run(source: Fake, lines: str, *, live: bool = False, dims: bool = False, system: str | None = None) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        monkeypatch.setattr("builtins.input", lambda prompt: _line(sys.stdin.readline()))
        screen = Screen()
        screen.live, screen.dims = live, dims
        Talk(source, screen, system).run()
        return capsys.readouterr()

    return run


def _line(text: str) -> str:
    if not text:
        raise EOFError
    return text.removesuffix("\n")


def test_turns_go_on_with_what_was_said(talked: Talked) -> None:
    source = Fake([THOUGHT, YES], [YES], [YES], [YES])
    out, err = talked(source, "One\nTwo\n/system Be brief.\n  Three \n/reset\n//four\n/quit\nFive\n", system="First.")
    answer = {"role": "assistant", "content": "Yes."}
    one: list[Message] = [{"role": "user", "content": "One"}, {**answer, "reasoning_content": "They ask."}]
    two: list[Message] = [*one, {"role": "user", "content": "Two"}]
    assert source.asked == [
        [{"role": "system", "content": "First."}, *one[:1]],
        [{"role": "system", "content": "First."}, *two],
        [{"role": "system", "content": "Be brief."}, *two, answer, {"role": "user", "content": "Three"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "/four"}],
    ]
    assert (out, err) == ("Yes.\n" * 4, "")


def test_what_was_stopped_stands_as_far_as_it_came(talked: Talked) -> None:
    """Without a word to the user, or with an error, nothing of the turn does."""
    source = Fake([YES, KeyboardInterrupt()], [THOUGHT, KeyboardInterrupt()], [UserError("too long")], [YES])
    out, err = talked(source, "One\nTwo\nThree\nFour\n", live=True)
    assert source.asked[-1] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Four"},
    ]
    assert err.count("epmoe: stopped\n") == 2 and err.count("epmoe: error: too long\n") == 1
    assert out == "Yes.\nThey ask.\nYes.\n\n"


def test_nobody_looks_on(talked: Talked, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake ends it, and Ctrl-C, too."""
    with pytest.raises(UserError, match="too long"):
        talked(Fake([UserError("too long")]), "One\nTwo\n")
    assert capsys.readouterr().out == ""
    with pytest.raises(KeyboardInterrupt):
        talked(Fake([YES, KeyboardInterrupt()]), "One\nTwo\n")
    with pytest.raises(UserError, match="/nothing is no command"):
        talked(Fake(), "/nothing\n")


def test_commands_are_explained(talked: Talked) -> None:
    err = talked(Fake(), "/help\n/nothing\n", live=True)[1]
    assert all(f"epmoe: {name}" in err for name in ("/reset", "/system", "/quit", "//")) and "/nothing is no" in err


@pytest.mark.parametrize(
    ("live", "dims", "expected"),
    [
        (True, True, "\x1b[2mThey ask.\x1b[0m\n\nYes.\n\nrain({})\nsun({})\n\n"),
        (True, False, "They ask.\n\nYes.\n\nrain({})\nsun({})\n\n"),
        (False, False, "Yes.\n\nrain({})\nsun({})\n"),
    ],
)
def test_what_is_on_the_screen(talked: Talked, live: bool, dims: bool, expected: str) -> None:
    assert talked(Fake([THOUGHT, YES, *CALLS]), "One\n", live=live, dims=dims)[0] == expected


def test_a_model_does_not_command_the_terminal(talked: Talked) -> None:
    text = "a\x1b[2J\x9b1m\r\x07\x7f\tb\né"
    assert talked(Fake([Delta(CONTENT, text)]), "One\n", live=True)[0] == "a�[2J�1m���\tb\né\n\n"
    assert talked(Fake([Delta(CONTENT, text)]), "One\n")[0] == text + "\n"


def test_an_answer_of_calls() -> None:
    said = Said()
    for each in (THOUGHT, *CALLS):
        said.add(each)
    message = said.message()
    assert message is not None and message["reasoning_content"] == "They ask." and message["content"] == ""
    assert [(each["id"], each["function"]) for each in message["tool_calls"]] == [
        ("c1", {"name": "rain", "arguments": "{}"}),
        ("c2", {"name": "sun", "arguments": "{}"}),
    ]
    said.add(YES)
    assert (said.message() or {}).keys() == {"role", "content", "tool_calls"}


def test_bytes_that_are_no_text(talked: Talked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="not UTF-8"):
        Screen().ask()
