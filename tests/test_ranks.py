"""ranks: coordinates, group and mesh."""

import time
import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks


def coordinates(ranks):
    x = torch.full((3,), float(ranks.rank))
    if ranks.size > 1:
        dist.all_reduce(x, group=ranks.expert_group)
    return ranks.rank, ranks.size, ranks.expert_rank, x


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_group(size):
    t = time.time()
    results = run_ranks(coordinates, size)
    assert [r[:3] for r in results] == [(i, size, i) for i in range(size)]
    assert all(r[3].tolist() == [size * (size - 1) / 2] * 3 for r in results)
    print(size, time.time() - t)


def boom(ranks):
    if ranks.rank == 1:
        raise KeyError("x")
    ranks.barrier()


def test_failure():
    with pytest.raises(KeyError) as e:
        run_ranks(boom, 2)
    assert "rank 1:" in e.value.__notes__[0]
