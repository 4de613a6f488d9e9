"""The accounts of pages: what fits, what is refused and how, what comes back; on the host alone."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.cache.pages import CacheFull, Pages
from epmoe.errors import UserError


def test_whole_pages_are_reserved() -> None:
    """One position takes a page, `size` take one, one more takes two; none where no layer has full attention."""
    pages = Pages(10, 4, 3)
    assert [pages.needs(tokens) for tokens in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    first, second = pages.admit(9), pages.admit(4)
    assert [len(pages.held[handle]) for handle in (first, second)] == [3, 1]
    assert pages.reserved == {first: 9, second: 4}
    assert sorted([*pages.held[first], *pages.held[second], *pages.free]) == list(range(10))
    assert sorted([first, second, *pages.free_handles]) == [0, 1, 2]
    assert Pages(0, 4, 1).needs(10**9) == 0


def test_fits_up_to_the_last_page_and_the_last_handle() -> None:
    pages = Pages(5, 4, 2)
    assert pages.fits(20) and not pages.fits(21)
    pages.admit(8)
    assert pages.fits(12) and not pages.fits(13)
    pages.admit(1)
    assert pages.free and not pages.fits(1)  # pages are left, but no handle


def test_the_next_owner_gets_the_last_ones_pages_in_the_same_order() -> None:
    """So that a run that is done again has its keys and values in the same rows."""
    pages = Pages(8, 4, 2)
    handle = pages.admit(12)
    held = pages.held[handle]
    pages.release(handle)
    assert pages.admit(12) == handle and pages.held[handle] == held


def test_refusals_say_which_kind_and_take_nothing() -> None:
    """What may fit later is CacheFull; what can never fit is the user's mistake, in an empty cache and a full one."""
    pages = Pages(4, 4, 2)
    with pytest.raises(UserError, match=r"17 tokens can never fit a cache of 16: raise runtime\.cache_tokens"):
        pages.admit(17)
    pages.check(16)
    pages.admit(13)
    for _ in range(3):
        with pytest.raises(CacheFull, match="1 tokens, 0 pages and 1 sequences free"):
            pages.admit(1)
        with pytest.raises(UserError):
            pages.admit(17)
    assert pages.reserved == {0: 13} and pages.free_handles == [1]
    with pytest.raises(AssertionError):
        pages.admit(0)


def test_windows_alone_are_bounded_by_handles_only() -> None:
    pages = Pages(0, 4, 2)
    assert pages.held[pages.admit(10**9)] == [] and pages.held[pages.admit(1)] == []
    with pytest.raises(CacheFull):
        pages.admit(1)


def test_a_handle_is_released_once() -> None:
    pages = Pages(4, 4, 2)
    handle = pages.admit(4)
    pages.release(handle)
    with pytest.raises(KeyError):
        pages.release(handle)
    assert sorted(pages.free) == [0, 1, 2, 3] and sorted(pages.free_handles) == [0, 1]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_a_page_has_one_owner_over_any_history(size: int, actions: list[tuple[bool, int]]) -> None:
    pages = Pages(12, size, 4)
    live: list[int] = []
    for admits, number in actions:
        if admits and pages.fits(number):
            live.append(pages.admit(number))
        elif admits:
            with pytest.raises(UserError if pages.needs(number) > 12 else CacheFull):
                pages.admit(number)
        elif live:
            pages.release(live.pop(number % len(live)))
        owned = [page for handle in live for page in pages.held[handle]]
        assert sorted([*owned, *pages.free]) == list(range(12)) and sorted([*live, *pages.free_handles]) == [0, 1, 2, 3]
        assert set(pages.held) == set(pages.reserved) == set(live)
        assert all(len(pages.held[handle]) == -(-pages.reserved[handle] // size) for handle in live)


def test_no_tensor_library_is_imported() -> None:
    """In a fresh interpreter: a scheduler may ask without torch."""
    code = "import sys, epmoe.cache.pages; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
