"""Kept: responses that a client may come back to, by their ids, within bounds of number and bytes.

The one that was asked for least recently goes first. They live in the HTTP process, and end with it.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True)
class Limits:
    """What may be kept."""

    number: int = 1000
    size: int = 64 << 20  # bytes, of all together


class Kept:
    """Responses, each with the items of its conversation: what went in, and what came out."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.lock = threading.RLock()  # a long response comes from a thread of its own
        self.found: OrderedDict[str, bytes] = OrderedDict()  # the one that goes first stands first
        self.size = 0

    def keep(self, id: str, response: Mapping[str, Any], items: Sequence[Any]) -> None:
        """Keep it, if it fits at all; others go as far as they must."""
        data = msgspec.json.encode([response, items])
        with self.lock:
            self.drop(id)
            self.found[id] = data
            self.size += len(data)
            while len(self.found) > self.limits.number or self.size > self.limits.size:
                self.drop(next(iter(self.found)))

    def get(self, id: str) -> tuple[dict[str, Any], list[Any]] | None:
        """The response and its conversation, which goes last from now on."""
        with self.lock:
            if (data := self.found.get(id)) is None:
                return None
            self.found.move_to_end(id)
        response, items = msgspec.json.decode(data)
        return response, items

    def drop(self, id: str) -> bool:
        """Forget it; whether it was there."""
        with self.lock:
            data = self.found.pop(id, None)
            self.size -= 0 if data is None else len(data)
            return data is not None
