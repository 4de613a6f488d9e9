"""The cache's bookkeeping: who owns which row, what is given back, and how many bytes it takes.

That the right values are read and written is test_attention.py's matter.
"""

from dataclasses import replace

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


def new_cache(windows: list[int | None], *, tokens: int = 64, sequences: int = 4, page: int = 4) -> Cache:
    return Cache(CacheConfig(windows, 2, 8, tokens=tokens, sequences=sequences, page=page, dtype=torch.float32), "cpu")


def rows_of(cache: Cache, window: int | None, handle: int, count: int) -> list[int]:
    """The rows of a sequence's positions 0 .. count."""
    return cache.pools[window].row(torch.tensor([[handle]]), torch.arange(count)[None])[0].tolist()


def test_bytes_follow_the_windows() -> None:
    """Protects memory: a sliding layer takes ⌈window/page⌉ + 1 pages a sequence however long the sequences are."""
    row = 2 * 2 * 8 * 4  # key and value, 2 heads, 8 dimensions, float32
    spare = 4 * row  # the page that fills up batches
    full, ring = 64 * row, (4 + 1) * (2 + 1) * 4 * row  # window 7: 2 pages of 4, and 1; 4 sequences and the spare one
    assert new_cache([None]).nbytes == full + spare
    assert new_cache([7]).nbytes == ring
    assert new_cache([7, None, 7, None, 9]).nbytes == 2 * ring + 2 * (full + spare) + (4 + 1) * (3 + 1) * 4 * row
    assert new_cache([7, None], tokens=6400).nbytes == ring + 100 * full + spare
    assert new_cache([None], tokens=61).nbytes == full + spare  # whole pages


def test_gpt_oss_20b_bytes() -> None:
    """Protects the figure people plan with: a token of context costs the full-attention half of the layers only."""
    cache = Cache(
        CacheConfig([128, None] * 12, 8, 64, tokens=16384, sequences=8, page=16, dtype=torch.bfloat16), "meta"
    )
    token = 2 * 8 * 64 * 2
    assert cache.nbytes == 12 * (16384 + 16) * token + 12 * (8 + 1) * 144 * token


def test_nothing_is_allocated_after_the_constructor() -> None:
    """Protects against growth: admitting, planning and releasing leave the storage where it was."""
    cache = new_cache([7, None])
    places = [layer.data_ptr() for layer in cache.layers]
    for _ in range(20):
        handle = cache.admit(30)
        cache.plan(make_step([(handle, [0] * 5, 0)]))
        cache.release(handle)
    assert [layer.data_ptr() for layer in cache.layers] == places


@pytest.mark.parametrize("window", [1, 3, 4, 7, 8, 9, 16])
def test_ring_holds_the_window_and_overwrites_the_rest(window: int) -> None:
    """Protects the ring's size: the last `window` positions have rows of their own, and old rows come again."""
    cache = new_cache([window])
    handles = [cache.admit(1000) for _ in range(4)]
    seen: set[int] = set()
    for handle in handles:
        rows = rows_of(cache, window, handle, 1000)
        for end in range(window, 1000):
            assert len(set(rows[end - window : end + 1])) == window + 1
        ring = set(rows)
        assert len(ring) == (-(-window // 4) + 1) * 4 and not ring & seen
        seen |= ring
    seen |= set(rows_of(cache, window, cache.spare, 1000))
    assert seen == set(range(cache.pools[window].rows))


def test_full_when_pages_are_short() -> None:
    """Protects admission: reserved by the page, refused when short, admitted again after a release."""
    cache = new_cache([None, 7])  # 16 pages
    first = cache.admit(33)  # 9 pages
    assert cache.pages.fits(28) and not cache.pages.fits(29)
    with pytest.raises(CacheFull):
        cache.admit(29)
    second = cache.admit(28)  # 7 pages
    with pytest.raises(CacheFull):
        cache.admit(1)
    cache.release(first)
    third = cache.admit(36)
    assert not set(rows_of(cache, None, third, 36)) & set(rows_of(cache, None, second, 28))


def test_full_when_sequences_are_short() -> None:
    """Protects the rings: there are only so many, though pages be plenty."""
    cache = new_cache([None, 7], sequences=2)
    handle, _ = cache.admit(4), cache.admit(4)
    with pytest.raises(CacheFull):
        cache.admit(4)
    cache.release(handle)
    cache.admit(4)


def test_sliding_layers_alone_need_no_pages() -> None:
    """Protects long sequences of a model without full attention: the number of tokens is no limit."""
    cache = new_cache([7, 7], tokens=4)
    cache.admit(100_000)


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


def test_double_release_is_a_bug() -> None:
    """Protects the stock of pages: a page given back twice would have two owners."""
    cache = new_cache([None])
    handle = cache.admit(8)
    cache.release(handle)
    with pytest.raises(KeyError):
        cache.release(handle)


def test_more_tokens_than_reserved_is_a_bug() -> None:
    """Protects the neighbours' pages: a sequence cannot outgrow its reservation."""
    cache = new_cache([None])
    handle = cache.admit(8)
    cache.plan(make_step([(handle, [0] * 3, 5)]))
    with pytest.raises(AssertionError, match="reserved"):
        cache.plan(make_step([(handle, [0] * 4, 5)]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=60))
def test_rows_have_one_owner_and_come_back(actions: list[tuple[bool, int]]) -> None:
    """Protects the accounts over any history: no row with two owners, and an empty cache is whole again."""
    cache = new_cache([None, 7], sequences=5)
    live: dict[int, int] = {}
    for wants_in, size in actions:
        if wants_in:
            fits = cache.pages.fits(size)
            try:
                live[cache.admit(size)] = size
                assert fits
            except CacheFull:
                assert not fits
        elif live:
            handle = list(live)[size % len(live)]
            cache.release(handle)
            del live[handle]
        for window, most in ((None, 1000), (7, 12)):
            owned = [rows_of(cache, window, handle, min(size, most)) for handle, size in live.items()]
            flat = [row for rows in owned for row in rows]
            assert len(flat) == len(set(flat)) and all(0 <= row < cache.pools[window].rows for row in flat)
    for handle in live:
        cache.release(handle)
    assert sorted(cache.pages.free) == list(range(16)) and sorted(cache.pages.free_handles) == list(range(5))


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
    for run, before in ((1, 0), (7, 0), (16, 5), (64, 128)):
        exact = sum(-(-(end - begin + before) // run) for begin, end, *_ in step.spans or ())
        assert plan.spans.runs(run, before) == exact <= hidden.spans.runs(run, before)
    return plan.spans.prefills


def test_plan_of_a_window() -> None:
    """Protects the traffic: a sliding layer reads window − 1 cached rows at most and writes `window` at most."""
    cache = new_cache([7, None])
    a, b = cache.admit(60), cache.admit(4)
    rows = rows_of(cache, 7, a, 60)
    (prefill,) = prefills_of(cache, 7, [(a, 20, 30)])
    assert prefill.past_C.tolist() == rows[24:30] and prefill.row_R.tolist() == rows[43:50]
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
    assert cache.spare not in handles and not cache.pages.free
    spare = set(rows_of(cache, None, cache.spare, 64))
    assert not spare & {row for handle in handles for row in rows_of(cache, None, handle, 16)}
    assert max(spare) < cache.paged.rows
