"""Mesh: the group and its collectives, with one rank and with several; a clean end of the process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import commands, run_ranks

from epmoe.ranks import mesh
from epmoe.ranks.mesh import Ranks


def coordinates(mine: Ranks) -> tuple[tuple[int, int, int, int, str], float, int]:
    x = torch.full((1,), float(mine.rank))
    if mine.expert_group is not None:
        dist.all_reduce(x, group=mine.expert_group)
    y = torch.full((1,), mine.rank + 7)
    mine.broadcast(y)
    mine.barrier()
    return (mine.rank, mine.expert_rank, mine.expert_size, mine.nodes, str(mine.device)), x.item(), int(y)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_group_and_mesh(size: int) -> None:
    """Every rank has its place in the expert group, a sum goes over all of it and a broadcast comes from rank 0."""
    expected = [((rank, rank, size, 1, "cpu"), size * (size - 1) / 2, 7) for rank in range(size)]
    assert run_ranks(coordinates, size) == expected


def share(mine: Ranks) -> tuple[object, object, list[list[int]]]:
    value = {"é": [1, None, 0.1, "\ud800"]} if mine.is_main else None
    return mine.broadcast_json(value), mine.broadcast_json([]), mine.gather([mine.rank, 2**40])


@pytest.mark.parametrize("size", [1, 2])
def test_values_travel_between_ranks(size: int) -> None:
    """Anything that JSON can hold goes from rank 0 to all; numbers of all ranks come to each, in their order."""
    gathered = [[rank, 2**40] for rank in range(size)]
    assert run_ranks(share, size) == [({"é": [1, None, 0.1, "\ud800"]}, [], gathered)] * size


def places(mine: Ranks) -> list[object]:
    x = torch.full((1,), 2.0**mine.rank)
    if mine.expert_group is not None:
        dist.all_reduce(x, group=mine.expert_group)
    y, z = torch.full((1,), mine.rank), torch.full((1,), mine.rank + 7)
    mine.broadcast(y)
    mine.spread(z)
    mine.meet_replica("")
    return [
        (mine.replica, mine.replicas, mine.expert_rank, mine.expert_size, mine.first, mine.leads, mine.units),
        (x.item(), y.item(), z.item(), mine.nodes, mine.neighbours),
        mine.broadcast_json({"a": 1} if mine.is_main else None), mine.gather([mine.rank]), mine.gather_all([mine.rank]),
        mine.across_replicas(b"\0 " * mine.replica),
    ]  # fmt: skip


@pytest.mark.parametrize(("replicas", "expert"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_replicas_have_groups_of_their_own(replicas: int, expert: int) -> None:
    """What belongs to a replica stays within it; what belongs to all goes over all of it, from rank 0 or by rank."""
    size = replicas * expert
    for rank, found in enumerate(run_ranks(places, size, replica=replicas)):
        first = rank - rank % expert
        members = range(first, first + expert)
        assert found == [
            (rank // expert, replicas, rank % expert, expert, first, rank == first, (tuple(range(replicas)),)),
            (sum(2.0**each for each in members), first, 7, 1, size),
            {"a": 1}, [[each] for each in members], [[each] for each in range(size)],
            [b"\0 " * each for each in range(replicas)],
        ]  # fmt: skip


def columns(mine: Ranks) -> bytes:
    widths = [3, 1, 4][: mine.size]
    begin = sum(widths[: mine.rank])
    numbers = torch.arange(16.0).view(2, 8) * -1.0  # begins with a negative zero
    found = mine.beside(numbers[:, begin : begin + widths[mine.rank]], widths)
    return found.numpy().tobytes()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_columns_side_by_side(size: int) -> None:
    """Of several widths; every bit is copied."""
    width = [3, 4, 8][size - 1]
    wanted = (torch.arange(16.0).view(2, 8) * -1.0)[:, :width].contiguous().numpy().tobytes()
    assert run_ranks(columns, size) == [wanted] * size


def fail_on_rank_1(mine: Ranks) -> None:
    if mine.rank == 1:
        raise KeyError("x")
    mine.barrier()


def test_run_ranks_raises_the_first_failure() -> None:
    """A test that fails on one rank must fail with that rank's exception and traceback, not with its peers' errors."""
    with pytest.raises(KeyError) as failure:
        run_ranks(fail_on_rank_1, 2)
    assert "rank 1:" in failure.value.__notes__[0] and "in fail_on_rank_1" in failure.value.__notes__[0]


def test_one_rank_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under plain python nothing of torch.distributed starts; the thread count is set as it is for several ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    with mesh.start(device="cpu", threads=1) as mine:
        assert (mine.rank, mine.size, mine.nodes, mine.expert_group, mine.is_main) == (0, 1, 1, None, True)
        assert torch.get_num_threads() == 1
        assert not dist.is_initialized()
        mine.broadcast(torch.zeros(1))
        mine.barrier()
    torch.set_num_threads(threads)


# The end of the process


def sum_and_print() -> None:
    with mesh.start(device="cpu") as mine:
        x = torch.ones(1)
        dist.all_reduce(x, group=mine.expert_group)
        print("sum", x.item())


def test_clean_end_five_times(tmp_path: Path) -> None:
    """No crash at interpreter exit, no message, output flushed."""
    for _ in range(5):
        with commands(sum_and_print, 3, folder=tmp_path) as started:
            assert [command.wait(30) for command in started] == [0, 0, 0]
            assert [(command.stdout, command.stderr) for command in started] == [("sum 3.0\n", "")] * 3
