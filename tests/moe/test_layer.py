"""The MoE layer over real ranks: the same bits as one rank, for every placement of the experts.

Letters: T tokens · H hidden · E experts · K experts per token.
"""

from collections.abc import Callable

import pytest
import torch
from loading import rank_of
from spawn import run_ranks

from epmoe.layers.norm import add_rows
from epmoe.layers.owed import Owed
from epmoe.moe.exchange import Exchange
from epmoe.moe.exchange.all_reduce import AllReduce
from epmoe.moe.exchange.all_to_all import AllToAll, Limits
from epmoe.moe.exchange.slots import Slots
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.layer import MoE
from epmoe.moe.placement import Placement, contiguous
from epmoe.moe.router.reference import ReferenceRouter
from epmoe.ranks.mesh import Ranks
from scripts.bench.expert_cases import Case, of_experts, random_weights

CASE = Case("layer", tokens=11, hidden=96, intermediate=64, experts=7, top_k=3)
# No run of neighbours, and a rank with a single expert.
SCATTERED = Placement(7, ((0, 2, 6), (4,), (1, 3, 5)))


def layer(placement: Placement, rank: int, exchange: Exchange) -> MoE:
    """The layer as one rank holds it; the same weights and router on every rank."""
    torch.manual_seed(0)
    moe = MoE(CASE.hidden, CASE.experts, CASE.top_k, eps=1e-5).requires_grad_(False)
    weights = random_weights(CASE, "mxfp4", torch.float32, "cpu")
    mine = placement.experts[rank]
    experts = ReferenceExperts.pack(of_experts(weights, mine), CASE.activation)
    moe.install(experts, ReferenceRouter(), exchange, placement.here(rank, torch.device("cpu")))
    return moe


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, CASE.hidden, generator=torch.Generator().manual_seed(5))


def outputs(ranks: Ranks, placement: Placement) -> list[torch.Tensor]:
    moe = layer(placement, ranks.expert_rank, Slots(ranks))
    found = []
    for x_TH in map(tokens, (CASE.tokens, 1, 0)):
        rows_TJH = moe.routed(x_TH, moe.router(x_TH)).wait()
        assert rows_TJH is not None
        found.append(add_rows(rows_TJH))
    return found


@pytest.fixture(scope="module")
def one_rank() -> list[torch.Tensor]:
    return run_ranks(outputs, 1, contiguous(CASE.experts, 1))[0]


@pytest.mark.parametrize(
    "placement", [contiguous(7, 2), contiguous(7, 3), SCATTERED], ids=["2 ranks", "3 ranks", "scattered"]
)
def test_ranks_give_the_bits_of_one_rank(placement: Placement, one_rank: list[torch.Tensor]) -> None:
    """Each rank ends with the whole layer's output, bit for bit: uneven shares, a single token, no token."""
    results = run_ranks(outputs, len(placement.experts), placement)
    for rank, result in enumerate(results):
        for actual, wanted in zip(result, one_rank, strict=True):
            assert actual.shape == wanted.shape
            assert torch.equal(actual.view(torch.int32), wanted.view(torch.int32)), f"rank {rank}"


# Tokens of each rank, together those of CASE; of small steps and of large ones, with ranks that bring none.
OWN = [(6, 5), (0, 11), (11, 0), (1, 10), (4, 4, 3), (0, 11, 0), (5, 0, 6), (0, 0, 11), (0, 0, 0)]
EXCHANGE: dict[str, Callable[[Ranks], Exchange]] = {
    "slots": lambda ranks: Slots(ranks, "data"),
    "all_to_all": lambda ranks: AllToAll(ranks, "data", limits=Limits(parted_from=0)),
    "all_reduce": lambda ranks: AllReduce(ranks, "data"),
    "by size": lambda ranks: AllToAll(ranks, "data", limits=Limits(parted_from=8)),
}


def own_outputs(ranks: Ranks, placement: Placement, name: str, shares: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """This rank's rows of each split of the tokens; the last ones are of equal steps whose sizes nobody was told."""
    moe, found = layer(placement, ranks.expert_rank, EXCHANGE[name](ranks)), []
    for counts in [*shares, None]:
        every_TH = tokens(sum(counts) if counts else 4 * ranks.size)
        own = counts or (4,) * ranks.size
        # The router's logits of all at once: torch's product follows the number of rows, the model's norm does not.
        x_TH, logits_TE = (each.split(own)[ranks.expert_rank].clone() for each in (every_TH, moe.router(every_TH)))
        rows_TJH = moe.routed(x_TH, logits_TE, counts=counts).wait()
        sums = name == "all_reduce" and ranks.size > 1
        assert rows_TJH is not None and rows_TJH.shape == (len(x_TH), 1 if sums else CASE.top_k, CASE.hidden)
        found.append(add_rows(rows_TJH))
    return found


def every_output(ranks: Ranks, placement: Placement, shares: list[tuple[int, ...]]) -> dict[str, list[torch.Tensor]]:
    return {name: own_outputs(ranks, placement, name, shares) for name in EXCHANGE}


@pytest.mark.parametrize("placement", [contiguous(7, 1), contiguous(7, 2), SCATTERED], ids=["1", "2", "scattered"])
def test_tokens_that_travel_come_home_with_the_bits_of_one_rank(placement: Placement) -> None:
    """mesh.attention=data: each rank has tokens of its own, as many as the others or not, or none."""
    size = len(placement.experts)
    shares = [counts for counts in OWN if len(counts) == size] or [(11,)]
    results = run_ranks(every_output, size, placement, shares)
    moe = layer(contiguous(7, 1), 0, Slots(rank_of(0, 1)))
    for index, counts in enumerate([*shares, (4,) * size]):
        x_TH = tokens(sum(counts))
        rows_TJH = moe.routed(x_TH, moe.router(x_TH)).wait()
        assert rows_TJH is not None
        wanted_TH = add_rows(rows_TJH)
        for name in EXCHANGE:
            found_TH = torch.cat([result[name][index] for result in results])
            if name == "all_reduce":  # other bits
                torch.testing.assert_close(found_TH, wanted_TH, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(found_TH.view(torch.int32), wanted_TH.view(torch.int32)), (name, counts)


def test_one_rank_computes_the_layer(one_rank: list[torch.Tensor]) -> None:
    """Against a dense sum over all experts in float64, so that all ranks being wrong alike is seen."""
    moe = layer(contiguous(7, 1), 0, Slots(rank_of(0, 1)))
    weights = random_weights(CASE, "mxfp4", torch.float32, "cpu")
    x_TH = tokens(CASE.tokens).double()
    logits_TE = x_TH @ moe.router.weight.double().T + moe.router.bias.double()
    kept_TE = logits_TE >= logits_TE.sort(dim=1).values[:, [-CASE.top_k]]
    gate_TE = logits_TE.masked_fill(~kept_TE, -torch.inf).softmax(1)
    both_TEN = torch.einsum("th,enh->ten", x_TH, weights.gate_up.dequantize(torch.float32).double())
    both_TEN += weights.gate_up_bias_LN
    gate, up = both_TEN[..., 0::2].clamp(max=7), both_TEN[..., 1::2].clamp(-7, 7)
    h_TEI = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    y_TEH = torch.einsum("tei,ehi->teh", h_TEI, weights.down.dequantize(torch.float32).double())
    wanted_TH = (gate_TE[..., None] * (y_TEH + weights.down_bias_LH)).sum(1)
    torch.testing.assert_close(one_rank[0].double(), wanted_TH, rtol=1e-5, atol=1e-5)


def test_parameters_are_norm_and_router_alone() -> None:
    """A model's state must not grow by what the loader installs."""
    moe = layer(contiguous(7, 1), 0, Slots(rank_of(0, 1)))
    assert {name: tuple(p.shape) for name, p in moe.state_dict().items()} == {
        "norm.weight": (96,),
        "router.weight": (7, 96),
        "router.bias": (7,),
    }


def test_forward_before_install_is_refused() -> None:
    with pytest.raises(AssertionError, match="install"):
        MoE(8, 4, 2, eps=1e-5).routed(torch.zeros(1, 8), torch.zeros(1, 4))


def test_the_sublayer_norms_what_it_is_owed() -> None:
    """The residual stream grows by what the attention before it owes; the experts see the norm of that."""
    moe = layer(contiguous(7, 1), 0, Slots(rank_of(0, 1)))
    torch.nn.init.uniform_(moe.norm.weight, 0.5, 1.5)
    x_TH, rows_TH = tokens(5), tokens(5).flip(0)
    after_TH, owed = moe(x_TH, Owed(rows_TH[:, None]))
    assert torch.equal(after_TH, x_TH + rows_TH)
    norm_TH = moe.norm(after_TH, None)[1]
    wanted, found = moe.routed(norm_TH, moe.router(norm_TH)).wait(), owed.wait()
    assert wanted is not None and found is not None and torch.equal(found, wanted)
