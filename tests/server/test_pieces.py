"""JSON in pieces is the JSON of msgspec, and no piece is long."""

import random
from typing import Any

import msgspec

from epmoe.server.pieces import SLICE, encoded, gathered


def some(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind < 5:
        return (None, True, rng.uniform(-9, 9), rng.randrange(10**6), 'text "with" \u00e9\n')[kind]
    size = rng.choice([0, 1, 3, SLICE, SLICE + 1]) if depth == 1 else rng.randrange(4)
    if kind == 5:
        return {f"key {number}": some(rng, depth - 1) for number in range(size)}
    return [some(rng, depth - 1) for _ in range(size)]


def test_the_bytes_are_the_same() -> None:
    rng = random.Random(0)
    lengths = set()
    for number in range(300):
        value = {"a": some(rng, 3), "b": [some(rng, 2)] * (number % 3)}
        pieces = list(encoded(value))
        lengths.add(len(pieces))
        whole = msgspec.json.encode(value)
        assert b"".join(pieces) == whole
        parts = gathered(iter(pieces), 50)
        assert b"".join(parts) == whole and all(len(each) >= 50 for each in parts[:-1])
    assert len(lengths) > 10
    assert gathered(iter([])) == [b""]


def test_no_piece_has_more_than_a_slice() -> None:
    entries = [{"id:7": -1.5}] * (10 * SLICE + 1)
    pieces = list(encoded({"choices": [{"logprobs": {"top_logprobs": entries}}]}))
    assert max(each.count(b"id:7") for each in pieces) == SLICE
