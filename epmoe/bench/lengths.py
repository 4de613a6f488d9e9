"""Distributions of lengths, in tokens, as a key spells them.

128                      always
uniform:16:256           from 16 to 256, each with the same chance
lognormal:200:0.8:4000   half of them below 200; the logarithm's standard deviation is 0.8; 4000 at most
"""

import math
import random
from dataclasses import dataclass, fields
from typing import Protocol

from epmoe.errors import UserError

FORMS = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA:MOST"


class Lengths(Protocol):
    """A distribution of whole numbers above 0."""

    @property
    def most(self) -> int: ...

    def draw(self, rng: random.Random) -> int: ...


@dataclass(frozen=True)
class Fixed:
    most: int

    def holds(self) -> bool:
        return self.most > 0

    def draw(self, rng: random.Random) -> int:
        return self.most


@dataclass(frozen=True)
class Uniform:
    low: int
    most: int

    def holds(self) -> bool:
        return 0 < self.low <= self.most

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.most)


@dataclass(frozen=True)
class LogNormal:
    """exp(N(log median, sigma²)), rounded, from 1 to `most`."""

    median: int
    sigma: float
    most: int

    def holds(self) -> bool:
        return 0 < self.median <= self.most and 0 < self.sigma <= 10

    def draw(self, rng: random.Random) -> int:
        return min(max(round(rng.lognormvariate(math.log(self.median), self.sigma)), 1), self.most)


DISTRIBUTIONS: dict[str, type[Fixed | Uniform | LogNormal]] = {
    "fixed": Fixed,
    "uniform": Uniform,
    "lognormal": LogNormal,
}


def read_lengths(key: str, word: str) -> Lengths:
    """The distribution that `word` spells.

    Raises:
        UserError: it spells none; `key` is the configuration key, for the message.
    """
    name, *values = word.split(":")
    if not values:
        name, values = "fixed", [name]
    try:
        kind = DISTRIBUTIONS[name]
        types = [float if field.type is float else int for field in fields(kind)]
        made = kind(*(each(value) for each, value in zip(types, values, strict=True)))  # type: ignore[arg-type]
    except (KeyError, ValueError, OverflowError):
        made = Fixed(0)
    if not made.holds() or made.most > 2**31:
        raise UserError(f"{key}={word!r} is no distribution of lengths: it takes {FORMS}, whole numbers above 0")
    return made
