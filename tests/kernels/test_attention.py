"""Attention's kernels in Triton's interpreter against the reference."""

import random

import pytest
import torch
from attention_cases import CASES, SHARED, Case, compare, compare_parts
from interpret import interpreted

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.cache.pages import extend
from epmoe.kernels.attention import launch as attention_triton
from epmoe.kernels.attention.launch import SPLIT, most_tiles

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
    runs: list[list[list[int]]] = attention_triton._find_runs(heads, found).tolist()
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
