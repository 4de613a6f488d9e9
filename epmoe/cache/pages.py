"""Who holds which pages of the key/value cache: accounts on the host, no tensors, so that a scheduler can ask freely.

    handle, cached = pages.admit(keys)      a sequence's handle, with the longest prefix that is there: its first tokens
    pages.grow(handle, begin, end)          pages for its next tokens; what these no longer see is given back
    pages.learn(handle, keys, count)        its first pages are full, and may be found by whoever begins alike
    pages.release(handle)                   its pages and its handle are free

Layers with the same window share a stock of pages (epmoe/cache/rows.py); a sequence holds pages of each stock. A page
has one writer: only full ones are shared, and full ones are never written again. One that nobody uses stays as it is
until its place is needed. The least recently used go first; before them all that a window has passed over, but for
where others are likely to branch off: at a prompt's end, and where a prompt left what was there already.

A page's key is a hash of all tokens up to its end, so it stands for its keys and values, bit for bit: nothing but a
token's history decides these. What is given to a new owner may still be read or written by steps that were launched
before; the new owner's come after them.
"""

import hashlib
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from epmoe.errors import UserError

# Sequences that share pages hold, together, as if each had its own, up to so many times the pages there are. It bounds
# the memory of attention's splits, which are counted by sequence (kernels/attention/launch.py).
SHARED = 4
# A row of a draft reads its sequence once more: of one with so many positions as often as it likes, beyond them within
# that bound.
DRAFTED = 8192

Ids = Callable[[int, int], Sequence[int]]  # the tokens begin : end of a sequence


class CacheFull(Exception):
    """The sequence does not fit now; it will when others were released."""


def extend(keys: list[bytes], ids: Ids, size: int, count: int) -> None:
    """Make `keys` those of a sequence's first `count` pages of `size` tokens: BLAKE2b of the last key and the tokens.

    32 bytes, so that nobody finds two histories with one key.
    """
    tokens = array("q", ids(len(keys) * size, count * size)).tobytes()
    key, width = keys[-1] if keys else b"", 8 * size
    for begin in range(0, (count - len(keys)) * width, width):
        key = hashlib.blake2b(tokens[begin : begin + width], digest_size=32, key=key).digest()
        keys.append(key)


@dataclass
class Held:
    """A sequence's pages of a stock, by their place in the sequence; those before `first` were given back."""

    pages: list[int] = field(default_factory=list)
    first: int = 0
    # Places before which others are likely to branch off: what their tokens see of a window stays the longer when that
    # has passed over it.
    branches: frozenset[int] = frozenset()


class Stock:
    """`count` pages for the layers that see `window` positions; None: all."""

    def __init__(self, window: int | None, count: int) -> None:
        self.window, self.count = window, count
        self.free = list(range(count))[::-1]  # nothing is known of what they hold
        self.users = [0] * count
        self.keys: list[bytes | None] = [None] * count
        self.found: dict[bytes, int] = {}  # key → page
        # Pages with a key that nobody uses, the least recently used first; `passed` go before all others.
        # (The first key of a plain dict is found in a time that grows with the keys that stood before it.)
        self.passed: OrderedDict[int, None] = OrderedDict()
        self.idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that may be taken."""
        return len(self.free) + len(self.passed) + len(self.idle)

    def first_seen(self, position: int) -> int:
        """The first position that a token sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window)

    def passes(self, position: int) -> int:
        """The first token that sees no position before this one."""
        return sys.maxsize if self.window is None else position + self.window - 1

    def take(self, count: int) -> list[int]:
        """So many pages for a new user, whatever they held."""
        rest = max(len(self.free) - count, 0)
        pages = self.free[rest:][::-1]  # which have no key, and are idle nowhere
        del self.free[rest:]
        while len(pages) < count:
            pages.append(next(iter(self.passed or self.idle)))
            self._forget(pages[-1])
        for page in pages:
            self.users[page] = 1
        return pages

    def share(self, key: bytes) -> int:
        """The page of this key, which has one more user."""
        page = self.found[key]
        self._wake(page)
        self.users[page] += 1
        return page

    def give_back(self, pages: Iterable[int], *, passed: bool = False) -> None:
        """One user less of each; nobody's page stays for whoever looks for its key."""
        users, unused = self.users, self.passed if passed else self.idle
        for page in pages:
            assert users[page] > 0, "a page was given back twice"
            users[page] -= 1
            if not users[page]:
                if self.keys[page] is None:
                    self.free.append(page)
                else:
                    unused[page] = None

    def learn(self, page: int, key: bytes) -> None:
        """The page holds what `key` stands for; the first one of a key is found, further ones are as good."""
        if self.keys[page] is None and key not in self.found:
            self.keys[page], self.found[key] = key, page

    def forget(self) -> None:
        """No page is found any more."""
        self.free.extend([*self.idle, *self.passed][::-1])
        for page in list(self.found.values()):
            self._forget(page)

    def _forget(self, page: int) -> None:
        self._wake(page)
        key, self.keys[page] = self.keys[page], None
        if key is not None:
            del self.found[key]

    def _wake(self, page: int) -> None:
        self.passed.pop(page, None)
        self.idle.pop(page, None)


class Pages:
    """Stocks of pages of `size` positions each, for up to `sequences` sequences at a time.

    Args:
        counts: window (None: full attention) → pages.
        most: positions of a sequence at most.
        prefix_cache: whether pages are found again; without it no page is shared or outlives its user.
    """

    def __init__(
        self, counts: dict[int | None, int], size: int, sequences: int, *, most: int, prefix_cache: bool = True
    ) -> None:
        self.size, self.sequences, self.most, self.prefix_cache = size, sequences, most, prefix_cache
        self.stocks = [Stock(window, count) for window, count in counts.items()]
        self.full = next((stock for stock in self.stocks if stock.window is None), None)
        self.free_handles = list(range(sequences))[::-1]
        self.held: dict[int, list[Held]] = {}  # by handle, in the stocks' order
        self.learnt: dict[int, int] = {}  # handle → its first pages whose keys are known
        self.calm: dict[int, int] = {}  # handle → up to this position it needs no other pages than it holds
        self.together = 0  # pages of full attention that sequences hold, each counted as often as it is shared
        self.changed: dict[tuple[int, int, int], int] = {}  # (stock, handle, place) → page, not yet told to the device

    def alike(self) -> "Pages":
        """Another cache's of the same sizes, empty."""
        counts = {stock.window: stock.count for stock in self.stocks}
        return Pages(counts, self.size, self.sequences, most=self.most, prefix_cache=self.prefix_cache)

    @property
    def count(self) -> int:
        """Pages of the layers with full attention; 0 where there are none."""
        return self.full.count if self.full else 0

    @property
    def room(self) -> int:
        """Most positions of one sequence."""
        return min(self.count * self.size, self.most) if self.full else self.most

    @property
    def left(self) -> int:
        """Pages of theirs that may be taken, or shared."""
        if self.full is None:
            return 0
        return min(self.full.available, SHARED * self.full.count - self.together)

    @property
    def unused(self) -> bool:
        """Whether no sequence has a handle or a page; what is found again does not count."""
        return not self.held and all(stock.available == stock.count for stock in self.stocks)

    def needs(self, tokens: int) -> int:
        """Pages of theirs of a sequence of that many positions."""
        return -(-tokens // self.size) if self.full else 0

    def lacks(self, handle: int, tokens: int) -> int:
        """Of these, those that the sequence does not hold yet."""
        return max(0, self.needs(tokens) - len(self._full_of(handle)))

    def readable(self, handle: int, rows: int, among: int) -> int:
        """How many rows of its draft, up to so many, may read a sequence's pages; as many sequences as `among` ask."""
        pages = len(self._full_of(handle))
        if self.full is None or pages * self.size <= DRAFTED:
            return rows
        return min(rows, (SHARED * self.full.count - self.together) // among // pages)

    def check(self, tokens: int) -> None:
        """Raises UserError for a sequence that would not fit into an empty cache either."""
        if self.needs(tokens) > self.count or tokens > self.most:
            raise UserError(
                f"a sequence of {tokens} tokens can never fit a cache of {self.room}: "
                "raise runtime.cache_tokens, or lower max_new_tokens"
            )

    def may_follow(self, key: bytes) -> bool:
        """Whether pages after the one of this key may be of use to a prompt that has it."""
        return self.full is None or key in self.full.found

    def longest(self, keys: Sequence[bytes]) -> int:
        """How many of these pages, from the first on, are there, as far as the token after them sees them."""
        known, windows = self._known(keys), [stock for stock in self.stocks if stock is not self.full]
        while known:
            missing = max((self._last_missing(stock, keys, known) for stock in windows), default=-1)
            if missing < 0:
                return known
            known = missing  # whoever goes on behind it sees it, as far as a window reaches
        return 0

    def _known(self, keys: Sequence[bytes]) -> int:
        """How many of these pages, from the first on, the layers that see all positions have."""
        return next((at for at, key in enumerate(keys) if self.full and key not in self.full.found), len(keys))

    def _last_missing(self, stock: Stock, keys: Sequence[bytes], count: int) -> int:
        """The last of the pages that the token behind the first `count` of these sees, and that is not there; or -1."""
        seen = range(count - 1, stock.first_seen(count * self.size) // self.size - 1, -1)
        return next((place for place in seen if keys[place] not in stock.found), -1)

    def admit(self, keys: Sequence[bytes] = (), whole: int = 0) -> tuple[int, int]:
        """A sequence's handle, and how many of its first positions are there, in whole pages.

        In each stock it holds those that the next token sees.

        Args:
            keys: of its prompt's pages, up to one that is not there at least.
            whole: how many pages the prompt fills, where that is more.
        Raises:
            CacheFull: no handle is free.
        """
        if not self.free_handles:
            raise CacheFull(f"{self.sequences} sequences are there already")
        if self.full:
            room = SHARED * self.full.count - self.together
            keys, whole = keys[:room], min(whole, room)
        whole = max(whole, len(keys))
        handle, count = self.free_handles.pop(), self.longest(keys)
        known = self._known(keys)
        self.held[handle], self.learnt[handle] = [], count
        for stock in self.stocks:
            own = Held(branches=frozenset((count, known, whole)))
            self.held[handle].append(own)
            self._skip(own, stock.first_seen(count * self.size) // self.size)
            self._append(handle, stock, own, list(map(stock.share, keys[own.first : count])))
        return handle, count * self.size

    def grow(self, handle: int, begin: int, end: int) -> int:
        """Pages for positions begin : end, the next ones to be computed, or for as many as there are pages; how many.

        What no token from `begin` on sees is given back.
        """
        if end <= self.calm.get(handle, 0):
            return end - begin
        held = list(zip(self.stocks, self.held[handle], strict=True))
        end = min(end, self.most)
        for stock, own in held:
            seen = stock.first_seen(begin) // self.size
            for place, page in enumerate(own.pages[own.first : seen], own.first):
                stock.give_back([page], passed=not self._lasts(stock, own, place))
            self._skip(own, seen)
            available = self.left if stock.window is None else stock.available
            end = min(end, (len(own.pages) + available) * self.size)
        for stock, own in held if end > begin else ():
            lacking = -(-end // self.size) - len(own.pages)
            self._append(handle, stock, own, stock.take(lacking))
        self.calm[handle] = min(
            min(len(own.pages) * self.size, stock.passes((own.first + 1) * self.size)) for stock, own in held
        )
        return max(0, end - begin)

    def holds(self, handle: int, begin: int, end: int) -> bool:
        """Whether it has pages for positions begin : end and what these see."""
        return all(
            own.first * self.size <= stock.first_seen(begin) and end <= len(own.pages) * self.size
            for stock, own in zip(self.stocks, self.held[handle], strict=True)
        )

    def learn(self, handle: int, keys: Sequence[bytes], count: int) -> None:
        """The sequence's first `count` pages hold what these keys stand for; its later steps may rely on that."""
        for stock, own in zip(self.stocks, self.held[handle], strict=True):
            for place in range(max(self.learnt[handle], own.first), count if self.prefix_cache else 0):
                stock.learn(own.pages[place], keys[place])
        self.learnt[handle] = max(self.learnt[handle], count)

    def release(self, handle: int) -> None:
        """Give a sequence's pages and its handle back."""
        self.together -= len(self._full_of(handle))
        for stock, own in zip(self.stocks, self.held.pop(handle), strict=True):
            stock.give_back(reversed(own.pages[own.first :]))  # a prefix outlives what follows it
        del self.learnt[handle]
        self.calm.pop(handle, None)
        self.free_handles.append(handle)

    def forget(self) -> None:
        """No page is found again: what they hold is of no use any more, as after other weights have come."""
        for stock in self.stocks:
            stock.forget()

    def told(self) -> dict[tuple[int, int, int], int]:
        """What has changed since the last call: (stock, handle, place in the sequence) → page."""
        changed, self.changed = self.changed, {}
        return changed

    def _append(self, handle: int, stock: Stock, own: Held, pages: list[int]) -> None:
        number = self.stocks.index(stock)
        for place, page in enumerate(pages, len(own.pages)):
            self.changed[number, handle, place] = page
        own.pages += pages
        self.together += len(pages) * (stock is self.full)

    def _lasts(self, stock: Stock, own: Held, place: int) -> bool:
        """Whether the first token of a page where others are likely to branch off sees this one, before it."""
        return any(stock.first_seen(branch * self.size) // self.size <= place < branch for branch in own.branches)

    @staticmethod
    def _skip(own: Held, first: int) -> None:
        """Pages before `first` are given back, or never were there."""
        own.pages.extend([-1] * (first - len(own.pages)))
        own.first = max(own.first, first)

    def _full_of(self, handle: int) -> list[int]:
        """The sequence's pages of layers with full attention."""
        return self.held[handle][self.stocks.index(self.full)].pages if self.full else []
