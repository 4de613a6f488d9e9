"""Our messages are openai-harmony's: on a record of its answers, and on thousands where the library is there.

scripts/record_harmony.py says how it is had; harmony_judge.py where the two differ on purpose.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harmony_cases import CONTROLS, Library, Symbol, Told, byte_ids, noise, oracle, sequences
from harmony_judge import differences
from scripted import save_tokenizer

from epmoe.text.harmony import Messages
from epmoe.text.tokenizer import Tokenizer

RECORD = Path(__file__).parent / "harmony_oracle.jsonl"
MODES = [(prompted, strict) for prompted in (True, False) for strict in (True, False)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("oracle") / "tokenizer.json")


def parsed(tokenizer: Tokenizer, ids: list[int], *, prompted: bool) -> Messages:
    prompt = tokenizer.encode("<|start|>assistant", special=False) if prompted else ()
    parser = Messages(tokenizer, prompt)
    for id in ids:
        parser.feed(id)
    parser.finish(complete=False)
    return parser


def record() -> list[tuple[list[Symbol], list[Told]]]:
    lines = [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]
    return [(line["symbols"], [Told(**each) for each in line["told"]]) for line in lines]


def test_messages_are_those_of_the_record(tokenizer: Tokenizer) -> None:
    told = compared = 0
    for symbols, answers in record():
        ids = byte_ids(symbols, tokenizer.tokenizer.token_to_id, int)
        for each in answers:
            found, count = differences(each, parsed(tokenizer, ids, prompted=each.prompted))
            assert found == [], (symbols, each)
            told, compared = told + len(each.messages), compared + count
    assert told > 300 and compared > 0.8 * told  # the others have a control token for a word, or come after one


@pytest.mark.parametrize("field", ["role", "name", "channel", "recipient", "content_type", "text"])
def test_the_comparison_sees_every_field(tokenizer: Tokenizer, field: str) -> None:
    symbols: list[Symbol] = [
        "<|message|>",
        "a",
        "<|end|>",
        "<|start|>",
        "f",
        " to=b",
        "<|channel|>",
        "c",
        " d",
        "<|message|>",
    ]
    parser = parsed(tokenizer, byte_ids(symbols, tokenizer.tokenizer.token_to_id, int), prompted=True)
    plain: dict[str, Any] = {"role": "assistant", "text": "a"}
    second = {"role": "tool", "name": "f", "channel": "c", "recipient": "b", "content_type": "d", "text": ""}
    assert differences(Told(True, True, True, [plain, second], True), parser) == ([], 2)
    changed = second | {field: "user" if field == "role" else "x"}
    assert len(differences(Told(True, True, True, [plain, changed], True), parser)[0]) == 1
    assert len(differences(Told(True, True, True, [plain], True), parser)[0]) == 1  # one too many
    assert len(differences(Told(True, True, True, [plain, second, second], True), parser)[0]) >= 1  # one too few


# --- with the library itself ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Library:
    found = Library.found()
    if isinstance(found, str):
        pytest.skip(f"{found}: only the record was compared")
    return found


@pytest.fixture(scope="module")
def whole_vocabulary(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its ids, in a tokenizer of ours."""
    controls = {name: library.control(name) for name in CONTROLS}
    return save_tokenizer(tmp_path_factory.mktemp("o200k") / "tokenizer.json", library.words, controls)


def answers(library: Library, count: int) -> Iterator[list[int]]:
    """Walks spelled in bytes; words of the whole vocabulary between control tokens; both mixed."""
    rng = random.Random(7)
    for number, symbols in enumerate(sequences(count, seed=rng.randrange(2**30))):
        ids = byte_ids(symbols, library.control, library.byte)
        if number % 3:
            words, share = len(library.words), 0.1 * (number % 3)
            ids = [rng.randrange(words) if id < words and rng.random() < share else id for id in ids]
        yield ids
        yield byte_ids(noise(rng), library.control, lambda _: rng.randrange(len(library.words)))


@pytest.mark.slow
def test_messages_are_those_of_the_library(library: Library, whole_vocabulary: Tokenizer) -> None:
    told = compared = asked = 0
    for ids in answers(library, 3000):
        ours = {prompted: parsed(whole_vocabulary, ids, prompted=prompted) for prompted in (True, False)}
        for prompted, strict in MODES:
            each = oracle(library.encoding, ids, prompted=prompted, strict=strict)
            found, count = differences(each, ours[prompted])
            assert found == [], (ids, each)
            told, compared, asked = told + len(each.messages), compared + count, asked + 1
    assert asked == 24000 and told > 4000 and compared > 0.8 * told


@pytest.mark.slow
def test_the_record_is_what_the_library_says(library: Library) -> None:
    for symbols, answers in record():
        ids = byte_ids(symbols, library.control, library.byte)
        told = [oracle(library.encoding, ids, prompted=prompted, strict=strict) for prompted, strict in MODES]
        assert answers == [each for each in told if each.messages]
