"""Stream: pieces that add up to the text and end between characters; stop strings at any border."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bpe import SPECIAL, VOCAB, make_tokenizer

from epmoe.text.stream import StopStrings, TextStream
from epmoe.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.feed(token) for token in ids), stream.flush()]


@given(ids=st.lists(st.integers(0, VOCAB - 1), max_size=60))
@settings(max_examples=400, deadline=None)
def test_streamed_pieces_add_up_to_the_whole_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Random ids are mostly bytes that are no UTF-8, cut anywhere."""
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


# hypothesis tries the strings of the test files too, and a special token is no text
@given(text=st.text(max_size=40).filter(lambda text: not any(name in text for name in SPECIAL)))
@settings(max_examples=200, deadline=None)
def test_streamed_text_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokenizer, tokenizer.encode(text, special=False))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_streamed_at_once(tokenizer: Tokenizer) -> None:
    """Nothing but unfinished characters is held back."""
    ids = tokenizer.encode("the then there", special=False)
    assert all(streamed(tokenizer, ids)[:-1])


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the<|return|> then<|startoftext|>", special=False)
    assert "".join(streamed(tokenizer, ids)) == "the then"


def test_a_character_cut_by_a_special_token_stays_cut(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.tokenizer.get_vocab()
    ids = [vocab["Ã"], vocab["<|end|>"], vocab["©"], *tokenizer.encode("the", special=False)]  # C3 A9 is é
    assert "".join(streamed(tokenizer, ids)) == "\ufffd\ufffdthe"


def test_a_feed_does_not_grow_with_the_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the bytes are: those of a text that never ends in a whole character too."""
    vocab = tokenizer.tokenizer.get_vocab()
    longest = 0

    def counted(self: Tokenizer, ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return plain(self, ids)

    plain = Tokenizer.decode
    for letters in (["t"], ["\u0122"], ["Ã"], ["ð", "Ł"], ["Ã", "©", "t"]):  # 80; C3; F0 9F; C3 A9 74
        ids = [vocab[letters[place % len(letters)]] for place in range(2000)]
        whole = tokenizer.decode(ids)
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "decode", counted)
            pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == whole and max(map(len, pieces)) <= 4
    assert 0 < longest < 30


def cut(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stops)
    text = "".join(matcher.feed(piece) for piece in pieces)
    return text + matcher.flush(), matcher.found


STOPS = {
    "inside a piece": (["END"], ["some END more"], ("some ", True)),
    "across pieces": (["END"], ["some E", "N", "D more"], ("some ", True)),
    "almost": (["END"], ["some EN", "x EN"], ("some ENx EN", False)),
    "restart inside": (["aab"], ["aa", "ab", "c"], ("a", True)),
    "first to end wins": (["abcX", "bc"], ["abcX"], ("a", True)),
    "longer of two that end together": (["abc", "c"], ["zab", "c"], ("z", True)),
    "whichever is named first": (["c", "abc"], ["zab", "c"], ("z", True)),
    "at the very beginning": (["\n"], ["\n"], ("", True)),
    "none": ([], ["a", "b"], ("ab", False)),
    "nothing after it": (["."], ["a.", "b."], ("a", True)),
}


@pytest.mark.parametrize("case", STOPS)
def test_stop_strings(case: str) -> None:
    stops, pieces, expected = STOPS[case]
    assert cut(stops, pieces) == expected


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    borders=st.lists(st.integers(0, 30), max_size=10),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_do_not_depend_on_borders(text: str, stops: list[str], borders: list[int]) -> None:
    edges = sorted({0, len(text), *(b for b in borders if b < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    found, stopped = cut(stops, pieces)
    assert (found, stopped) == cut(stops, [text]) == cut(stops, list(text))
    assert not any(stop in found for stop in stops)
    assert text.startswith(found) and stopped == any(stop in text for stop in stops)
    if not stopped:
        assert found == text


def test_text_is_held_back_no_longer_than_needed() -> None:
    matcher = StopStrings(["END"])
    assert [matcher.feed(piece) for piece in ("aE", "N", "E", "x")] == ["a", "", "EN", "Ex"]


def test_another_text_may_come_after_one() -> None:
    """A stop string's beginning in the first does not go on in the second."""
    matcher = StopStrings(["END"])
    assert [matcher.feed("aEN"), matcher.flush(), matcher.feed("D"), matcher.feed("END")] == ["a", "EN", "D", ""]


@pytest.mark.parametrize(("stop", "letters"), [("a" * 5000 + "b", "a"), ("ab" * 3000 + "c", "ab"), ("a" * 5000, "aab")])
def test_a_long_stop_string_is_looked_for_in_linear_time(stop: str, letters: str) -> None:
    """Each character is looked at about twice; comparing each end of the text with each beginning takes minutes."""
    text = letters * (20000 // len(letters))
    matcher = StopStrings([stop])
    assert "".join(map(matcher.feed, text)) + matcher.flush() == text and not matcher.found
