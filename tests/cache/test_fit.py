"""A key/value cache that free memory bounds: rank 0 says so, and a fixed capacity gives the same bits on any ranks."""

import io
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from bitwise_run import requests
from loading import rank_of
from spawn import run_ranks

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.cache.fit import CACHE_SHARE, CacheSettings, fit_cache
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.errors import UserError
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.load import load

PAGE, BATCH = 4, 6
WANTED = 49 * PAGE  # of bitwise_run's six requests: 25 + 3 + 4 + 8 + 6 + 3 pages
ROOM = 35 * PAGE  # what a third of the memory holds for the cache; all of the third would hold WANTED


@dataclass(frozen=True)
class Found:
    """What a rank's run came to."""

    tokens: int  # positions of the cache
    together: int  # most sequences at a time
    outputs: list[str]  # ids and log-probabilities of each request; a float's repr tells all its bits
    said: list[str]  # lines on standard error while the cache was made


def run(mine: Ranks, checkpoint: Path, cache_tokens: int) -> Found:
    """A small model in a host that has room for ROOM positions on each of three ranks, for all on one."""
    model, _ = load(Checkpoint.open(checkpoint), mine, Choices(combine="slots", dtype="float32"), progress=False)
    config, write, held = model.config, Cache.write, []
    asked = [replace(each, params=replace(each.params, logprobs=5)) for each in requests(config.vocab)]
    needs = [request.cached(config.max_positions) for request in asked]

    def counted(cache: Cache) -> None:
        write(cache)
        held.append(len(cache.pages.held))

    shape = config.windows, config.kv_heads, config.head_dim
    need = CacheConfig(*shape, tokens=ROOM, sequences=BATCH, page=PAGE, dtype=torch.float32).nbytes
    free = 3 * int(need / CACHE_SHARE + 1)
    settings = CacheSettings(torch.float32, page=PAGE, max_batch=BATCH, tokens=cache_tokens)
    with redirect_stderr(io.StringIO()) as said, patch("epmoe.cache.fit.free_bytes", lambda device: free):
        cache = fit_cache(config, needs, mine, settings)
    with patch.object(Cache, "write", counted):
        results = Engine(model, cache, mine, EngineConfig(prefill_chunk=16, max_batch=BATCH)).generate(asked)
    outputs = [repr((each.ids, each.logprobs)) for each in results]
    return Found(cache.tokens, max(held), outputs, said.getvalue().splitlines())


def test_rank_0_says_that_memory_bounds_the_cache(tiny_checkpoint: Path) -> None:
    """Once, and only where it does: one rank has the memory of all three. Fewer sequences run together then."""
    (one,) = run_ranks(run, 1, tiny_checkpoint, 0)
    three = run_ranks(run, 3, tiny_checkpoint, 0)
    assert (one.tokens, one.together, one.said) == (WANTED, BATCH, [])
    assert all(each.tokens == ROOM and each.together == three[0].together < BATCH for each in three)
    assert [len(each.said) for each in three] == [1, 0, 0]
    for part in ("epmoe: free memory bounds", f" {ROOM} positions", f"want {WANTED}:", "runtime.cache_tokens=N"):
        assert part in three[0].said[0]


@pytest.mark.parametrize("cache_tokens", [ROOM, WANTED])
def test_a_fixed_capacity_gives_the_same_bits_though_memory_differs(tiny_checkpoint: Path, cache_tokens: int) -> None:
    """Log-probabilities on 1 and 3 ranks, where without it the ranks would have other batches (the test above).

    The smaller capacity holds back as many requests on one rank as on three; the larger one holds back none.
    """
    runs = run_ranks(run, 1, tiny_checkpoint, cache_tokens) + run_ranks(run, 3, tiny_checkpoint, cache_tokens)
    assert {each.tokens for each in runs} == {cache_tokens}
    assert {each.together < BATCH for each in runs} == {cache_tokens == ROOM}
    assert all(each.said == [] for each in runs)
    assert all(each == runs[0] for each in runs[1:])


@dataclass
class Shape:
    windows: tuple[int | None, ...] = (8, None)
    kv_heads: int = 2
    head_dim: int = 4
    max_positions: int = 10_000


def fit(needs: list[int], **options: Any) -> Cache:
    return fit_cache(Shape(), needs, rank_of(0, 1), CacheSettings(torch.float32, **options))


def test_cache_takes_what_the_requests_need() -> None:
    """In whole pages for each request, and for no more requests than run at a time."""
    assert fit([1, 16, 17]).tokens == 16 + 16 + 32
    assert fit([1, 16, 17, 100], max_batch=2).tokens == 32 + 112
    assert fit([5], tokens=100).tokens == 112


def test_cache_is_bounded_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the page. A layer's window takes ten sequences' three pages and the step's two, as long as that is less."""
    page = 2 * 2 * 4 * 4 * 16  # of one layer; each has a spare one
    monkeypatch.setattr("epmoe.cache.fit.free_bytes", lambda device: int((33 + 41) * page / 0.7) + 1)
    assert fit([160] * 10, step=32).tokens == 40 * 16
    monkeypatch.setattr("epmoe.cache.fit.free_bytes", lambda device: int((26 + 26) * page / 0.7) + 1)
    assert fit([160] * 10, step=32).tokens == 25 * 16
    with pytest.raises(UserError, match=r"prompt 2 needs 500 positions .* which holds 400: .*max_new_tokens"):
        fit([10, 500] + [10] * 8)


def test_a_set_capacity_beyond_the_memory_names_the_key() -> None:
    """Before anything of that size is made: the list of its pages alone would fill the memory."""
    with pytest.raises(UserError, match=r"runtime\.cache_tokens=\d+ needs .* GB are free: lower it"):
        fit([10], tokens=10**12)


def test_a_request_larger_than_the_set_capacity_names_the_key() -> None:
    with pytest.raises(UserError, match=r"prompt 3 needs 200 .* holds 112: raise runtime\.cache_tokens"):
        fit([10, 10, 200], tokens=100)
