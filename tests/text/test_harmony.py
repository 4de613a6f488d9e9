"""Messages out of ids: what the prompt began, what is no header, what is streamed; no text is lost whatever comes."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harmony_cases import CONTROLS, ENDS, Symbol, byte_ids, sequences
from scripted import save_tokenizer

from epmoe.text.harmony import BETWEEN_MESSAGES, Messages
from epmoe.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("harmony") / "tokenizer.json")


def encoded(tokenizer: Tokenizer, symbols: Sequence[Symbol] | str) -> list[int]:
    if isinstance(symbols, str):
        return tokenizer.encode(symbols, special=False)
    return byte_ids(symbols, tokenizer.tokenizer.token_to_id, int)


def told(parser: Messages) -> list[tuple[Any, ...]]:
    """(channel, text, complete) of each message, with the other fields behind where they say something."""
    return [
        (each.channel, each.text, each.complete, *filter(None, (each.recipient, each.content_type, each.name)))
        for each in parser.messages()
    ]


def read(tokenizer: Tokenizer, answer: str, prompt: str = "<|start|>assistant", **more: Any) -> Messages:
    """The parser after the whole answer; its pieces add up to its messages' texts."""
    parser = Messages(tokenizer, encoded(tokenizer, prompt), **more)
    pieces = [*map(parser.feed, encoded(tokenizer, answer)), parser.finish(complete=False)]
    assert "".join(pieces) == BETWEEN_MESSAGES.join(each.text for each in parser.messages() if each.text)
    return parser


START = "<|start|>assistant"
ANSWERS: dict[str, tuple[str, list[tuple[Any, ...]]]] = {
    "analysis and answer": (
        f"<|channel|>analysis<|message|>Easy.<|end|>{START}<|channel|>final<|message|>東京.<|return|>",
        [("analysis", "Easy.", True), ("final", "東京.", True)],
    ),
    "a call, the recipient first": (
        " to=functions.rain<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        [("commentary", "{}", True, "functions.rain", "<|constrain|>json")],
    ),
    "a call, the channel first": (
        "<|channel|>commentary to=functions.rain <|constrain|>json<|message|>{}<|call|>",
        [("commentary", "{}", True, "functions.rain", "<|constrain|>json")],
    ),
    "JSON for the user": (
        "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
        [("final", "{}", True, "<|constrain|>json")],
    ),
    "a tool's name": (
        f"<|message|>a<|end|><|start|>functions.a to=assistant<|channel|>commentary<|message|>b<|end|>{START}",
        [(None, "a", True), ("commentary", "b", True, "assistant", "functions.a")],
    ),
    "the header never ends": ("<|channel|>final The answer is 42.<|return|>", [("final", " The answer is 42.", True)]),
    "a garbled header, then text": (
        "<|channel|>?? <|end|> The answer<|return|>",
        [("??", " ", True), (None, " The answer", True)],
    ),
    "a header in a header": (
        f"<|channel|>final oh{START}<|channel|>final<|message|>42<|return|>",
        [("final", " oh", False), ("final", "42", True)],
    ),
    "two channels": ("<|channel|>a<|channel|>b<|message|>c<|end|>", [("a", "bc", True)]),
    "words are left over": ("<|channel|>final to=a to=b<|message|>c<|end|>", [("final", " to=a to=bc", True)]),
    "an unknown role": (
        "<|message|>a<|end|><|start|>weird<|message|>b<|end|>",
        [(None, "a", True), (None, "weirdb", True)],
    ),
    "the output ends in a header": ("<|channel|>final The", [("final", " The", False)]),
    "the output ends in a body": ("<|channel|>final<|message|>The", [("final", "The", False)]),
    "nothing": ("", []),
    "an empty message": ("<|channel|>analysis<|message|><|end|>", [("analysis", "", True)]),
    "text after the end": (
        "<|message|>a<|return|>b<|end|>c",
        [(None, "a", True), (None, "b", True), (None, "c", False)],
    ),
    "only the end of a body ends it": (
        f"<|message|>a<|channel|>b<|message|>c{START}<|constrain|>d<|startoftext|><|end|>",
        [(None, "abcassistantd", True)],
    ),
    "ends without a message": ("<|end|><|end|><|return|><|message|>a", [(None, "a", False)]),
    "special tokens in a header": ("<|channel|>fi<|startoftext|>nal<|message|>a", [("final", "a", False)]),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers(tokenizer: Tokenizer, case: str) -> None:
    answer, expected = ANSWERS[case]
    assert told(read(tokenizer, answer)) == expected


def test_a_tokens_name_in_letters_is_letters(tokenizer: Tokenizer) -> None:
    parser = Messages(tokenizer, encoded(tokenizer, START))
    for id in [*b" to=<|channel|>x", *encoded(tokenizer, "<|message|>"), *b"a<|end|>b"]:
        parser.feed(id)
    assert told(parser) == [(None, "a<|end|>b", False, "<|channel|>x")]


PROMPTS: dict[str, tuple[str, str, list[tuple[Any, ...]]]] = {
    "text alone": ("Hi", "a", [(None, "a", False)]),
    "an ended message": ("<|start|>user<|message|>Hi<|end|>", "a", [(None, "a", False)]),
    "a whole role": (START, " to=a<|message|>b", [(None, "b", False, "a")]),
    "a header up to the channel": (f"{START}<|channel|>", "final<|message|>Hello.", [("final", "Hello.", False)]),
    "half a channel": (f"{START}<|channel|>fi", "nal<|message|>Hello.", [("final", "Hello.", False)]),
    "half a channel, no header": (f"{START}<|channel|>fi", "nal Hello.", [("final", " Hello.", False)]),
    "half a recipient": (f"{START} to=func", "tions.a<|message|>b", [(None, "b", False, "functions.a")]),
    "half a recipient, no header": (f"{START} to=func", " x y<|end|>", [(None, " x y", True)]),
    "a token's name in a user's text": (
        f"<|start|>user<|message|>What is {START}",
        "<|channel|>final<|message|>a",
        [("final", "a", False)],
    ),
    "<|start|> alone": ("<|start|>", "assistant<|channel|>final<|message|>b", [("final", "b", False)]),
    "a body": (
        f"{START}<|channel|>analysis<|message|>They",
        " ask<|end|>b",
        [("analysis", " ask", True), (None, "b", False)],
    ),
    "a body without <|start|>": ("<|channel|>analysis<|message|>They", " ask", [("analysis", " ask", False)]),
    "a user's body": ("<|start|>user<|message|>Hi", " you<|end|>", [(None, " you", True)]),
    "no header": ("<|start|>user" + " much" * 40, " more<|end|>", [(None, " more", True)]),
    "half a character": (f"{START}<|message|>caf", "é", [(None, "é", False)]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_the_answer_goes_on_where_the_prompt_ends(tokenizer: Tokenizer, case: str) -> None:
    """And what the prompt wrote is not its text, nor does a stop string match it."""
    prompt, answer, expected = PROMPTS[case]
    assert told(read(tokenizer, answer, prompt)) == expected
    assert told(read(tokenizer, answer, prompt, stops=["Hi", "They", "caf", "much"])) == expected


def test_the_role_of_a_message_that_the_prompt_began(tokenizer: Tokenizer) -> None:
    (message,) = read(tokenizer, " you", "<|start|>user<|message|>Hi").messages()
    assert message.role == "user"
    assert [each.role for each in read(tokenizer, "a").messages()] == ["assistant"]


def streamed(tokenizer: Tokenizer, answer: Sequence[Symbol], **more: Any) -> list[str]:
    parser = Messages(tokenizer, encoded(tokenizer, START), **more)
    return [*map(parser.feed, encoded(tokenizer, answer)), parser.finish(complete=False)]


def test_text_is_streamed_at_once(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, ["<|message|>", "aé"]) == ["", "a", "", "é", ""]


def test_words_of_a_header_come_when_it_is_none(tokenizer: Tokenizer) -> None:
    assert streamed(tokenizer, ["a b", "<|end|>"]) == ["", "", "", "a b", ""]
    assert streamed(tokenizer, ["a b", "<|start|>"]) == ["", "", "", "a b", ""]
    assert streamed(tokenizer, ["a b"]) == ["", "", "", "a b"]
    assert streamed(tokenizer, ["a", " " * 9, "bcd"], longest_header=10) == [""] * 10 + [
        "a" + " " * 9 + "b",
        "c",
        "d",
        "",
    ]


def test_a_header_that_grows_too_long_is_none(tokenizer: Tokenizer) -> None:
    """It ends between two characters; what follows is text, and a header that follows is one."""
    answer = ["<|channel|>", "final x", "é" * 3, "y", "<|channel|>", "final", "<|message|>", "z"]
    for longest in range(7, 13):
        parser = Messages(tokenizer, encoded(tokenizer, START), longest_header=longest)
        pieces = [*map(parser.feed, encoded(tokenizer, answer)), parser.finish(complete=False)]
        assert told(parser) == [("final", " x" + "é" * 3 + "y", False), ("final", "z", False)]
        assert "\ufffd" not in "".join(pieces) and sum(map(bool, pieces)) > 2
    name = "functions." + "x" * 64
    assert told(read(tokenizer, f" to={name}<|channel|>commentary<|message|>a"))[0][3] == name


def test_tokens_need_not_be_marked_special(tmp_path: Path) -> None:
    unmarked = save_tokenizer(tmp_path / "tokenizer.json", marked=False)
    assert len(unmarked.special_ids) == 2 + len(CONTROLS)
    for answer, expected in ANSWERS.values():
        assert told(read(unmarked, answer)) == expected


def test_without_the_markup_all_is_one_message(tmp_path: Path) -> None:
    names = {"<|start|>": 256, "<|message|>": 257, "<|endoftext|>": 258}
    plain = save_tokenizer(tmp_path / "tokenizer.json", controls=names, marked=False)
    parser = read(plain, "<|start|>a<|message|>b<|endoftext|>c", "a", stops=["x"])
    assert told(parser) == [(None, "<|start|>a<|message|>bc", False)]
    assert told(read(plain, "", "a")) == [(None, "", False)]


def test_the_end_of_the_text_completes_the_message(tokenizer: Tokenizer) -> None:
    for answer in ("<|message|>a", "a", "<|channel|>final a"):
        parser = Messages(tokenizer, encoded(tokenizer, START))
        for id in encoded(tokenizer, answer):
            parser.feed(id)
        parser.finish(complete=True)
        assert [each.complete for each in parser.messages()] == [True]


# --- stop strings -----------------------------------------------------------------------------------------------------

THOUGHT = f"<|channel|>analysis<|message|>I know. END<|end|>{START}<|channel|>"
STOPS: dict[str, tuple[str, list[str], list[tuple[Any, ...]], bool]] = {
    "in the answer": (THOUGHT + "final<|message|>a END b", ["END"], [("final", "a ", False)], True),
    "in plain text": ("<|end|>a END b", ["END"], [(None, "a ", False)], True),
    "in analysis": (THOUGHT, ["END"], [], False),
    "in a preamble": (THOUGHT + "commentary<|message|>a END b", ["END"], [("commentary", "a END b", False)], False),
    "in a call": (" to=a<|message|>a END b", ["END"], [(None, "a END b", False, "a")], False),
    "between messages": (THOUGHT + "final<|message|>a", ["\n\n", "\n"], [("final", "a", False)], False),
    "across messages": ("<|message|>a<|end|>b", ["ab", "a\n\nb"], [(None, "a", True), (None, "b", False)], False),
    "the beginning in one, the end in another": (
        "<|message|>aE<|end|>ND",
        ["END"],
        [(None, "aE", True), (None, "ND", False)],
        False,
    ),
    "across a control token in a body": ("<|message|>aEN<|channel|>D", ["END"], [(None, "a", False)], True),
    "in what was no header": ("<|channel|>final a END b<|end|>", ["END"], [("final", " a ", False)], True),
    "in a header": ("<|channel|>final<|message|>a", ["final"], [("final", "a", False)], False),
    "nothing after it": ("<|message|>a END<|end|>b", ["END"], [(None, "a ", False)], True),
}


@pytest.mark.parametrize("case", STOPS)
def test_stop_strings_match_what_the_model_wrote_in_its_answer(tokenizer: Tokenizer, case: str) -> None:
    answer, stops, expected, stopped = STOPS[case]
    parser = read(tokenizer, answer, stops=stops)
    assert parser.stopped == stopped
    assert told(parser)[-len(expected) :] == expected or not expected


# --- whatever comes ---------------------------------------------------------------------------------------------------


def test_no_word_is_lost_whatever_comes(tokenizer: Tokenizer) -> None:
    """Many texts get a character of their own, which then stands once in a text or a field of a header."""
    rng = random.Random(5)
    for symbols in sequences(3000, seed=2):
        numbered: list[Symbol] = []
        for place, each in enumerate(symbols):
            numbered.append(each)
            if isinstance(each, str) and each not in CONTROLS and rng.random() < 0.5:
                numbered.append(chr(0x4E00 + place))
        for prompt in ("", START):
            parser = Messages(tokenizer, encoded(tokenizer, prompt), longest_header=rng.choice((8, 20, 128)))
            pieces = [*map(parser.feed, encoded(tokenizer, numbered)), parser.finish(complete=False)]
            assert "".join(pieces) == BETWEEN_MESSAGES.join(each.text for each in parser.messages() if each.text)
            fields = [
                [each.text, each.name, each.channel, each.recipient, each.content_type] for each in parser.messages()
            ]
            found = "\n".join(field or "" for each in fields for field in each)
            own = [each for each in numbered if isinstance(each, str) and 0x4E00 <= ord(each[0]) < 0x4E80]
            assert [each for each in own if found.count(each) != 1] == [], (prompt, numbered, fields)


def test_messages_end_where_they_are_ended(tokenizer: Tokenizer) -> None:
    """As many are complete as ends have come to a message, however much else came."""
    for symbols in sequences(1000, seed=3):
        parser = Messages(tokenizer)
        for id in encoded(tokenizer, symbols):
            parser.feed(id)
        parser.finish(complete=False)
        assert sum(each.complete for each in parser.messages()) <= sum(each in ENDS for each in symbols)


@pytest.mark.parametrize("name", ["text", "bytes", "headers", "messages", "channels", "stop strings"])
def test_time_is_linear_in_the_ids(tokenizer: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in ids that are decoded, however many there are."""
    ids = {
        "text": [97],
        "bytes": [0x80],
        "headers": encoded(tokenizer, "<|start|> x "),
        "messages": encoded(tokenizer, "<|message|>a<|end|>"),
        "channels": encoded(tokenizer, "<|channel|>"),
        "stop strings": [97],
    }[name]
    decoded = 0

    def counted(self: Tokenizer, ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return plain(self, ids)

    plain = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", counted)
    parser = Messages(tokenizer, encoded(tokenizer, START), ["a" * 3000 + "b"] if name == "stop strings" else ())
    for id in ids * (3000 // len(ids)):
        parser.feed(id)
    parser.finish(complete=False)
    assert decoded <= 3000 * 20
