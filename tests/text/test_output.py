"""Output: texts in the order of the prompts, stop strings, what a record holds, readers that go away."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from harmony_cases import CONTROLS
from scripted import save_tokenizer

from epmoe.engine.request import Request, Result, SamplingParams, TokenLogprobs
from epmoe.errors import UserError
from epmoe.text.output import Output
from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    """Ids 0 to 255 are bytes."""
    return Tokenizer.of(Checkpoint.open(tiny_checkpoint))


def output(tokenizer: Tokenizer, count: int, stop: tuple[str, ...] = (), main: bool = True) -> Output:
    requests = [Request((1,), SamplingParams(stop=stop))] * count
    return Output(tokenizer, requests, io.StringIO() if main else None)


def printed(out: Output) -> str:
    assert isinstance(out.stdout, io.StringIO)
    return out.stdout.getvalue()


DONE = Result((), "length", 0.1, 0.2, ())


def test_one_text_is_streamed(tokenizer: Tokenizer) -> None:
    out = output(tokenizer, 1)
    shown = []
    for byte in "aé".encode():
        assert not out.on_token(0, byte)
        shown.append(printed(out))
    out.on_finish(0, DONE)
    assert [*shown, printed(out)] == ["a", "a", "aé", "aé\n"]


def test_several_texts_come_in_order(tokenizer: Tokenizer) -> None:
    out = output(tokenizer, 3)
    for index, letter in ((0, "a"), (2, "x"), (1, "m"), (0, "b")):
        out.on_token(index, ord(letter))
    assert printed(out) == "ab"  # the first is streamed, the others wait
    out.on_finish(2, DONE)
    out.on_finish(0, DONE)
    assert printed(out) == "ab\n\nm"  # now the second is streamed
    out.on_finish(1, DONE)
    assert printed(out) == "ab\n\nm\n\nx\n"


@pytest.mark.parametrize("main", [True, False])
def test_every_rank_sees_a_stop_string(tokenizer: Tokenizer, main: bool) -> None:
    out = output(tokenizer, 1, ("END",), main)
    assert [out.on_token(0, byte) for byte in b"aEEND"] == [False, False, False, False, True]
    out.on_finish(0, DONE)
    assert "".join(out.answers[0].pieces) == "aE"
    if main:
        assert printed(out) == "aE\n"


def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    out = output(tokenizer, 1, ("END",))
    for byte in b"aEN\xc3":  # half a stop string, half a character
        out.on_token(0, byte)
    assert printed(out) == "a"
    out.on_finish(0, DONE)
    assert printed(out) == "aEN\ufffd\n"


def test_a_special_token_as_a_stop_string(tokenizer: Tokenizer) -> None:
    """It ends the answer wherever it comes, within a header too, and is no text; spelled in letters, in the answer."""
    ids = {name: tokenizer.special_names[name] for name in ("<|end|>", "<|message|>", "<|channel|>", "<|startoftext|>")}
    for stop, before, text in (
        ("<|end|>", b"a", "a"),
        ("<|message|>", b"a", "a"),
        ("<|channel|>", b"a", "a"),
        ("<|startoftext|>", b"a\xc3", "a\ufffd"),
    ):
        out = output(tokenizer, 1, ("#", stop))
        assert [out.on_token(0, id) for id in (*before, ids[stop])] == [False] * len(before) + [True]
        out.on_finish(0, Result((*before, ids[stop]), "stop", 0.1, 0.2, ()))
        assert out.answers[0].text == text and out.answers[0].parser.stopped is False
        assert out.answers[0].messages[0].complete == (stop == "<|end|>")
        out = output(tokenizer, 1, ("#", stop))
        assert [out.on_token(0, byte) for byte in f"b{stop}".encode()][-1]
        assert out.answers[0].text == "b"


def test_an_added_token_as_a_stop_string(tmp_path: Path) -> None:
    """In analysis too, where a stop string in letters finds nothing; other added tokens are text."""
    names = {name: 256 + place for place, name in enumerate(("<tool>", "ab", *CONTROLS))}
    own = save_tokenizer(tmp_path / "tokenizer.json", controls=names)
    ids = own.encode("<|channel|>analysis<|message|>aab<tool>", special=False)
    out = output(own, 1, ("<tool>",))
    assert [out.on_token(0, id) for id in ids] == [False] * (len(ids) - 1) + [True]
    out.on_finish(0, Result(tuple(ids), "stop", 0.1, 0.2, ()))
    assert out.answers[0].text == "aab" and not out.answers[0].messages[0].complete


@pytest.mark.parametrize(
    ("last", "reason", "text", "complete"),
    [
        ("<|return|>", "eos", "a", True),
        ("<|endoftext|>", "eos", "a", True),
        ("z", "eos", "a", True),  # an end-of-text token that is not special is no text either
        ("<|end|>", "stop", "a", True),
        ("<|startoftext|>", "stop", "a", False),
        ("z", "stop", "a", False),
        ("z", "length", "a", False),
    ],
)
def test_what_ended_the_answer_may_complete_its_message(
    tokenizer: Tokenizer, last: str, reason: str, text: str, complete: bool
) -> None:
    out = output(tokenizer, 1)
    out.on_token(0, ord("a"))
    (id,) = tokenizer.encode(last, special=False)
    out.on_finish(0, Result((97, id), reason, 0.1, 0.2, ()))
    assert [(each.text, each.complete) for each in out.answers[0].messages] == [(text, complete)]


@pytest.mark.parametrize("reason", ["length", "eos"])
def test_a_stop_string_in_what_was_no_header_is_a_stop(tokenizer: Tokenizer, reason: str) -> None:
    """Though that is known only at the end."""
    request = Request(tuple(tokenizer.encode("<|start|>assistant", special=False)), SamplingParams(stop=("END",)))
    out = Output(tokenizer, [request], io.StringIO())
    ids = tuple(b"a END b")
    assert not any(out.on_token(0, id) for id in ids)
    ended = (tokenizer.special_names["<|return|>"],) if reason == "eos" else ()
    out.on_finish(0, Result(ids + ended, reason, 0.1, 0.2, ()))
    assert printed(out) == "a \n" and out.answers[0].finish_reason == "stop"


def test_record_of_a_request(tokenizer: Tokenizer) -> None:
    out = Output(tokenizer, [Request((1, 2, 3), SamplingParams(logprobs=2))], io.StringIO())
    out.on_token(0, ord("a"))
    logprobs = (TokenLogprobs(-0.5, ((97, -0.5), (98, -2.0))),)
    out.on_finish(0, Result((97,), "stop", 0.25, 0.5, logprobs))
    line = json.loads(json.dumps(out.record(0, Result((97,), "stop", 0.25, 0.5, logprobs))))
    assert line == {
        "prompt_tokens": 3,
        "ids": [97],
        "text": "a",
        "messages": [
            {
                "role": "assistant",
                "name": None,
                "channel": None,
                "recipient": None,
                "content_type": None,
                "text": "a",
                "complete": False,
            }
        ],
        "finish_reason": "stop",
        "seed": 0,
        "first_token_s": 0.25,
        "total_s": 0.5,
        "logprobs": [{"logprob": -0.5, "top": [[97, -0.5], [98, -2.0]]}],
    }


def test_record_of_a_prompts_log_probabilities(tokenizer: Tokenizer) -> None:
    found = (None, TokenLogprobs(-0.5, ((97, -0.25),)))
    for asked in (1, None):
        out = Output(tokenizer, [Request((1, 2), SamplingParams(prompt_logprobs=asked))], io.StringIO())
        out.on_finish(0, (result := Result((97,), "length", 0.1, 0.2, (), prompt_logprobs=found if asked else ())))
        line = json.loads(json.dumps(out.record(0, result)))
        wanted = [None, {"logprob": -0.5, "top": [[97, -0.25]]}] if asked else None
        assert line.get("prompt_logprobs") == wanted and "logprobs" not in line


class Gone(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_goes_away_ends_nothing_while_answers_are_kept(tokenizer: Tokenizer) -> None:
    kept: list[tuple[int, str, str]] = []

    def keep(index: int, record: dict[str, Any]) -> None:
        kept.append((index, record["text"], record["finish_reason"]))

    out = Output(tokenizer, [Request((1,), SamplingParams())] * 2, Gone(), keep)
    for index, letter in ((0, "a"), (1, "x"), (0, "b")):
        out.on_token(index, ord(letter))
    out.on_finish(1, DONE)
    assert kept == [(1, "x", "length")]  # at once, though it is not its turn to be printed
    out.on_finish(0, DONE)
    assert kept[1:] == [(0, "ab", "length")]
    with pytest.raises(BrokenPipeError):
        Output(tokenizer, [Request((1,), SamplingParams())], Gone()).on_token(0, ord("a"))


def test_an_answer_is_kept_before_it_is_printed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under standard output takes no answer with it."""
    kept: list[int] = []
    out = Output(tokenizer, [Request((1,), SamplingParams())], io.StringIO(), lambda index, record: kept.append(index))
    monkeypatch.setattr(out.stdout, "flush", full_disk)
    with pytest.raises(UserError, match="No space left"):
        out.on_finish(0, DONE)
    assert kept == [0]


def test_texts_are_fed_without_standard_output(tokenizer: Tokenizer) -> None:
    """It may be closed; the record has the text all the same."""
    kept: list[str] = []
    requests = [Request((1,), SamplingParams())]
    out = Output(tokenizer, requests, None, lambda index, record: kept.append(record["text"]))
    out.on_token(0, ord("a"))
    out.on_finish(0, DONE)
    assert kept == ["a"]


def test_an_answer_that_failed_is_no_text(tokenizer: Tokenizer) -> None:
    failed = Result((), "error", 0.1, 0.2, ())
    out = output(tokenizer, 3, ("END",))
    out.on_token(1, ord("a"))
    for index in range(3):
        out.on_finish(index, failed)
    assert printed(out) == "a\n\n"  # the tokens before it failed
    assert [each.finish_reason for each in out.answers] == ["error"] * 3


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_full_disk_is_one_line(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    out = output(tokenizer, 1)
    monkeypatch.setattr(out.stdout, "flush", full_disk)
    with pytest.raises(UserError, match=r"standard output cannot be written \(No space left on device\)"):
        out.on_token(0, ord("a"))
