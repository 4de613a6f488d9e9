"""JSON schemas at random, of which each has an answer of bounded length: nested, enum, pattern, $ref, lengths."""

import random
from typing import Any

WORDS = ("name", "town", "kind", "size", "note", "when", "list", "of", "next", "ok")
LEAVES: list[dict[str, Any]] = [
    {"type": "string", "maxLength": 8},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[a-z]{1,6}$"},
    {"type": "string", "pattern": "^(Mr|Mrs)\\. [A-Z][a-z]{2,5}$"},
    {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
    {"type": "integer", "minimum": -7, "maximum": 120},
    {"type": "integer", "exclusiveMinimum": 0, "maximum": 3},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 3, None, True]},
    {"const": {"a": [1, 2.5]}},
    {"type": ["boolean", "null"]},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
]


def schema(seed: int) -> dict[str, Any]:
    """The same for the same seed."""
    rng = random.Random(seed)
    shared = {"leaf": rng.choice(LEAVES), "pair": _object(rng, 1, 2, {})}
    own = {**_object(rng, 2, rng.randrange(1, 3), shared), "$defs": shared}
    return own if seed % 5 else {"type": "array", "items": own, "minItems": 1, "maxItems": 2} | {"$defs": shared}


def _any(rng: random.Random, depth: int, shared: dict[str, Any]) -> dict[str, Any]:
    if shared and rng.random() < 0.2:
        return {"$ref": f"#/$defs/{rng.choice([*shared])}"}
    if depth and rng.random() < 0.3:
        return _object(rng, depth - 1, rng.randrange(1, 3), shared)
    if depth and rng.random() < 0.3:
        least = rng.randrange(2)
        return {
            "type": "array",
            "items": _any(rng, depth - 1, shared),
            "minItems": least,
            "maxItems": least + rng.randrange(2),
        }
    return rng.choice(LEAVES)


def _object(rng: random.Random, depth: int, count: int, shared: dict[str, Any]) -> dict[str, Any]:
    names = rng.sample(WORDS, count)
    return {
        "type": "object",
        "properties": {name: _any(rng, depth, shared) for name in names},
        "required": names[: rng.randrange(1, count + 1)],
        "additionalProperties": False,
    }
