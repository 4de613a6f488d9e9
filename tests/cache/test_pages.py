"""The accounts of pages: who holds which, what is given back, what is found again; on the host alone."""

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.cache.pages import SHARED, CacheFull, Pages, extend
from epmoe.errors import UserError


def new_pages(full: int = 10, window: int = 10, size: int = 4, sequences: int = 3, **more: bool) -> Pages:
    """Stocks of layers that see everything, and of layers that see 7 positions."""
    return Pages({None: full, 7: window}, size, sequences, most=full * size, **more)


def keys_of(ids: list[int], size: int = 4) -> list[bytes]:
    keys: list[bytes] = []
    extend(keys, lambda begin, end: ids[begin:end], size, len(ids) // size)
    return keys


def pages_of(pages: Pages, handle: int) -> list[list[int]]:
    """What a sequence holds of each stock."""
    return [own.pages[own.first :] for own in pages.held[handle]]


def whole(pages: Pages) -> bool:
    """Whether nothing is held, and each page is free or may be found."""
    stocks = all(sorted([*each.free, *each.passed, *each.idle]) == list(range(each.count)) for each in pages.stocks)
    return stocks and not pages.held and not pages.learnt and not pages.together


def test_a_sequence_holds_pages_for_what_it_has_and_sees() -> None:
    """Whole pages; of layers with a window, those that its next tokens see."""
    pages = new_pages()
    assert [pages.needs(tokens) for tokens in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    handle, cached = pages.admit()
    assert cached == 0 and pages.grow(handle, 0, 9) == 9
    assert [len(own) for own in pages_of(pages, handle)] == [3, 3] and pages.lacks(handle, 40) == 7
    assert pages.holds(handle, 0, 12) and not pages.holds(handle, 0, 13)
    assert pages.grow(handle, 9, 10) == 1  # position 9 sees 3 … 9
    assert [len(own) for own in pages_of(pages, handle)] == [3, 3]
    before = pages_of(pages, handle)[1]
    assert pages.grow(handle, 10, 13) == 3  # 4 … 10: the first page is left behind
    assert [len(own) for own in pages_of(pages, handle)] == [4, 3]
    assert pages_of(pages, handle)[1][:2] == before[1:] and not pages.holds(handle, 9, 13)
    pages.release(handle)
    assert whole(pages)
    alone = Pages({7: 3}, 4, 1, most=1000)
    assert (alone.needs(100), alone.count, alone.left) == (0, 0, 0)
    handle, _ = alone.admit()
    for position in range(1000):  # a window needs its few pages however long the sequence becomes
        assert alone.grow(handle, position, position + 1) == 1
    assert alone.grow(handle, 1000, 1001) == 0


def test_it_gets_as_many_positions_as_there_are_pages() -> None:
    """Of the scarcer stock; nothing is taken where there are none."""
    pages = new_pages(full=6, window=4)
    first, second = (pages.admit()[0] for _ in range(2))
    assert pages.grow(first, 0, 6) == 6  # two pages of each
    assert pages.grow(second, 0, 30) == 8  # the window's
    assert pages.grow(second, 8, 20) == 0 and pages.grow(first, 6, 9) == 2
    assert [len(own) for own in pages_of(pages, second)] == [2, 2] and pages.left == 2
    assert pages.grow(second, 11, 20) == 1  # 5 … 11: its first page was given back, and taken again
    assert [len(own) for own in pages_of(pages, second)] == [3, 2]


def test_refusals_say_which_kind_and_take_nothing() -> None:
    """What may fit later is CacheFull; what can never fit is the user's mistake, in an empty cache and a full one."""
    pages = new_pages(full=4, window=4, sequences=1)
    with pytest.raises(UserError, match=r"17 tokens can never fit a cache of 16: raise runtime\.cache_tokens"):
        pages.check(17)
    pages.check(16)
    handle, _ = pages.admit()
    with pytest.raises(CacheFull, match="1 sequences"):
        pages.admit()
    assert pages.grow(handle, 0, 16) == 16 and list(pages.held) == [handle]
    pages.release(handle)
    with pytest.raises(KeyError):
        pages.release(handle)
    assert whole(pages)
    with pytest.raises(UserError, match="101 tokens can never fit a cache of 100"):
        Pages({7: 3}, 4, 1, most=100).check(101)


def test_the_next_owner_gets_the_last_ones_pages_in_the_same_order() -> None:
    """So that a run that is done again has its keys and values in the same rows."""
    pages = new_pages()
    handle, _ = pages.admit()
    pages.grow(handle, 0, 12)
    held = pages_of(pages, handle)
    pages.release(handle)
    assert pages.admit() == (handle, 0) and pages.grow(handle, 0, 12) == 12 and pages_of(pages, handle) == held


def test_keys_are_of_whole_histories() -> None:
    """The same tokens after others are another page; a key does not depend on how many tokens were named at a time."""
    ids = [3, 1, 4, 1] * 3
    keys = keys_of(ids)
    assert len(set(keys)) == 3 and keys_of([*ids, 5]) == keys and keys_of(ids[:9]) == keys[:2]
    assert not set(keys_of([2, 1, 4, 1, *ids[4:]])) & set(keys)
    extend(longer := keys[:1], lambda begin, end: ids[begin:end], 4, 3)
    assert longer == keys


def test_a_prefix_is_found() -> None:
    """While its sequence runs and afterwards; whoever shares it holds the same pages, and writes none of them."""
    pages, ids = new_pages(), list(range(14))
    keys = keys_of(ids)
    first, _ = pages.admit(keys)
    assert pages.grow(first, 0, 14) == 14
    assert pages.longest(keys) == 0  # computed, but not yet learnt
    pages.learn(first, keys, 3)
    second, cached = pages.admit(keys_of([*ids[:9], 99, 98, 97]))
    assert cached == 8
    assert pages_of(pages, second) == [pages_of(pages, first)[0][:2], pages_of(pages, first)[1][:2]]  # 8 sees 2 … 8
    assert pages.together == 6
    pages.grow(second, 8, 12)
    assert pages_of(pages, second)[0][2] not in pages_of(pages, first)[0]
    pages.release(first)
    pages.release(second)
    assert pages.longest(keys) == 3 and whole(pages) and pages.left == 10
    third, cached = pages.admit(keys)
    assert cached == 12 and [own.first for own in pages.held[third]] == [0, 1]  # 12 sees 6 … 12
    pages.release(third)
    pages.forget()
    assert pages.longest(keys) == 0 and whole(pages) and not any(stock.idle or stock.passed for stock in pages.stocks)


def test_without_the_key_nothing_is_found() -> None:
    pages, keys = new_pages(prefix_cache=False), keys_of(list(range(8)))
    handle, _ = pages.admit()
    pages.grow(handle, 0, 8)
    pages.learn(handle, keys, 2)
    pages.release(handle)
    assert pages.longest(keys) == 0 and len(pages.stocks[0].free) == 10


def test_a_window_must_be_there_too() -> None:
    """A prefix counts up to where the window's pages are: what is gone of them is computed again."""
    pages, keys = new_pages(full=10, window=5), keys_of(list(range(40)))
    handle, _ = pages.admit()
    for begin in range(0, 40, 4):
        assert pages.grow(handle, begin, begin + 4) == 4
        pages.learn(handle, keys, begin // 4 + 1)
    pages.release(handle)
    there = [key in pages.stocks[1].found for key in keys]
    assert there == [False] * 5 + [True] * 5  # what was left behind went first
    assert pages.longest(keys) == 10 and pages.longest(keys[:7]) == 7
    assert pages.longest(keys[:6]) == 0  # position 24 sees 18 … 24, of which 18 and 19 are gone
    other, _ = pages.admit()
    assert pages.grow(other, 0, 4) == 4  # the window's last page goes first: nobody sees it without those before it
    assert pages.longest(keys) == 9


def test_what_a_window_has_passed_over_goes_first() -> None:
    """But for the end of the prompt, and where it left another's: the next turn and the next to share find these."""
    pages = new_pages(full=60, window=24)

    def run(ids: list[int], prompt: int) -> int:
        """Compute these; how many of them were there. Then another one takes what goes first."""
        keys = keys_of(ids)
        handle, cached = pages.admit(keys[: prompt // 4])
        for begin in range(cached, len(ids), 4):
            assert pages.grow(handle, begin, begin + 4) == 4
            pages.learn(handle, keys, begin // 4 + 1)
        pages.release(handle)
        (other, _), stock = pages.admit(), pages.stocks[1]
        goes = 4 * len([*stock.free, *stock.passed])
        assert pages.grow(other, 0, goes) == goes
        pages.release(other)
        return cached

    first, second, third = ([*range(16), *range(begin, begin + 40)] for begin in (100, 200, 300))
    assert run(first, 28) == 0
    assert pages.longest(keys_of(first)) == 14 and pages.longest(keys_of(first)[:12]) == 7  # its end, and its prompt's
    assert pages.longest(keys_of(second)) == 0  # nobody knew yet that its first 16 would be shared
    assert run(second, 28) == 0 and run(third, 28) == 16


def test_the_least_recently_used_goes_first() -> None:
    """Of three prefixes that nobody uses, the one that was not asked for; its end before its beginning."""
    pages = new_pages(full=6, window=6)
    prefixes = [keys_of(list(range(start, start + 8))) for start in (0, 100, 200)]
    for keys in prefixes:
        handle, _ = pages.admit(keys)
        pages.grow(handle, 0, 8)
        pages.learn(handle, keys, 2)
        pages.release(handle)
    for keys in (prefixes[1], prefixes[0]):
        pages.release(pages.admit(keys)[0])
    found = []
    handle, _ = pages.admit()
    for begin in range(0, 24, 4):
        assert pages.grow(handle, begin, begin + 4) == 4
        found.append([sum(key in pages.stocks[0].found for key in keys) for keys in prefixes])
    assert found == [[2, 2, 1], [2, 2, 0], [2, 1, 0], [2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_a_prefix_is_shared_by_no_more_than_is_bounded() -> None:
    """Sequences hold SHARED times the pages there are, together, at most: attention's workspace follows it."""
    pages = Pages({None: 8}, 4, 64, most=32)
    keys = keys_of(list(range(32)))
    first, _ = pages.admit()
    pages.grow(first, 0, 32)
    pages.learn(first, keys, 8)
    pages.release(first)
    for count in range(1, SHARED + 1):
        pages.admit(keys[:7])
        assert pages.together == 7 * count and pages.left == 1
    handle, cached = pages.admit(keys[:7])
    assert cached == 4 * 4 and pages.left == 0 and pages.grow(handle, 16, 32) == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(3, 14), st.booleans(), st.integers(0, 2**32))
def test_a_page_has_one_writer_over_any_history(size: int, count: int, prefix_cache: bool, seed: int) -> None:
    """Requests that share prefixes come, grow, are put back and end at random: what a page holds is what is looked for.

    Each row remembers the tokens up to its position, as the device's memory would.
    """
    choice = random.Random(seed)
    pages = Pages({None: count, 7: count, 2: count}, size, 4, most=count * size, prefix_cache=prefix_cache)
    live: dict[int, tuple[list[int], int]] = {}  # handle → (tokens, computed)
    memory: list[dict[int, list[int]]] = [{} for _ in pages.stocks]

    def row(stock: int, handle: int, position: int) -> int:
        return pages.held[handle][stock].pages[position // size] * size + position % size

    for _ in range(60):
        if choice.random() < 0.3 and pages.free_handles:
            ids = [choice.choice((0, 1)) if at % size == 0 else 7 for at in range(choice.randint(1, count * size))]
            keys = keys_of(ids, size)[: (len(ids) - 1) // size]
            handle, cached = pages.admit(keys)
            assert cached == pages.longest(keys) * size and (prefix_cache or not cached)
            live[handle] = ids, cached
        elif live and choice.random() < 0.15:
            handle = choice.choice(list(live))
            pages.release(handle)
            del live[handle]
        elif live:
            handle = choice.choice(list(live))
            ids, begin = live[handle]
            got = pages.grow(handle, begin, min(len(ids), begin + choice.randint(1, 9)))
            for index, stock in enumerate(pages.stocks):
                for position in range(stock.first_seen(begin), begin if got else 0):
                    assert memory[index][row(index, handle, position)] == ids[: position + 1]
                for position in range(begin, begin + got):
                    at = row(index, handle, position)
                    assert stock.users[at // size] == 1 and stock.keys[at // size] is None
                    memory[index][at] = ids[: position + 1]
            live[handle] = ids, begin + got
            pages.learn(handle, keys_of(ids, size), (begin + got) // size)
        for index, stock in enumerate(pages.stocks):
            users = Counter(page for handle in live for page in pages_of(pages, handle)[index])
            assert stock.users == [users[page] for page in range(count)]
            assert sorted([*users, *stock.free, *stock.passed, *stock.idle]) == list(range(count))
            assert {page: key for key, page in stock.found.items()} == {
                page: key for page, key in enumerate(stock.keys) if key is not None
            }
        assert pages.together == sum(len(pages_of(pages, handle)[0]) for handle in live)
    for handle in live:
        pages.release(handle)
    assert whole(pages) and sorted(pages.free_handles) == [0, 1, 2, 3]


def test_the_device_is_told_what_has_changed_once() -> None:
    pages = new_pages()
    handle, _ = pages.admit()
    pages.grow(handle, 0, 6)
    told = pages.told()
    assert told == {
        (stock, handle, place): pages.held[handle][stock].pages[place] for stock in (0, 1) for place in (0, 1)
    }
    assert pages.told() == {} and pages.grow(handle, 6, 8) == 2 and pages.told() == {}


def test_no_tensor_library_is_imported() -> None:
    """In a fresh interpreter: a scheduler may ask without torch."""
    code = "import sys, epmoe.cache.pages; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
