"""Ending: what a block has to say is said when it does not come to its end, and only then."""

import os

import pytest

from epmoe.ranks import ending


def test_words_of_blocks_that_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "WAYS", [])  # runs of other tests that ended early have left theirs
    said: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda number, data: said.append(data) if number == 2 else None)
    with ending.at_the_end(lambda: "never"):
        pass
    for words in ("first", "", "last"):
        with pytest.raises(KeyError), ending.at_the_end(lambda words=words: words):  # type: ignore[misc]
            raise KeyError
    ending.last_words()
    ending.last_words()
    assert said == [b"last\n", b"first\n"]


def test_standard_error_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(ending, "WAYS", [])
    monkeypatch.setattr(os, "write", gone)
    with pytest.raises(KeyError), ending.at_the_end(lambda: "words"):
        raise KeyError
    ending.last_words()
    assert ending.WAYS == []
