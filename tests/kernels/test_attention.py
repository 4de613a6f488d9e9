"""Attention's kernels in Triton's interpreter against the reference."""

import random

import pytest
import torch
from attention_cases import CASES, SHARED, Case, compare, compare_parts, new_cache, random_inputs, random_sinks
from interpret import interpreted

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.cache.pages import extend
from epmoe.kernels.attention import launch as attention_triton
from epmoe.kernels.attention.launch import SPLIT, most_tiles
from epmoe.layers.attention import cached_attention

# Of two cases that differ by a window, the one that has it: others have full attention.
NAMES = {str(each) for each in CASES}
TWICE = {name for name in NAMES if f"{name}, window" in NAMES}


@pytest.mark.parametrize(
    "case", [pytest.param(each, marks=pytest.mark.slow if str(each) in TWICE else ()) for each in CASES], ids=str
)
def test_interpreted(case: Case) -> None:
    """Pages, windows, ragged lengths, splits, sinks, groups, spare rows: outputs and caches as the reference's."""
    # float32 sums of up to 532 positions in another order
    interpreted(compare, case, "cpu", torch.float32, 1e-4, 2e-5)


@pytest.mark.parametrize("name", ["one head a group", "eight heads a group, D=64"])
def test_a_ranks_heads_have_the_bits_of_all(name: str) -> None:
    """mesh.attention=tensor, with whole groups: the interpreter's products follow a row's place in its tile."""
    interpreted(compare_parts, *shared(name), "cpu", torch.float32, True)


@pytest.mark.parametrize("name", SHARED)
def test_a_ranks_heads_have_the_bits_of_all_in_torchs_version(name: str) -> None:
    compare_parts(*shared(name), "cpu", torch.float32, False)


def shared(name: str) -> tuple[Case, int]:
    return next(case for case in CASES if case.name == name), SHARED[name]


def hidden_runs(spans: list[tuple[int, int, int, int]], tokens: int) -> list[list[list[int]]]:
    """The runs that programs find in spans that are known on the device alone."""
    cache = Cache(CacheConfig([None], 2, 32, tokens=64, sequences=4, page=4, dtype=torch.float32), "cpu")
    nowhere = torch.zeros(tokens, dtype=torch.int64)
    step = Step(nowhere, nowhere, nowhere[:0], spans=None, span_P4=torch.tensor(spans, dtype=torch.int32))
    found = cache.plan(step)[None].spans
    assert found is not None
    heads = torch.zeros(tokens, 8, 32), torch.zeros(tokens, 2, 32), torch.zeros(tokens, 2, 32)
    runs: list[list[list[int]]] = attention_triton._runs(heads, found, {}).tolist()
    return runs


def test_programs_with_work_come_first() -> None:
    """They find the last of a span's runs first, since it sees most; those without work, and they alone, zeros."""
    spans = [(3, 20, 5, 2), (0, 0, 0, 0), (20, 21, 0, 1), *[(0, 0, 0, 0)] * 40, (21, 100, 7, 3)]
    placed, attending = interpreted(hidden_runs, spans, 128)
    for runs, size in ((placed, attention_triton.PLACED), (attending, 8)):  # 32 queries, 4 heads a group
        real = [
            [first, end, sequence, cached - begin]
            for begin, end, cached, sequence in spans
            for first in range(begin, end, size)
        ]
        assert runs == real[::-1] + [[0] * 4] * (len(runs) - len(real)) and len(runs) >= len(real)
    assert len(attending) == 128 // 8 + len(spans)


def compare_hidden(window: int | None, spans: tuple[tuple[int, int], ...]) -> None:
    """Rows beside spans, of (cached, new) tokens, that the device alone knows; some places and tokens are nobody's."""
    case = Case("hidden", window, (), heads=4, kv_heads=2, head_dim=32, page=4, tokens=400, sequences=6)
    store, (rows, nobody) = new_cache(case, torch.float32, "cpu"), (2, 5)
    for stored in store.layers:
        stored.normal_(generator=torch.Generator().manual_seed(0))
    handles = [store.admit(40, 0) for _ in range(rows + len(spans))]
    positions, told = [33, 7], [(0, 0, 0, 0)]
    for handle, (cached, new) in zip(handles[rows:], spans, strict=True):
        told += [(len(positions), len(positions) + new, cached, handle), (0, 0, 0, 0)]
        positions += range(cached, cached + new)
    position_T = torch.tensor([*positions, *[0] * nobody])
    step = Step(
        torch.zeros_like(position_T),
        position_T,
        torch.tensor([*handles[:rows], store.spare]),
        rows_1=torch.tensor([rows], dtype=torch.int32),
        spans=None,
        span_P4=torch.tensor(told, dtype=torch.int32),
    )
    heads, cos_sin = random_inputs(case, len(position_T), torch.float32, "cpu", 0)
    sink_E, plan = random_sinks(case, torch.float32, "cpu"), store.plan(step)[window]
    key_JRD, value_JRD = store.layer(0)
    reference = key_JRD.clone(), value_JRD.clone()
    wanted_TED = cached_attention(heads, cos_sin, reference, plan, sink_E)
    for _ in range(2):  # as layers do; the second finds the runs
        got_TED = attention_triton.cached_attention(heads, cos_sin, store.layer(0), plan, sink_E)
        torch.testing.assert_close(got_TED, wanted_TED, rtol=1e-4, atol=2e-5)
        assert not got_TED[-nobody:].any()
        for got, wanted in zip(store.layer(0), reference, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("spans", [((3, 20), (0, 9)), ()], ids=["two", "none"])
@pytest.mark.parametrize("window", [None, 7])
def test_spans_that_the_device_knows(window: int | None, spans: tuple[tuple[int, int], ...]) -> None:
    interpreted(compare_hidden, window, spans)


def in_pairs(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_triton, "AHEAD", 2)
        compare(case, "cpu", torch.float32, 1e-4, 2e-5)


def test_more_splits_than_are_added_at_a_time() -> None:
    """Three, two at a time: the second time has to shrink what the first time left."""
    (case,) = (case for case in CASES if case.name == "three splits beside one")
    interpreted(in_pairs, case)


@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_splits_fit_their_memory(sequences: int) -> None:
    """Protects the workspace: whoever shares pages with whom, the splits together are no more than most_tiles."""
    cache = Cache(
        CacheConfig([None, 300], 1, 8, tokens=2000, sequences=sequences, page=16, dtype=torch.float32), "meta"
    )
    choice, pool, most = random.Random(sequences), cache.pools[None], 0
    for _ in range(200):
        keys: list[bytes] = []
        extend(keys, lambda begin, end: range(begin, end), 16, 125)
        cache.pages.forget()
        handles, splits = [], 0
        for _ in range(sequences):
            handle, cached = cache.pages.admit(keys[: choice.randint(0, 125)])
            cached += cache.pages.grow(handle, cached, choice.randint(cached, 2000))
            cache.pages.learn(handle, keys, cached // 16)
            splits += -(-max(1, cached) // SPLIT)  # at least its own position: a spare row has that
            handles.append(handle)
        most = max(most, splits)
        assert splits <= most_tiles(pool, sequences)
        for handle in handles:
            cache.release(handle)
    assert most > 2000 // SPLIT + sequences or sequences == 1  # more than without sharing
    touched = {position // SPLIT - (position - 299) // SPLIT + 1 for position in range(299, 2000)}
    assert most_tiles(cache.pools[300], sequences) == max(touched) * sequences
