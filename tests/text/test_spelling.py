"""Spelling: a character that a vocabulary has no token for is named; what is left out on purpose is not."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_bpe import make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from epmoe.errors import UserError
from epmoe.text import tokenizer as ours

LETTERS = ["Ġ", *"abcdefg", "Ã"]  # é is the bytes Ã ©


def byte_level(unknown: str | None = None, more: tuple[str, ...] = ()) -> Tokenizer:
    """Of some letters and the first byte of é."""
    names = [*LETTERS, *more, *([unknown] if unknown else [])]
    made = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def characters(text: str, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A token for each character of `text`, and nothing for others."""
    made = Tokenizer(models.BPE({letter: id for id, letter in enumerate(text)}, []))
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def stripped() -> Tokenizer:
    """é becomes e."""
    return characters("ae", normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]))


def with_added() -> Tokenizer:
    made = byte_level()
    made.add_special_tokens([AddedToken("<|é|>", normalized=False)])
    return made


def with_unknown() -> Tokenizer:
    made = byte_level("<unk>")
    made.add_special_tokens([AddedToken("<unk>", normalized=False)])
    return made


def unigram(unknown: int | None, pieces: str = "ab", *, bytes: bool = False) -> Tokenizer:
    vocab = [("<unk>", 0.0), *((piece, -1.0) for piece in pieces)]
    if bytes:
        vocab += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    return Tokenizer(models.Unigram(vocab, unknown, byte_fallback=bytes))


def words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def fallback(*missing: int) -> Tokenizer:
    """A character without a token becomes its bytes."""
    names = ["a", *(f"<0x{byte:02X}>" for byte in range(256) if byte not in missing)]
    return Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], byte_fallback=True))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Tokenizer]
    text: str
    finds: str | None  # what the message says of the first character; None: the text can be spelled


CASES = [
    Case("a letter", byte_level, "face z", r"'z' \(U\+007A, character 5\)"),
    Case("one of a character's bytes", byte_level, "cafég", r"'é' \(U\+00E9, character 3\)"),
    Case("all there is", byte_level, "a bag", None),
    Case("the token for the unknown", lambda: byte_level("<unk>"), "caf\u00e9", r"'é' .*character 3"),
    Case("the text of that token itself", with_unknown, "a<unk>b", None),
    Case("after the text of that token", with_unknown, "<unk>z", r"'z' .*character 5"),
    Case("within an added token", with_added, "a<|é|>b", None),
    Case("also outside an added token", with_added, "a<|é|>é", r"'é' .*character 6"),
    Case("bytes for it", lambda: fallback(), "aé東", None),
    Case("not all of its bytes", lambda: fallback(0xA9), "aé", r"'é' .*character 1"),
    Case("upper case", lambda: characters("ab", normalizers.Lowercase()), "aB", None),
    Case("upper case of none", lambda: characters("ab", normalizers.Lowercase()), "aBQ", r"'Q' .*character 2"),
    Case("composed", lambda: characters("ae\u00e9", normalizers.NFC()), "ae\u0301", None),
    Case("composed to none", lambda: characters("ae\u0301", normalizers.NFC()), "ae\u0301", r"'é' .*character 1"),
    Case("accents are stripped", stripped, "é", None),
    Case("unigram", lambda: unigram(0), "abz", r"'z' .*character 2"),
    Case("unigram, all there", lambda: unigram(0), "abba", None),
    Case("unigram with bytes", lambda: unigram(0, bytes=True), "abz東", None),
    Case("unigram without the unknown", lambda: unigram(None), "abz", "cannot encode the text"),
    Case("words", words, "a  b", None),
    Case("a word without the unknown", words, "a c", "cannot encode the text"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_character_without_a_token_is_named(tmp_path: Path, case: Case) -> None:
    case.make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = ours.Tokenizer(tmp_path / "tokenizer.json")
    for _ in range(2):  # the second time, what it has seen is remembered
        if case.finds is None:
            assert tokenizer.encode(case.text, special=False)
        else:
            with pytest.raises(UserError, match=case.finds):
                tokenizer.encode(case.text, special=False)


def test_a_byte_level_vocabulary_with_all_bytes_spells_everything(tmp_path: Path) -> None:
    tokenizer = ours.Tokenizer(make_tokenizer(tmp_path / "tokenizer.json"))
    text = "".join(chr(code) for code in [*range(0x800), 0x6771, 0xFFFD, 0x1F642, 0x10FFFD])
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
