"""Compiling: on rank 0, the calls whose grammars are being compiled, so that no step of any rank waits for a compiler.

    submit ─▶ here ── an order, {"compile": [[number, grammar]]} ─▶ a thread of each rank ── its report ─▶ rank 0
               └── all ranks have it ─▶ the queue of the service, in the call's old place

All ranks keep the same grammars (engine/matcher.py), since rank 0 orders which: the MOST_COMPILED that were asked for
last, and none that a call on its way needs is dropped.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from epmoe.engine.call import Call
from epmoe.engine.matcher import MOST_COMPILED

_numbers = itertools.count()  # of orders: a report that comes late must mean no other grammar


@dataclass
class Waiting:
    """A call, its place in the queue, and which of the calls that came with it it is, from 1 on."""

    call: Call
    place: int
    which: int


@dataclass
class Known:
    """A grammar that some call has asked for."""

    missing: int  # ranks that have not reported it
    number: int = -1  # of its order; -1: there was none yet
    calls: list[Waiting] = field(default_factory=list)


class Compiling:
    """All of it under the service's lock.

    Args:
        ranks: that compile.
        most: grammars that they keep.
    """

    def __init__(self, ranks: int, most: int = MOST_COMPILED) -> None:
        self.ranks, self.most = ranks, most
        self.known: OrderedDict[str, Known] = OrderedDict()  # the one that was asked for last stands last
        self.failed: list[str] = []  # that ranks still hold
        self.full = False  # the last orders left some out, for which there was no room

    def add(self, waiting: Waiting) -> bool:
        """Let a call wait for its grammar; False: it need not, all ranks have it."""
        grammar = waiting.call.request.params.grammar
        assert grammar is not None
        entry = self.known.setdefault(grammar, Known(self.ranks))
        self.known.move_to_end(grammar)
        if entry.missing:
            entry.calls.append(waiting)
        return entry.missing > 0

    def calls(self) -> Iterator[Call]:
        """Those that wait."""
        return (each.call for entry in self.known.values() for each in entry.calls)

    def remove(self, call: Call) -> bool:
        """It waits no more; whether it did. Its grammar is compiled all the same, once it was ordered."""
        entry = self.known.get(call.request.params.grammar or "")
        found = [each for each in entry.calls if each.call is call] if entry else []
        for each in found:
            assert entry is not None
            entry.calls.remove(each)
        return bool(found)

    def clear(self) -> None:
        """Nobody waits any more."""
        for each in self.known.values():
            each.calls.clear()

    @property
    def news(self) -> bool:
        """Whether there are orders to give."""
        return bool(self.failed) or (not self.full and any(each.number < 0 for each in self.known.values()))

    def orders(self, needed: Callable[[], Collection[str | None]]) -> dict[str, Any]:
        """What all ranks are to drop and to compile now.

        Args:
            needed: grammars of calls that wait here no more, and that the engine does not have yet.
        """
        found: dict[str, Any] = {"drop": self.failed, "compile": []}
        self.failed, self.full = [], False
        fresh = {name: each for name, each in self.known.items() if each.number < 0}
        kept = len(self.known) - len(fresh)
        spare: list[str] = []
        if kept + len(fresh) > self.most:
            used = needed()
            spare = [name for name, each in self.known.items() if not (each.missing or each.calls or name in used)]
        for name, each in fresh.items():
            if not each.calls:  # whoever asked has gone
                del self.known[name]
                continue
            if kept == self.most:
                if not spare:
                    self.full = True  # until one is needed no more
                    break
                found["drop"].append(spare[0])
                del self.known[spare.pop(0)]
                kept -= 1
            each.number, kept = next(_numbers), kept + 1
            found["compile"].append([each.number, name])
        return {name: values for name, values in found.items() if values}

    def report(self, number: int, why: str) -> tuple[list[Waiting], list[Waiting]]:
        """A rank has what an order named, or cannot ("why"): calls that wait no more, and those that have failed."""
        name = next((name for name, each in self.known.items() if each.number == number), None)
        if name is None:
            return [], []  # another run of the service's, or it has failed already
        entry, self.full = self.known[name], False
        entry.missing -= 1
        if why:
            del self.known[name]
            self.failed.append(name)
            return [], entry.calls
        done, entry.calls = (entry.calls, []) if not entry.missing else ([], entry.calls)
        return done, []

    def restart(self) -> None:
        """The ranks have dropped all; what is still waited for is ordered anew."""
        self.failed = []
        self.known = OrderedDict((name, Known(self.ranks, calls=each.calls)) for name, each in self.known.items())
