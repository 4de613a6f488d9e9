"""Axes: how many replicas and expert ranks there are, who is in which, and which of them are lost together."""

import pytest

from epmoe.errors import UserError
from epmoe.ranks.axes import Axes

# ranks, mesh.replica, mesh.expert → replicas, expert ranks
FOUND = {
    (1, 0, 0): (1, 1), (8, 0, 0): (1, 8), (8, 1, 0): (1, 8), (8, 2, 0): (2, 4), (8, 8, 0): (8, 1), (8, 0, 8): (1, 8),
    (8, 0, 2): (4, 2), (8, 0, 1): (8, 1), (8, 2, 4): (2, 4), (6, 3, 2): (3, 2),
}  # fmt: skip


@pytest.mark.parametrize("asked", FOUND, ids=str)
def test_one_left_out_follows_from_the_other(asked: tuple[int, int, int]) -> None:
    found = Axes.of(*asked)
    assert (found.replicas, found.expert) == FOUND[asked]
    members = [rank for replica in range(found.replicas) for rank in found.members(replica)]
    assert members == list(range(asked[0]))
    columns = [found.counterparts(each) for each in range(found.expert)]
    assert [list(each) for each in zip(*columns, strict=True)] == [found.members(i) for i in range(found.replicas)]


REFUSED = {
    (1, 2, 0): "mesh.replica=2 does not divide the number of ranks, 1: take one of 1, or",
    (8, 3, 0): "mesh.replica=3 does not divide the number of ranks, 8: take one of 1, 2, 4, 8, or",
    (8, 0, 16): "mesh.expert=16 does not divide the number of ranks, 8",
    (8, 2, 2): "mesh.replica=2 times mesh.expert=2 is not the number of ranks, 8: leave one of them at 0",
    (8, 4, 4): "mesh.replica=4 times mesh.expert=4 is not the number of ranks, 8",
}


@pytest.mark.parametrize("asked", REFUSED, ids=str)
def test_refused(asked: tuple[int, int, int]) -> None:
    with pytest.raises(UserError) as mistake:
        Axes.of(*asked)
    assert str(mistake.value).startswith(REFUSED[asked]) and "\n" not in str(mistake.value)


# replicas, expert ranks, the nodes of all ranks → what is lost together
UNITS = {
    (1, 2, "aa"): [[0]],
    (2, 2, "aaaa"): [[0, 1]],
    (2, 2, "aabb"): [[0], [1]],
    (4, 1, "aabb"): [[0, 1], [2, 3]],
    (2, 3, "aabbcc"): [[0, 1]],  # they meet on b
    (2, 4, "aabbccdd"): [[0], [1]],
    (3, 2, "aabaca"): [[0, 1, 2]],
    (4, 2, "abcdbacd"): [[0, 2], [1, 3]],
}


@pytest.mark.parametrize("case", UNITS, ids=str)
def test_what_a_node_joins_is_lost_together(case: tuple[int, int, str]) -> None:
    replicas, expert, nodes = case
    assert Axes(replicas, expert).units(nodes) == UNITS[case]
