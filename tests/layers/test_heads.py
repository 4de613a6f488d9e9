"""Which heads a rank has, and that those it has are computed as if all were there, bit for bit."""

import pytest
import torch

from epmoe.errors import UserError
from epmoe.layers.heads import HeadPart, can_share
from epmoe.layers.linear import Runs, linear


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (12, 6), (12, 3), (8, 2), (5, 5), (6, 1)])
def test_every_query_head_is_on_one_rank_with_the_heads_that_it_reads(heads: int, kv_heads: int) -> None:
    able = [ranks for ranks in range(1, 2 * heads) if can_share(heads, kv_heads, ranks)]
    assert {1, kv_heads, heads} <= {*able}
    for ranks in able:
        parts = [HeadPart.of(heads, kv_heads, rank, ranks) for rank in range(ranks)]
        assert [head for part in parts for head in range(*part.query[:2])] == list(range(heads))
        for part in parts:
            group, mine = heads // kv_heads, range(*part.kv[:2])
            assert {head // group for head in range(*part.query[:2])} == {*mine}
            # as in the whole: the same number of query heads to each key/value head, one after the other
            assert part.query.size % part.kv.size == 0 and (part.query.size // part.kv.size == group or len(mine) == 1)
            assert part.query.size * ranks == heads and part.kv.size == max(1, kv_heads // ranks)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(64, 8, 3), (64, 8, 128), (64, 8, 24), (12, 3, 2), (9, 3, 6)])
def test_others_are_refused_in_one_line(heads: int, kv_heads: int, ranks: int) -> None:
    with pytest.raises(UserError) as refused:
        HeadPart.of(heads, kv_heads, 0, ranks)
    line = str(refused.value)
    assert f"{ranks} ranks cannot share {heads} query and {kv_heads}" in line and "mesh.attention=replicate" in line
    assert "\n" not in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("run", [10, 32, 6])
def test_a_run_of_outputs_has_the_bits_of_the_whole(run: int, bias: bool, dtype: torch.dtype) -> None:
    whole, x_TH = runs(9, run, bias, dtype), torch.randn(37, 90).to(dtype)
    out_TN = linear(x_TH, whole)
    exact_TN = x_TH.double() @ whole.weight.double().T + (whole.bias.double() if bias else 0)
    torch.testing.assert_close(out_TN.double(), exact_TN, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)
    for begin, end in ((0, 9), (0, 3), (3, 6), (8, 9), (4, 5)):
        part = runs(end - begin, run, bias, dtype)
        part.weight.copy_(whole.weight[begin * run : end * run])
        if bias:
            part.bias.copy_(whole.bias[begin * run : end * run])
        assert torch.equal(linear(x_TH, part), out_TN[:, begin * run : end * run])
        assert torch.equal(linear(x_TH[:1], part), out_TN[:1, begin * run : end * run])


def runs(count: int, run: int, bias: bool, dtype: torch.dtype) -> Runs:
    return Runs(90, count, run, bias).to(dtype).requires_grad_(False)
