"""The cache's bookkeeping: who owns which row, what is given back, and how many bytes it takes.

That the right values are read and written is test_attention.py's matter.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import make_step

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.cache.pages import CacheFull
from epmoe.cache.plan import Prefill
from epmoe.errors import UserError


def new_cache(windows: list[int | None], **sizes: int) -> Cache:
    config: dict[str, Any] = {"tokens": 64, "sequences": 4, "page": 4, **sizes}
    return Cache(CacheConfig(windows, 2, 8, dtype=torch.float32, **config), "cpu")


def rows_of(cache: Cache, window: int | None, handle: int, count: int) -> list[int]:
    """The rows of a sequence's positions 0 .. count."""
    return cache.pools[window].row(torch.tensor([[handle]]), torch.arange(count)[None])[0].tolist()


def test_bytes_follow_the_windows() -> None:
    """Protects memory: a sliding layer takes what all sequences see, however long they are, and a step's tokens."""
    row = 2 * 2 * 8 * 4  # key and value, 2 heads, 8 dimensions, float32
    page = 4 * row
    assert new_cache([None]).config.nbytes == (16 + 1) * page  # one fills batches up
    assert new_cache([None], tokens=61).config.nbytes == (16 + 1) * page  # whole pages
    # A window of 7 touches 3 pages, and a piece of a prompt may end within one more; 4 sequences.
    assert new_cache([7], step=10).config.nbytes == (4 * 4 + 3 + 1) * page
    assert new_cache([7], step=10, tokens=6400).config.nbytes == (4 * 4 + 3 + 1) * page
    assert new_cache([7, None, 7], step=10, tokens=6400).config.nbytes == (2 * (4 * 4 + 3 + 1) + 1601) * page
    # no more than full attention has, and any step is taken where none is named
    assert new_cache([7, None, 9], step=10).config.nbytes == 3 * (16 + 1) * page
    assert new_cache([7]).config.nbytes == (4 * 4 + 16 + 1) * page
    for cache in (new_cache([7, None, 9], tokens=640, step=10), new_cache([1], page=1, step=3)):
        assert sum(layer.nbytes for layer in cache.layers) == cache.config.nbytes


def test_gpt_oss_20b_bytes() -> None:
    """Protects the figure people plan with: a token of context costs the full-attention half of the layers only."""
    config = CacheConfig([128, None] * 12, 8, 64, tokens=1 << 20, sequences=64, page=16, step=16384)
    token = 2 * 8 * 64 * 2
    assert config.nbytes == 12 * ((1 << 20) + 16) * token + 12 * (64 * 10 * 16 + 16384 + 16) * token


def test_nothing_is_allocated_after_the_constructor() -> None:
    """Protects against growth, and graphs: admitting, planning and releasing leave the storage where it was."""
    cache = new_cache([7, None])
    places = [part.data_ptr() for part in (*cache.layers, *(pool.table for pool in cache.pools.values()))]
    assert all(place % 16 == 0 for place in places)
    for _ in range(20):
        handle = cache.admit(30)
        cache.plan(make_step([(handle, [0] * 5, 0)]))
        cache.release(handle)
    assert places == [part.data_ptr() for part in (*cache.layers, *(pool.table for pool in cache.pools.values()))]


def test_full_when_pages_are_short() -> None:
    """Protects the neighbours: whoever finds no pages has none of theirs, and finds some after a release."""
    cache = new_cache([None, 7])  # 16 pages
    first = cache.admit(33)  # 9 pages
    with pytest.raises(CacheFull):
        cache.admit(29)
    second = cache.admit(28)  # 7 pages
    with pytest.raises(CacheFull):
        cache.admit(1)
    cache.release(first)
    third = cache.admit(36)
    for window in (None, 7):
        assert not set(rows_of(cache, window, third, 36)) & set(rows_of(cache, window, second, 28))


def test_full_when_handles_are_short() -> None:
    cache = new_cache([None, 7], sequences=2)
    handle, _ = cache.admit(4), cache.admit(4)
    with pytest.raises(CacheFull):
        cache.admit(4)
    cache.release(handle)
    cache.admit(4)


def test_sliding_layers_alone_need_few_pages() -> None:
    """Protects long sequences of a model without full attention: what they see alone is there."""
    cache = new_cache([7, 7], tokens=4, positions=100_000)
    handle = cache.admit(100_000, 99_999)
    rows = cache.pools[7].row(torch.tensor([[handle]]), torch.arange(99_993, 100_000)[None])[0].tolist()
    assert len(set(rows)) == 7 and max(rows) < cache.pools[7].rows - 4


def test_what_can_never_fit_is_the_users_mistake() -> None:
    """Protects against waiting for ever: longer than the whole cache is an error with a remedy, not CacheFull."""
    cache = new_cache([None])
    with pytest.raises(UserError, match=r"65 tokens.*cache of 64.*runtime\.cache_tokens"):
        cache.admit(65)


def test_refused_admission_takes_nothing() -> None:
    """Protects against leaks on the unhappy path."""
    cache = new_cache([None])
    cache.admit(60)
    for _ in range(10):
        with pytest.raises(CacheFull):
            cache.admit(8)
    cache.admit(4)


def test_tokens_without_pages_are_a_bug() -> None:
    """Protects the neighbours' pages, also from a sequence whose window has left its own behind."""
    cache = new_cache([None, 7])
    handle = cache.admit(8)
    cache.plan(make_step([(handle, [0] * 3, 5)]))
    with pytest.raises(AssertionError, match="without pages"):
        cache.plan(make_step([(handle, [0] * 4, 5)]))
    cache.grow(handle, 12, 13)
    with pytest.raises(AssertionError, match="without pages"):
        cache.plan(make_step([(handle, [0], 7)]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=60))
def test_the_device_knows_who_holds_what(actions: list[tuple[int, int]]) -> None:
    """Protects the table over any history: what a sequence sees lies in rows of its own, as the accounts say."""
    cache = new_cache([None, 7], sequences=4)
    live: dict[int, int] = {}  # handle → positions
    for kind, size in actions:
        if kind == 0 and cache.pages.free_handles:
            live[cache.pages.admit()[0]] = 0
        elif kind == 1 and live:
            cache.release(handle := list(live)[size % len(live)])
            del live[handle]
        elif live:
            handle = list(live)[size % len(live)]
            live[handle] += cache.grow(handle, live[handle], live[handle] + size)
        for index, window in enumerate((None, 7)):
            owned = []
            for handle in live:
                held = cache.pages.held[handle][index]
                rows = rows_of(cache, window, handle, len(held.pages) * 4)[held.first * 4 :]
                assert rows == [page * 4 + place for page in held.pages[held.first :] for place in range(4)]
                owned += rows
            assert len(owned) == len(set(owned)) and all(0 <= row < cache.pools[window].rows - 4 for row in owned)


def prefills_of(cache: Cache, window: int | None, chunks: list[tuple[int, int, int]]) -> tuple[Prefill, ...]:
    """Those of a step of prompts alone; the same where the device alone knows it, with some that are empty."""
    step = make_step([(handle, [0] * new, cached) for handle, new, cached in chunks])
    plan = cache.plan(step)[window]
    assert plan.rows is None and plan.spans is not None and not plan.padded
    spans = [*(step.spans or ()), (0, 0, 0, cache.spare)]
    hidden = cache.plan(replace(step, spans=None, span_P4=torch.tensor(spans, dtype=torch.int32)))[window]
    assert hidden.spans is not None and hidden.padded
    for one, other in zip(plan.spans.prefills, hidden.spans.prefills, strict=True):
        assert (one.begin, one.end, one.cached, one.sequence) == (other.begin, other.end, other.cached, other.sequence)
    for run in (1, 7, 16, 64):
        exact = sum(-(-(end - begin) // run) for begin, end, *_ in step.spans or ())
        assert plan.spans.runs(run) == exact <= hidden.spans.runs(run)
    return plan.spans.prefills


def test_plan_of_a_window() -> None:
    """Protects the traffic: a sliding layer reads window − 1 cached rows at most."""
    cache = new_cache([7, None])
    a, b = cache.admit(60), cache.admit(4)
    rows = rows_of(cache, 7, a, 60)
    (prefill,) = prefills_of(cache, 7, [(a, 20, 30)])
    assert prefill.past_C.tolist() == rows[24:30] and prefill.row_R.tolist() == rows[30:50]
    (prefill,) = prefills_of(cache, 7, [(a, 3, 2)])
    assert prefill.past_C.tolist() == rows[0:2] and prefill.row_R.tolist() == rows[2:5]
    first, second = prefills_of(cache, 7, [(a, 1, 40), (b, 1, 0)])  # a prompt's single token, too
    assert first.past_C.tolist() == rows[34:40] and first.row_R.tolist() == rows[40:41]
    assert second.past_C.tolist() == [] and second.row_R.tolist() == rows_of(cache, 7, b, 1)


def test_plan_of_full_attention() -> None:
    """Protects the reads: every cached row, in order; the rows of a step's new tokens and no others are written."""
    cache = new_cache([7, None])
    a, b = cache.admit(40), cache.admit(20)
    rows = rows_of(cache, None, a, 40)
    single, longer = prefills_of(cache, None, [(b, 1, 5), (a, 20, 12)])
    assert longer.past_C.tolist() == rows[:12] and longer.row_R.tolist() == rows[12:32]
    assert (longer.begin, longer.end) == (1, 21)
    assert single.past_C.tolist() == rows_of(cache, None, b, 5)


@pytest.mark.parametrize("window", [None, 7])
def test_plan_of_a_decode_step(window: int | None) -> None:
    """Protects the fixed batch: what each row reads and writes is its own, and filling rows have rows of their own."""
    cache = new_cache([window])
    a, b = cache.admit(40), cache.admit(20)
    sequence_B = torch.tensor([a, cache.spare, b, cache.spare])
    plan = cache.plan(Step(torch.zeros(4, dtype=torch.int64), torch.tensor([30, 0, 4, 0]), sequence_B))[window]
    assert plan.rows is not None and plan.spans is None
    first, zeros, fourth = plan.rows.gathers  # positions 30; 0 and 0; 4
    assert [each.token_B.tolist() for each in (first, zeros, fourth)] == [[0], [1, 3], [2]]
    assert [each.offset_B.tolist() for each in (first, zeros, fourth)] == [[2], [0, 0], [0]]
    of_a, of_b = rows_of(cache, window, a, 31), rows_of(cache, window, b, 5)
    seen = of_a if window is None else of_a[24:]
    assert first.row_B.tolist() == of_a[30:]  # of the block, 28 to 31, the last is not there yet
    assert first.row_BC[0].tolist() == [*seen[:1] * (2 if window else 0), *seen, of_a[30]]
    assert fourth.row_B.tolist() == of_b[4:] and fourth.row_BC[0].tolist() == of_b + of_b[4:] * 3
    rows = {row for handle, count in ((a, 40), (b, 20)) for row in rows_of(cache, window, handle, count)}
    assert zeros.row_BC.shape == (2, 4) and not rows & set(zeros.row_BC.flatten().tolist())


def test_the_spare_sequence_is_nobodys() -> None:
    """Protects the requests' rows: the spare handle is never admitted, and its page never reserved."""
    cache = new_cache([None, 7])
    handles = [cache.admit(16) for _ in range(4)]
    assert cache.spare not in handles and not cache.pages.left
    for window, pool in cache.pools.items():
        spare = set(rows_of(cache, window, cache.spare, 64))
        assert not spare & {row for handle in handles for row in rows_of(cache, window, handle, 16)}
        assert max(spare) < pool.rows
