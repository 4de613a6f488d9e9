"""Distributions of lengths: what a word spells, and what is drawn."""

import random
import statistics

import pytest

from epmoe.bench.lengths import Fixed, LogNormal, Uniform, read_lengths
from epmoe.errors import UserError


def drawn(word: str, count: int = 20_000) -> list[int]:
    rng = random.Random(1)
    lengths = read_lengths("prompt_tokens", word)
    return [lengths.draw(rng) for _ in range(count)]


def test_words() -> None:
    assert read_lengths("a", "128") == read_lengths("a", "fixed:128") == Fixed(128)
    assert read_lengths("a", "uniform:16:256") == Uniform(16, 256)
    assert read_lengths("a", "lognormal:200:0.8:4000") == LogNormal(200, 0.8, 4000)


def test_what_is_drawn() -> None:
    """Median and spread as asked for, within 4 standard errors of 20,000 draws."""
    assert set(drawn("7")) == {7}
    uniform = drawn("uniform:3:12")
    assert set(uniform) == set(range(3, 13)) and statistics.mean(uniform) == pytest.approx(7.5, abs=4 * 2.88 / 141)
    found = drawn("lognormal:200:0.8:4000")
    assert min(found) >= 1 and max(found) == 4000  # z = 3.7: about two of them are cut
    assert statistics.median(found) == pytest.approx(200, rel=4 * 1.25 * 0.8 / 141)
    assert statistics.quantiles(found, n=100)[83] == pytest.approx(200 * 2.718**0.8, rel=0.05)
    assert set(drawn("lognormal:1:3:2")) == {1, 2}


WRONG = ["", "0", "-3", "1.5", "nan", "uniform:5", "uniform:9:3", "uniform:0:3", "uniform:1:2:3", "lognormal:10:0:20",
         "lognormal:10:nan:20", "lognormal:30:1:20", "lognormal:10:1", "zipf:3:4", "4294967296"]  # fmt: skip


@pytest.mark.parametrize("word", WRONG)
def test_mistakes(word: str) -> None:
    with pytest.raises(UserError, match=r"prompt_tokens=.* takes N, uniform:LOW:HIGH or lognormal") as error:
        read_lengths("prompt_tokens", word)
    assert "\n" not in str(error.value)
