"""JSON in pieces: what one call would write with Python's lock held, a second for 40 MB, is written bit by bit.

The bytes are those of msgspec.json.encode.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

SLICE = 500  # entries of a list that are written at once: a millisecond or so


def encoded(value: Any) -> Iterator[bytes]:
    """The JSON of what JSON can hold; long lists of it in slices."""
    if isinstance(value, dict):
        yield from _joined(b"{", (_entry(*each) for each in value.items()), b"}")
    elif isinstance(value, list) and len(value) > SLICE:
        slices = (value[begin : begin + SLICE] for begin in range(0, len(value), SLICE))
        yield from _joined(b"[", (iter([msgspec.json.encode(each)[1:-1]]) for each in slices), b"]")
    elif isinstance(value, list):
        yield from _joined(b"[", map(encoded, value), b"]")
    else:
        yield msgspec.json.encode(value)


def _entry(name: str, value: Any) -> Iterator[bytes]:
    yield msgspec.json.encode(name) + b":"
    yield from encoded(value)


def _joined(begin: bytes, parts: Iterator[Iterator[bytes]], end: bytes) -> Iterator[bytes]:
    yield begin
    for number, part in enumerate(parts):
        if number:
            yield b","
        yield from part
    yield end


def gathered(pieces: Iterator[bytes], size: int = 1 << 16) -> list[bytes]:
    """The same bytes in pieces of at least `size`, but for the last one."""
    found: list[bytes] = []
    part = bytearray()
    for each in pieces:
        part += each
        if len(part) >= size:
            found.append(bytes(part))
            part.clear()
    if part or not found:
        found.append(bytes(part))
    return found
