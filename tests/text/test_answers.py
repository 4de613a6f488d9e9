"""Answers: written as they finish, put under their name at the end, gone on from; places that cannot be written."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from epmoe.engine.request import Request, SamplingParams
from epmoe.errors import UserError
from epmoe.ranks import ending
from epmoe.text import answers as answers_file
from epmoe.text.answers import Answers, check_writable, opened

REQUESTS = [Request((1, number), SamplingParams()) for number in range(4)]
MODEL = {"hidden": 8}


def record(text: str, reason: str = "eos") -> dict[str, Any]:
    return {"ids": [ord(letter) for letter in text], "text": text, "finish_reason": reason}


def begun(name: Path, *, resume: bool = False, requests: list[Request] = REQUESTS) -> Answers:
    made = Answers(str(name), resume=resume)
    made.remaining(requests, MODEL)
    return made


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def texts(file: Path) -> list[tuple[int, str]]:
    return [(line["index"], line["text"]) for line in lines(file)]


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture(autouse=True)
def nobody_has_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of other tests that ended early have left theirs."""
    monkeypatch.setattr(ending, "WAYS", [])


def test_each_answer_is_in_the_file_at_once_and_all_in_order_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "o.jsonl"
    file.write_text("old\n")
    with opened(str(file), resume=False) as answers, file.open() as old:
        assert answers.remaining(REQUESTS, MODEL) == [0, 1, 2, 3]
        for index, text in ((2, "c"), (0, "é\u2028"), (3, "d")):
            answers.add(index, record(text))
            assert texts(tmp_path / "o.jsonl.unfinished")[-1] == (index, text)
            assert file.read_text() == "old\n"
        answers.add(1, record("b", "error"))
        answers.finish()
        assert old.read() == "old\n"  # replaced in one step, not written over
    assert texts(file) == [(0, "é\u2028"), (1, "b"), (2, "c"), (3, "d")]
    assert names(tmp_path) == {"o.jsonl"} and ending.WAYS == []


def test_a_run_that_ends_early_leaves_what_is_finished_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "o.jsonl"
    with pytest.raises(KeyError), opened(str(file), resume=False) as answers:
        answers.remaining(REQUESTS, MODEL)
        answers.add(2, record("c"))
        raise KeyError
    assert names(tmp_path) == {"o.jsonl.unfinished"}
    (words,) = ending.WAYS
    assert words() == f"epmoe: 1 answer kept in {file}.unfinished: go on from there with resume=true"
    with pytest.raises(UserError, match=r"o\.jsonl\.unfinished has answers .* resume=true, or remove it"):
        Answers(str(file), resume=False)
    assert texts(tmp_path / "o.jsonl.unfinished") == [(2, "c")]
    with opened(str(file), resume=True) as again:
        assert again.remaining(REQUESTS, MODEL) == [0, 1, 3]
        for which, text in ((1, "b"), (2, "d"), (0, "a")):
            again.add(which, record(text))
        again.finish()
    assert texts(file) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")] and names(tmp_path) == {"o.jsonl"}


def test_a_run_without_an_answer_leaves_nothing(tmp_path: Path) -> None:
    for reasons in ([], ["error"]):
        with pytest.raises(KeyError), opened(str(tmp_path / "o.jsonl"), resume=False) as answers:
            answers.remaining(REQUESTS, MODEL)
            for reason in reasons:
                answers.add(0, record("", reason))
            raise KeyError
        assert names(tmp_path) == set() and ending.WAYS.pop()() == ""


def test_the_end_on_another_thread(tmp_path: Path) -> None:
    """The watch ends a process while the block runs: the words come, and nothing is written after them."""
    with pytest.raises(SystemExit), opened(str(tmp_path / "o.jsonl"), resume=False) as answers:
        answers.remaining(REQUESTS, MODEL)
        answers.add(0, record("a"))
        assert "1 answer kept in" in answers.last_words() and answers.turn.locked()
        answers.turn.release()  # the process would have ended
        raise SystemExit
    assert texts(tmp_path / "o.jsonl.unfinished") == [(0, "a")]
    with Answers(str(tmp_path / "p.jsonl"), resume=False).turn:  # its disk does not answer
        pass


def test_a_line_in_which_a_run_was_killed_is_dropped(tmp_path: Path) -> None:
    unfinished = tmp_path / "o.jsonl.unfinished"
    first = begun(tmp_path / "o.jsonl")
    for index in range(3):
        first.add(index, record("abc"[index]))
    first.close()
    whole = unfinished.read_bytes()
    last = len(whole.splitlines(keepends=True)[2])
    for cut in (1, 5, last - 1):
        unfinished.write_bytes(whole[:-cut])
        again = Answers(str(tmp_path / "o.jsonl"), resume=True)
        assert again.remaining(REQUESTS, MODEL) == [2, 3]
        assert unfinished.read_bytes() == whole[:-last]
        again.add(0, record("C"))
        again.close()
        assert texts(unfinished) == [(0, "a"), (1, "b"), (2, "C")]


def test_answers_that_failed_are_computed_again(tmp_path: Path) -> None:
    file = tmp_path / "o.jsonl"
    first = begun(file)
    for index, reason in enumerate(("eos", "error", "length", "stop")):
        first.add(index, record("abcd"[index], reason))
    first.finish()
    first.close()
    assert "has the other 3 answers; resume=true" in first.last_words()
    again = Answers(str(file), resume=True)
    assert again.remaining(REQUESTS, MODEL) == [1]
    again.add(0, record("B"))
    again.finish()
    assert texts(file) == [(0, "a"), (1, "B"), (2, "c"), (3, "d")]


def test_both_files_are_gone_on_from(tmp_path: Path) -> None:
    """A run that was resumed and ended early again, and one that was killed between its last two steps."""
    file = tmp_path / "o.jsonl"
    first = begun(file, requests=REQUESTS[:2])
    first.add(0, record("a"))
    first.add(1, record("b"))
    first.finish()
    first.close()
    second = begun(file, resume=True)
    assert second.rest == [2, 3]
    second.add(1, record("d"))
    second.close()
    kept = (tmp_path / "o.jsonl.unfinished").read_bytes()
    assert texts(tmp_path / "o.jsonl.unfinished") == [(0, "a"), (1, "b"), (3, "d")]
    third = begun(file, resume=True)
    assert third.rest == [2]
    third.add(0, record("c"))
    third.finish()
    third.close()
    assert texts(file) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    done, state = file.read_bytes(), file.stat()
    (tmp_path / "o.jsonl.unfinished").write_bytes(kept)
    fourth = begun(file, resume=True)
    assert fourth.rest == []
    fourth.finish()
    fourth.close()
    assert file.read_bytes() == done and names(tmp_path) == {"o.jsonl"}
    assert os.path.samestat(file.stat(), state)  # nothing was to be written


def test_two_runs_do_not_write_into_each_other(tmp_path: Path) -> None:
    file = tmp_path / "o.jsonl"
    first = begun(file)
    for resume in (False, True):
        with pytest.raises(UserError, match=r"is being written by another run: choose another file"):
            Answers(str(file), resume=resume)
    first.add(0, record("a"))
    first.close()
    assert texts(tmp_path / "o.jsonl.unfinished") == [(0, "a")]
    begun(file, resume=True).close()  # the lock has gone with it


def test_a_file_that_was_removed_while_its_lock_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run has come to its end between `open` and `flock`."""
    real = fcntl.flock
    removed: list[int] = []

    def flock(number: int, how: int) -> None:
        real(number, how)
        if not removed:
            (tmp_path / "o.jsonl.unfinished").unlink()
            removed.append(number)

    monkeypatch.setattr(answers_file.fcntl, "flock", flock)
    answers = begun(tmp_path / "o.jsonl")
    answers.add(0, record("a"))
    assert texts(tmp_path / "o.jsonl.unfinished") == [(0, "a")]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "o.jsonl", os.pwrite
    answers = begun(file)
    answers.add(0, record("a"))

    def half(number: int, data: bytes, place: int) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(number, data[:40], place)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(UserError, match=r"o\.jsonl cannot be written \(No space left on device\)"):
        answers.add(1, record("b" * 100))
    monkeypatch.setattr(os, "pwrite", real)
    assert (tmp_path / "o.jsonl.unfinished").read_bytes().endswith(b"}\n")  # no half line
    assert texts(tmp_path / "o.jsonl.unfinished") == [(0, "a")]
    for index in (1, 2, 3):
        answers.add(index, record("x"))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        answers.finish()
    assert names(tmp_path) == {"o.jsonl.unfinished"} and len(texts(tmp_path / "o.jsonl.unfinished")) == 4


def test_places_that_cannot_be_written_are_found_early(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new.jsonl"))
    for name, message in {str(tmp_path): "is a directory", str(tmp_path / "no" / "o.jsonl"): "does not exist"}.items():
        with pytest.raises(UserError, match=message):
            check_writable(name)


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    """Who may write to /dev would lose /dev/stdout to a file of that name."""
    os.mkfifo(tmp_path / "pipe")
    for name in (str(tmp_path / "pipe"), os.devnull):
        with pytest.raises(UserError, match="is no plain file"):
            check_writable(name)
    os.mkfifo(tmp_path / "o.jsonl.unfinished")
    with pytest.raises(UserError, match=r"unfinished is no plain file"):
        Answers(str(tmp_path / "o.jsonl"), resume=True)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/o.jsonl", "a" * 300, "a" * 250, "loop/o.jsonl", "file/o.jsonl"])
def test_a_strange_place_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the generation, not after it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output=.*: "):
        Answers(name, resume=False)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file, link = tmp_path / "there" / "file.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(file)
    answers = begun(link, requests=REQUESTS[:1])
    assert names(tmp_path / "there") == {"file.jsonl.unfinished"}
    answers.add(0, record("a"))
    answers.finish()
    assert link.is_symlink() and texts(file) == [(0, "a")] and names(tmp_path) == {"there", "link.jsonl"}
