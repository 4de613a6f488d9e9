"""Experts that write their rows to every rank themselves: the same rows as without, in each rank's place.

Letters: T tokens · K experts per token · H hidden · S = T·K slots · N ranks.
"""

from dataclasses import replace

import pytest
import torch
from interpret import interpreted
from places import places

from epmoe.kernels.symmetric import MARKS
from epmoe.moe.experts.triton import TritonExperts
from epmoe.moe.experts.triton.tiles import TILES, ExpertTile
from scripts.bench.expert_cases import Case, dispatched, of_experts, random_input, random_weights

OWNERS = [(0, 1, 4), (2,), (3, 5, 6, 7)]  # experts of each rank
FEW = Case("few tokens", tokens=5, hidden=96, intermediate=64, experts=8, top_k=3)


def push_all(case: Case, device: str, dtype: torch.dtype) -> None:
    """Rank after rank, into places that lie in this process."""
    weights = random_weights(case, "mxfp4", dtype, device)
    x_TH, logits_TE = random_input(case, dtype, device)
    whole = TritonExperts.pack(weights, case.activation)
    wanted_TKH = whole.forward(x_TH, dispatched(case, logits_TE))
    of_rank = places(len(OWNERS), wanted_TKH.nbytes, device)
    byte_N = of_rank[0].byte_N
    for rank, ids in enumerate(OWNERS):
        place = of_rank[rank]
        rows_TKH = place.rows(wanted_TKH.shape, dtype)
        experts = TritonExperts.pack(of_experts(weights, ids), case.activation)
        found_TKH = experts.forward(x_TH, dispatched(case, logits_TE, ids), rows_TKH, place)
        assert found_TKH.data_ptr() == rows_TKH.data_ptr()
        marks = [1 if other <= rank else -1 for other in range(len(OWNERS))]
        assert all(each[:MARKS].view(torch.int32)[: len(OWNERS)].tolist() == marks for each in byte_N)
    for rank, place in enumerate(of_rank):
        assert torch.equal(place.rows(wanted_TKH.shape, dtype), wanted_TKH)
        assert bool((byte_N[rank][12:MARKS] == 255).all()), "marks of ranks that are not there"


@pytest.mark.parametrize("tokens", [1, 5])  # of one token some rank has no row
def test_in_the_interpreter(tokens: int) -> None:
    interpreted(push_all, replace(FEW, tokens=tokens), "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    case = Case("several", tokens=tokens, hidden=672, intermediate=352, experts=8, top_k=4)
    push_all(case, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile", ["64x8x64x4x3", "hopper:128x32x64x4x2", "hopper:128x96x64x4x2", "hopper:256x128x64x8x2"]
)
def test_each_tile_on_a_gpu(tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and rows of which less than a tile is left at the end."""
    monkeypatch.setitem(TILES, torch.bfloat16, {0: ((float("inf"), ExpertTile.parse(tile)),)})
    push_all(Case("tile", tokens=150, hidden=480, intermediate=544, experts=8, top_k=4), "cuda", torch.bfloat16)
