"""Messages are one line, short and printable, whatever value is in them."""

import pytest

from epmoe.errors import MOST, UserError, shown, warn


@pytest.mark.parametrize(
    ("message", "line"),
    [("plain", "plain"), ("two\nlines", "two\\nlines"), ("\udcff\x1b[2J", "\\udcff\\x1b[2J"), ("é 中", "é 中")],
)
def test_one_line(message: str, line: str) -> None:
    assert shown(message) == str(UserError(message)) == line


@pytest.mark.parametrize("filling", ["x", "\n", "\udcff", "中"])
def test_a_long_value_keeps_place_and_remedy(filling: str) -> None:
    line = str(UserError(f"prompts.jsonl:7: role={filling * 10**6} is unknown: give user or assistant"))
    assert len(line) <= MOST and line.isprintable()
    assert line.startswith("prompts.jsonl:7: role=") and line.endswith("is unknown: give user or assistant")


def test_a_warning_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    warn.cache_clear()
    for _ in range(3):
        warn("a\nb")
    assert capsys.readouterr().err == "epmoe: warning: a\\nb\n"
