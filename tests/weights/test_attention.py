"""mesh.attention=auto: what fits, then what is predicted to be fast."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from loading import rank_of

from epmoe.bench.weights import RandomCheckpoint
from epmoe.config.schema import Runtime
from epmoe.errors import UserError
from epmoe.ranks.mesh import Ranks
from epmoe.weights import attention
from epmoe.weights.attention import Way, attention_of, experts, need, predicted_us
from epmoe.weights.load import model_of

GB = 10**9


@pytest.fixture(scope="module")
def large() -> RandomCheckpoint:
    return RandomCheckpoint.of("20b")


@pytest.fixture
def choose(
    large: RandomCheckpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """What is chosen on so many ranks with so much free, and what is said."""

    def chosen(
        ranks: int, free: float, batch: int = 64, wanted: str = "auto", device: str = "cuda:0"
    ) -> tuple[str, str]:
        monkeypatch.setattr(attention, "free_bytes", lambda device: int(free * GB))
        monkeypatch.setattr(Ranks, "gather_all", lambda ranks, values: [list(values)])  # its peers are not there
        run = replace(Runtime(), max_batch=batch)
        found = attention_of(wanted, model_of(large)[1], large, rank_of(0, ranks, device), run)
        return found, capsys.readouterr().err

    return chosen


def test_where_all_fit_by_predicted_times(choose: Callable[..., tuple[str, str]]) -> None:
    assert choose(2, 100, batch=1) == ("replicate", "epmoe: mesh.attention=replicate (auto)\n")
    assert choose(4, 100, batch=256) == ("tensor", "epmoe: mesh.attention=tensor (auto)\n")
    assert choose(2, 100, batch=256, device="cpu")[0] == "replicate", "the table is of GPUs"
    assert choose(3, 100, batch=256)[0] in ("replicate", "data"), "three ranks cannot share eight heads"
    assert choose(1, 1, batch=256) == ("replicate", "")


def test_what_does_not_fit_is_not_taken(choose: Callable[..., tuple[str, str]]) -> None:
    """20b on 2 ranks: 5.1 GB of experts, 3.6 of other weights; of 64 texts 3.4 GB of keys and values, or half."""
    assert choose(2, 12.5, batch=1)[0] == "replicate"
    found, said = choose(2, 12.5, batch=64)
    assert found == "tensor" and "replicate" in said and "would not fit" in said
    assert choose(2, 2, batch=64)[0] == "tensor", "nothing fits: the least"
    assert choose(3, 2, batch=64)[0] == "data"


def test_names_are_taken_as_they_are(choose: Callable[..., tuple[str, str]]) -> None:
    for name in ("replicate", "tensor", "data"):
        assert choose(2, 0.1, wanted=name) == (name, "")
    with pytest.raises(UserError, match="3 ranks cannot share 64 query and 8 key/value heads"):
        choose(3, 100, wanted="tensor")


def test_memory_by_ways(large: RandomCheckpoint) -> None:
    """Of q, k and v and of the cache a rank has its heads', or its requests'."""
    model, run = model_of(large)[1], replace(Runtime(), max_batch=64)
    whole, half = (need(Way("tensor", heads=heads), model, large, 2, run) for heads in (1.0, 0.5))
    positions = 64 * 2048
    cache = positions * 12 * (1 + 128 / 2048) * 2 * 8 * 64 * 2
    weights = 24 * 2880 * 5120 * 2
    assert whole - half == pytest.approx((cache + weights) / 2, rel=1e-6)
    own = need(Way("data", requests=0.5), model, large, 2, run)
    assert whole - own == pytest.approx(cache / 2, rel=1e-6)
    fixed = SimpleNamespace(max_batch=1, cache_tokens=positions)
    assert need(Way("replicate"), model, large, 2, fixed) == whole
    assert experts(large) == pytest.approx(24 * 32 * 13.25e6, rel=0.01)


def test_times_grow_with_what_they_count(large: RandomCheckpoint) -> None:
    model, ranks = model_of(large)[1], rank_of(0, 2)
    slow: Ranks = replace(ranks, nodes=2)
    for way in (Way("replicate"), Way("tensor", heads=0.5), Way("data", requests=0.5)):
        one, many = (predicted_us(way, model, ranks, batch) for batch in (1, 256))
        assert one < many < predicted_us(way, model, slow, 256)
