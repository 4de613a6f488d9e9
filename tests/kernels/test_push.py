"""Rows pushed into the places of N ranks: Triton's version against torch's, ranks one after the other or side by side.

Letters: T tokens · K experts per token · H hidden · S = T·K slots · N ranks.
"""

import time
from itertools import pairwise

import pytest
import torch
import triton.language as tl
from compile_sm90 import compile_kernel
from interpret import interpreted
from places import places

from epmoe.kernels import norm as norm_triton
from epmoe.kernels import push as push_triton
from epmoe.layers import norm, push

# ranks, tokens, experts per token, hidden
SHAPES = [(2, 1, 4, 96), (3, 5, 2, 33), (8, 3, 4, 64), (5, 2, 1, 130)]


def one_after_the_other(ranks: int, tokens: int, top_k: int, hidden: int) -> None:
    """All push, then all read: so nobody waits in vain. Again and again, and a rank may own nothing."""
    random, shape = torch.Generator().manual_seed(ranks), (tokens, top_k, hidden)
    of_rank = places(ranks, 4 * tokens * top_k * hidden)
    for version, add_norm in ((push, norm.add_norm), (push_triton, norm_triton.add_norm)):
        for round_ in range(3):
            rows_TKH = torch.randn(shape, generator=random)
            owner_S = torch.randint(min(round_, ranks - 1), ranks, (tokens * top_k,), generator=random)
            x_TH, weight_H = torch.randn(tokens, hidden, generator=random), torch.ones(hidden)
            for place in of_rank:
                own_S = owner_S == place.rank
                own_TKH = torch.where(own_S.view(tokens, top_k, 1), rows_TKH, 7.0)
                version.push(own_TKH, torch.where(own_S, 0, -1).int(), place)
            wanted_TH = norm.add_norm(x_TH, rows_TKH, weight_H, 1e-5)[0]
            for place in of_rank:
                mine_TKH = place.rows(shape, torch.float32)
                version.arrive(mine_TKH, place)
                assert torch.equal(mine_TKH, rows_TKH) and place.mark_N.tolist() == [1] * ranks
                sum_TH, _ = add_norm(x_TH, mine_TKH, weight_H, 1e-5, place=place)
                assert torch.equal(sum_TH, wanted_TH)
            assert all(bool((each == 255).all()) for each in of_rank[0].byte_N)


@pytest.mark.parametrize(("ranks", "tokens", "top_k", "hidden"), SHAPES)
def test_in_the_interpreter(ranks: int, tokens: int, top_k: int, hidden: int) -> None:
    interpreted(one_after_the_other, ranks, tokens, top_k, hidden)


def nan_of_all_ones(dtype: torch.dtype) -> None:
    """It would be waited for, for ever."""
    for version in (push, push_triton):
        (place,) = places(1, 64)
        y_TKH = torch.zeros(1, 2, 8, dtype=dtype)
        push.bits(y_TKH)[0, 1, 3] = -1
        version.push(y_TKH, torch.tensor([0, 1], dtype=torch.int32), place)
        rows_TKH = place.rows(y_TKH.shape, dtype)
        assert rows_TKH.isnan().sum() == 1 and rows_TKH[0, 1, 3].isnan() and (push.bits(rows_TKH) != -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_of_all_ones_becomes_another(dtype: torch.dtype) -> None:
    interpreted(nan_of_all_ones, dtype)


def test_what_never_comes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's version, whose wait is the host's."""
    monkeypatch.setattr(push, "LIMIT_S", 0.05)
    (place, _), begin = places(2, 64), time.monotonic()
    with pytest.raises(AssertionError, match="have not come"):
        push.arrive(place.rows((1, 1, 4), torch.float32), place)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch: int) -> None:
    """And rows go out 16 bytes a thread at a time."""
    types = {"y_ptr": "*bf16", "row_ptr": "*i32", "address_ptr": "*i64", "rank": "i32"}
    sizes = {"H": 2880, "HP": 4096, "N": 8}
    for kernel, constants in (
        (push_triton.push_kernel, {**sizes, "PDL": arch >= 90}),
        (push_triton.arrive_kernel, {**sizes, "K": 4, "DTYPE": tl.bfloat16}),
    ):
        signature = {name: types[name] for name in kernel.arg_names if name not in constants}
        cost = compile_kernel(kernel, signature, constants, 8, arch=arch)
        assert cost["spills"] == 0
        if kernel is push_triton.push_kernel:
            assert (cost["waits"], cost["early"], cost["loads"]) == (arch >= 90, 0, 0)
            assert cost["far"] == 8 * 2, "a thread's stores to each rank"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_as_streams_of_one_gpu(ranks: int, dtype: torch.dtype) -> None:
    """Each its own stream and graph of seven layers, at its own speed; three places in turn. (NVLink's order of stores
    is not tried by that: test_symmetric.py.)"""
    tokens, top_k, hidden, layers = 6, 4, 2880, 7
    shape, generator = (tokens, top_k, hidden), torch.Generator("cuda").manual_seed(ranks)
    turns = [places(ranks, 4 * tokens * top_k * hidden, "cuda") for _ in range(3)]
    rows = torch.randn(layers, *shape, dtype=dtype, device="cuda", generator=generator)
    owner = torch.randint(0, ranks, (layers, tokens * top_k), device="cuda", generator=generator)
    x_TH = torch.zeros(tokens, hidden, dtype=dtype, device="cuda")
    weight_H = torch.ones(hidden, dtype=dtype, device="cuda")
    found = torch.zeros(ranks, layers, tokens, hidden, dtype=dtype, device="cuda")
    order = [0, *([1, 2] * layers)][:layers]
    assert all(a != b for a, b in pairwise([*order, 0]))

    def work(rank: int, count: int = layers) -> None:
        for layer, turn in enumerate(order[:count]):
            place = turns[turn][rank]
            mine_TKH, row_S = place.rows(shape, dtype), torch.where(owner[layer] == rank, 0, -1).int()
            push_triton.push(rows[layer], row_S, place)
            found[rank, layer] = norm_triton.add_norm(x_TH, mine_TKH, weight_H, 1e-5, place=place)[0]

    streams = [torch.cuda.Stream() for _ in range(ranks)]
    torch.cuda.synchronize()
    for rank in range(ranks):  # compiles: nobody's rows come, so all are there before, in each place once
        for turn in turns:
            for each in turn[0].byte_N:
                each.zero_()
        work(rank, len(turns))
        torch.cuda.synchronize()
    graphs = []
    for rank, stream in enumerate(streams):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[rank], stream=stream):
            work(rank)
    for turn in turns:
        for each in turn[0].byte_N:
            each.fill_(255)
    torch.cuda.synchronize()
    for round_ in range(60):
        owner.copy_(torch.randint(round_ % 2, ranks, owner.shape, device="cuda", generator=generator))
        torch.cuda.synchronize()
        for rank in range(ranks):
            with torch.cuda.stream(streams[rank]):
                if (round_ + rank) % 3 == 0:
                    torch.cuda._sleep(50_000 * rank)
                graphs[rank].replay()
        torch.cuda.synchronize()
        wanted = torch.stack([norm.add_rows(each) for each in rows])
        assert all(torch.equal(each, wanted) for each in found)
    assert all(bool((each == 255).all()) for turn in turns for each in turn[0].byte_N)
