"""Placement: every expert has exactly one owner, and a rank knows which of its experts is which.

An expert without an owner is never computed and one with two is added twice; both still produce fluent text.
"""

import pytest
import torch

from epmoe.errors import UserError
from epmoe.moe.placement import PLACEMENTS, Placement, contiguous
from epmoe.tables import lookup

SIZES = [(experts, ranks) for experts in (1, 2, 3, 5, 7, 16, 32, 127, 128) for ranks in {1, 2, 3, 4, 8, experts}]
SIZES = sorted((experts, ranks) for experts, ranks in SIZES if ranks <= experts)


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize(("experts", "ranks"), SIZES)
def test_every_expert_has_one_owner(name: str, experts: int, ranks: int) -> None:
    placement = lookup("placement", PLACEMENTS, name)(experts, ranks)
    assert len(placement.experts) == ranks and placement.num_experts == experts
    assert sorted(expert for mine in placement.experts for expert in mine) == list(range(experts))
    for mine in placement.experts:
        assert mine and list(mine) == sorted(mine), "a rank's ids ascend: the router's index relies on it"


@pytest.mark.parametrize(("experts", "ranks"), SIZES)
def test_contiguous_shares_differ_by_one_at_most(experts: int, ranks: int) -> None:
    placement = contiguous(experts, ranks)
    sizes = [len(mine) for mine in placement.experts]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert [expert for mine in placement.experts for expert in mine] == list(range(experts))


def test_contiguous_example() -> None:
    assert contiguous(5, 2).experts == ((0, 1, 2), (3, 4))
    assert contiguous(8, 3).experts == ((0, 1, 2), (3, 4, 5), (6, 7))


@pytest.mark.parametrize(("experts", "ranks"), SIZES)
def test_local_ids_invert_the_placement(experts: int, ranks: int) -> None:
    placement = contiguous(experts, ranks)
    for rank, mine in enumerate(placement.experts):
        local_E = placement.local_E(rank, torch.device("cpu"))
        assert local_E.dtype == torch.int32
        assert local_E.tolist() == [mine.index(expert) if expert in mine else -1 for expert in range(experts)]


def test_local_ids_of_scattered_experts() -> None:
    placement = Placement(5, ((0, 3), (1, 2, 4)))
    here = placement.here(1, torch.device("cpu"))
    assert here.owner_E.tolist() == [0, 1, 1, 0, 1] and here.owner_E.dtype == torch.int64
    assert here.count == 3 and torch.equal(here.local_E, placement.local_E(1, torch.device("cpu")))
    assert placement.local_E(0, torch.device("cpu")).tolist() == [0, -1, -1, 1, -1]
    assert placement.local_E(1, torch.device("cpu")).tolist() == [-1, 0, 1, -1, 2]


@pytest.mark.parametrize(("experts", "ranks"), [(1, 2), (4, 5), (32, 64)])
def test_more_ranks_than_experts_is_the_users_mistake(experts: int, ranks: int) -> None:
    with pytest.raises(
        UserError, match=f"{ranks} expert ranks cannot share {experts} experts.*at most {experts} ranks"
    ):
        contiguous(experts, ranks)


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (((0, 1), (1, 2)), "expert 1"),
        (((0,), (2,)), "expert 1"),
        (((0, 1, 2), (3,)), "expert 3"),
        (((1, 0), (2,)), "ascend"),
    ],
    ids=["two_owners", "no_owner", "unknown_expert", "unordered"],
)
def test_a_wrong_placement_is_refused(experts: tuple[tuple[int, ...], ...], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        Placement(3, experts)
