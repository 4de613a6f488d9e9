"""Exchange: `slots` gives one rank's bits on any number of ranks; `all_reduce` is close, and is shown not to.

Letters: T tokens · K experts per token · H hidden.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spawn import run_ranks

from epmoe.layers.norm import add_rows
from epmoe.moe.exchange import EXCHANGES, Exchange
from epmoe.ranks.mesh import Ranks
from epmoe.tables import lookup


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    top_k: int = 4
    hidden: int = 33  # odd, so that bf16 rows do not fill whole words
    dtype: torch.dtype = torch.bfloat16
    owners: str = "random"  # or "first": every slot on rank 0, the other ranks have no work


CASES = [
    Case("bf16", 64),
    Case("float32", 64, dtype=torch.float32),
    Case("one-token", 1),
    Case("one-expert-per-token", 16, top_k=1),
    Case("eight-experts-per-token", 16, top_k=8, dtype=torch.float32),
    Case("no-tokens", 0),
    Case("ranks-without-work", 16, owners="first"),
]


def slots_TKH(case: Case) -> torch.Tensor:
    """Rows of very different sizes, so that the order of an addition shows; with exact zeros of both signs."""
    random = torch.Generator().manual_seed(0)
    shape = (case.tokens, case.top_k, case.hidden)
    y_TKH = torch.randn(shape, generator=random) * 2.0 ** torch.randint(-8, 9, shape, generator=random)
    zero_TKH = torch.rand(shape, generator=random) < 0.2
    sign_TKH = torch.randn(shape, generator=random)
    y_TKH = torch.where(zero_TKH, torch.zeros(()).copysign(sign_TKH), y_TKH)
    if case.tokens:
        y_TKH[0] = -0.0  # a token whose every slot is -0
    return y_TKH.to(case.dtype)


def unrouted(top_k: int) -> Any:
    """A routing for an exchange that sends no token anywhere."""
    return SimpleNamespace(top_k=top_k, route=lambda logits_TE: None)


def exchange_cases(ranks: Ranks, name: str, cases: list[Case], overlap: bool = False) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []
    exchange: Exchange = lookup("combine", EXCHANGES, name)(ranks)
    for seed, case in enumerate(cases):
        random = torch.Generator().manual_seed(seed)
        owner_TK = torch.randint(0, ranks.size, (case.tokens, case.top_k), generator=random)
        if case.owners == "first":
            owner_TK.zero_()
        mine_TK1 = (owner_TK == ranks.expert_rank)[:, :, None]
        y_TKH = torch.where(mine_TK1, slots_TKH(case), 0.0).to(ranks.device)
        norm_TH = y_TKH.new_empty(case.tokens, case.hidden)
        sent = exchange.dispatch(norm_TH, norm_TH, unrouted(case.top_k), overlap=overlap)
        assert sent.x_XH is norm_TH
        owed = exchange.combine(y_TKH if sent.rows_XKH is None else sent.rows_XKH.copy_(y_TKH), sent)
        rows_TJH = owed.wait()
        assert rows_TJH is not None
        outputs.append(add_rows(rows_TJH).cpu())
    return outputs


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_slots_are_bitwise(size: int, overlap: bool) -> None:
    """The promise under DESIGN's "Combine by slots": no bit depends on the number of ranks or on who owns a slot."""
    for rank_outputs in run_ranks(exchange_cases, size, "slots", CASES, overlap):
        for case, y_TH in zip(CASES, rank_outputs, strict=True):
            expected_TH = add_rows(slots_TKH(case))
            assert y_TH.dtype == case.dtype and y_TH.shape == (case.tokens, case.hidden), case.name
            assert torch.equal(bits(y_TH), bits(expected_TH)), case.name


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["slots", "all_reduce"])
def test_every_exchange_is_near_the_exact_sum(name: str, overlap: bool) -> None:
    """What serves ranks that have all tokens gives Σ_k within the rounding of K slots and N ranks, the same on each."""
    results = run_ranks(exchange_cases, 3, name, CASES, overlap)
    for index, case in enumerate(CASES):
        exact_TH = slots_TKH(case).double().sum(1)
        size_TH = slots_TKH(case).double().abs().sum(1)
        # each of at most 3 ranks' roundings is half a unit in the last place of a partial sum, itself at most `size`
        bound = 3 * (2.0**-8 if case.dtype == torch.bfloat16 else 8 * 2.0**-24)
        for rank_outputs in results:
            assert ((rank_outputs[index].double() - exact_TH).abs() <= bound * size_TH).all(), case.name
            assert torch.equal(bits(rank_outputs[index]), bits(results[0][index])), case.name


def test_all_reduce_in_bf16_is_not_bitwise() -> None:
    """The bitwise test can fail: partial sums rounded at each of 4 ranks differ from one rank's sum."""
    case = Case("bf16", 64)
    (y_TH,) = run_ranks(exchange_cases, 4, "all_reduce", [case])[0]
    different = (bits(y_TH) != bits(add_rows(slots_TKH(case)))).float().mean()
    assert different > 0.05, f"{different:.1%} of the elements differ"


@pytest.mark.multigpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("size", [size for size in (2, 4) if size <= max(2, torch.cuda.device_count())])
def test_slots_are_bitwise_on_gpus(size: int, overlap: bool) -> None:
    """The same promise on GPUs, against one GPU."""
    (one_gpu,) = run_ranks(exchange_cases, 1, "slots", CASES, device="cuda")
    for rank_outputs in run_ranks(exchange_cases, size, "slots", CASES, overlap, device="cuda", timeout=120):
        for case, y_TH, expected_TH in zip(CASES, rank_outputs, one_gpu, strict=True):
            assert torch.equal(bits(y_TH), bits(expected_TH)), case.name


if torch.cuda.device_count() >= 4:

    @pytest.mark.multigpu
    def test_all_reduce_in_bf16_is_not_bitwise_over_nccl() -> None:
        """The GPU test can fail too; two ranks would not do, where a sum of two is rounded once."""
        case = Case("bf16", 64)
        (y_TH,) = run_ranks(exchange_cases, 4, "all_reduce", [case], device="cuda", timeout=120)[0]
        assert not torch.equal(bits(y_TH), bits(add_rows(slots_TKH(case))))
