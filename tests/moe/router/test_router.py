"""The routers: the reference against plain Python, the Triton one against the reference.

A wrong index sends a token to another expert or loses it, silently; every test here compares whole indexes exactly.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from compile_sm90 import compile_kernel
from interpret import interpreted
from torch._subclasses.fake_tensor import FakeTensorMode

from epmoe.errors import UserError
from epmoe.moe.placement import contiguous
from epmoe.moe.router import ROUTERS, Dispatch, Router
from epmoe.moe.router.reference import route as reference
from epmoe.tables import lookup


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    experts: int
    top_k: int
    ranks: int = 1
    logits: str = "normal"  # a key of LOGITS

    def __str__(self) -> str:
        return self.name


def _normal(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=generator)


def _ties(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Values -1, -0, +0, 1: long runs of equals, and zeros of both signs that must count as equal."""
    value = torch.randint(-1, 2, (tokens, experts), generator=generator).float()
    return value * torch.where(torch.rand(tokens, experts, generator=generator) < 0.5, -1.0, 1.0)


def _equal(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(tokens, experts)


def _last(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Every token chooses the last K experts, all on the last rank: the others have no work."""
    return torch.arange(experts).float().expand(tokens, experts).contiguous()


def _broken(tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """What a diverged model produces: NaN and infinities, some rows of nothing else."""
    value = torch.randn(tokens, experts, generator=generator)
    odd = torch.tensor([math.nan, -math.inf, math.inf])
    broken = torch.rand(tokens, experts, generator=generator) < 0.5
    value[broken] = odd[torch.randint(0, 3, (int(broken.sum()),), generator=generator)]
    value[0::5] = math.nan
    value[1::5] = -math.inf
    return value


LOGITS = {"normal": _normal, "ties": _ties, "equal": _equal, "last": _last, "broken": _broken}

CASES = (
    Case("no_tokens", 0, 32, 4, ranks=2),
    Case("one_token", 1, 32, 4, ranks=2),
    Case("one_expert", 5, 1, 1),
    Case("three_experts_chosen_all", 7, 3, 3, ranks=2),
    Case("three_ranks_of_one_expert", 9, 3, 2, ranks=3),
    Case("all_on_last_rank", 65, 32, 4, ranks=4, logits="last"),
    Case("equal_logits", 33, 32, 4, ranks=3, logits="equal"),
    Case("ties_everywhere", 130, 32, 4, ranks=3, logits="ties"),
    Case("ties_of_odd_size", 41, 17, 8, ranks=5, logits="ties"),
    Case("broken_logits", 70, 30, 4, ranks=4, logits="broken"),
    Case("one_block_full", 64, 32, 4, ranks=2),
    Case("one_over_a_block", 65, 32, 4, ranks=2),
    Case("sixteen_tokens", 16, 128, 4, ranks=3),
    Case("seventeen_tokens", 17, 128, 4, ranks=3),
    Case("sixty_four_tokens", 64, 128, 4, ranks=2),
    Case("three_of_a_few", 12, 40, 3, ranks=3, logits="ties"),
    Case("many_blocks", 700, 128, 4, ranks=2),
    Case("uneven_ranks", 100, 50, 6, ranks=8),
    Case("wide", 40, 250, 8, ranks=3),
    Case("top_1", 100, 256, 1, ranks=3),
)


def logits_of(case: Case) -> torch.Tensor:
    return LOGITS[case.logits](case.tokens, case.experts, torch.Generator().manual_seed(case.tokens + case.experts))


def routed(name: str) -> Callable[..., Dispatch]:
    """`route` of the backend `name`."""
    router: Router = lookup("router", ROUTERS, name)()
    return router.route


def per_rank(route: Callable[..., Dispatch], case: Case, logits_TE: torch.Tensor) -> list[Dispatch]:
    placement = contiguous(case.experts, case.ranks)
    return [
        route(logits_TE, case.top_k, placement.local_E(rank, logits_TE.device), len(placement.experts[rank]))
        for rank in range(case.ranks)
    ]


def by_hand(case: Case, logits_TE: torch.Tensor, rank: int) -> dict[str, list]:
    """The index in plain Python, from its description in epmoe/router/__init__.py."""
    mine = contiguous(case.experts, case.ranks).experts[rank]
    chosen = []
    for logits in logits_TE.tolist():
        order = sorted((-x if math.isfinite(x) else -math.inf, expert) for expert, x in enumerate(logits))
        chosen.append([expert for _, expert in order[: case.top_k]])
    slot_expert = [expert for ids in chosen for expert in ids]
    rows = [[slot for slot, e in enumerate(slot_expert) if e == expert] for expert in mine]
    used = [slot for slots in rows for slot in slots]
    return {
        "expert_TK": chosen,
        "offset_L1": [sum(map(len, rows[:i])) for i in range(len(mine) + 1)],
        "slot_R": used + [len(slot_expert)] * (len(slot_expert) - len(used)),
        "row_S": [used.index(slot) if slot in used else -1 for slot in range(len(slot_expert))],
    }


def assert_same(actual: Dispatch, expected: Dispatch) -> None:
    """Equal ids and index; weights to float32 rounding of exp and one division (a few units in the last place)."""
    for name in ("expert_TK", "offset_L1", "slot_R", "row_S"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.dtype == b.dtype == torch.int32 and a.shape == b.shape, name
        assert torch.equal(a.cpu(), b.cpu()), name
    assert actual.weight_TK.dtype == torch.float32
    torch.testing.assert_close(actual.weight_TK.cpu(), expected.weight_TK.cpu(), rtol=2e-6, atol=1e-7, equal_nan=True)
    assert actual.num_experts == expected.num_experts


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))


# The reference.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_plain_python(case: Case) -> None:
    logits_TE = logits_of(case)
    for rank, dispatch in enumerate(per_rank(reference, case, logits_TE)):
        for name, expected in by_hand(case, logits_TE, rank).items():
            assert getattr(dispatch, name).tolist() == expected, f"{name} on rank {rank}"
        assert dispatch.num_experts == case.experts


def test_weights_are_the_softmax_of_the_chosen_logits() -> None:
    dispatch = reference(torch.tensor([[1.0, -5.0, 3.0, 2.0]]), 2, torch.arange(4, dtype=torch.int32), 4)
    total = math.exp(3) + math.exp(2)
    assert dispatch.expert_TK.tolist() == [[2, 3]]
    assert dispatch.weight_TK[0].tolist() == pytest.approx([math.exp(3) / total, math.exp(2) / total], rel=1e-6)


def test_a_token_without_numbers_has_nan_weights() -> None:
    """Broken logits must show in the output instead of turning into plausible weights."""
    nan, inf = math.nan, math.inf
    logits_TE = torch.tensor([[nan] * 4, [3.0, 1.0, nan, 2.0], [3.0, 1.0, 2.0, -inf], [3.0, inf, 1.0, 2.0]])
    dispatch = reference(logits_TE, 2, torch.arange(4, dtype=torch.int32), 4)
    assert dispatch.expert_TK.tolist() == [[0, 1], [2, 0], [3, 0], [1, 0]]
    assert bool(dispatch.weight_TK.isnan().all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_slot_has_one_owner(case: Case) -> None:
    dispatches = per_rank(reference, case, logits_of(case))
    owners_S = sum((d.row_S >= 0).int() for d in dispatches)
    assert torch.equal(torch.as_tensor(owners_S), torch.ones(case.tokens * case.top_k, dtype=torch.int32))
    for dispatch in dispatches:
        used = int(dispatch.offset_L1[-1])
        assert torch.equal(dispatch.row_S[dispatch.slot_R[:used].long()], torch.arange(used, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_routed_the_same_in_any_batch(dtype: torch.dtype) -> None:
    """The bitwise promise: ids and weight bits of a token depend on its logits alone."""
    logits_TE = logits_of(Case("", 97, 40, 5)).to(dtype)
    local_E = torch.arange(40, dtype=torch.int32)
    together = reference(logits_TE, 5, local_E, 40)
    for first, last in ((0, 1), (1, 4), (4, 97)):
        part = reference(logits_TE[first:last], 5, local_E, 40)
        assert torch.equal(part.expert_TK, together.expert_TK[first:last])
        assert_same_bits(part.weight_TK, together.weight_TK[first:last])


def test_reference_reads_no_value_on_the_host() -> None:
    """Fake tensors have shapes and no values: `.item()`, `nonzero` or a mask as an index raises."""
    with FakeTensorMode():
        dispatch = reference(torch.empty(6, 8), 3, torch.empty(8, dtype=torch.int32), 2)
    assert dispatch.slot_R.shape == dispatch.row_S.shape == (18,) and dispatch.offset_L1.shape == (3,)


def test_more_choices_than_experts_is_refused() -> None:
    with pytest.raises(AssertionError, match="top_k=3 of 2 experts"):
        reference(torch.zeros(1, 2), 3, torch.arange(2, dtype=torch.int32), 2)


# The other routers, each against the reference.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_interpreted(case: Case, dtype: torch.dtype) -> None:
    """In bf16 a key holds the expert's id too; ties are many then."""
    interpreted(_compare, "triton", case, "cpu", dtype)


def test_triton_without_a_gpu_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"router=triton needs a GPU .*: choose router=reference"):
        routed("triton")(torch.zeros(1, 2), 1, torch.arange(2, dtype=torch.int32), 2)


def _compare(name: str, case: Case, device: str, dtype: torch.dtype) -> None:
    route = routed(name)
    logits_TE = logits_of(case).to(device, dtype)
    actual, expected = per_rank(route, case, logits_TE), per_rank(reference, case, logits_TE)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)
        assert_same_bits(a.weight_TK, actual[0].weight_TK)
    # A token's weights have the same bits alone as in the batch.
    alone = per_rank(route, dataclasses.replace(case, ranks=1), logits_TE[-1:])[0]
    assert_same_bits(alone.weight_TK, actual[0].weight_TK[-1:])


# 16 tokens by the three ways that there are: each must give what the others do, bit for bit.
WAYS: dict[str, tuple[int, ...]] = {"one program of 16": (16, 64), "one program of 64": (64,), "two kernels": ()}


def _compare_ways(case: Case, device: str) -> None:
    from epmoe.moe.router.triton import launch as kernels

    logits_TE = logits_of(case).to(device)
    results = [per_rank(partial(kernels.route, one_program=sizes), case, logits_TE) for sizes in WAYS.values()]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b)
            assert_same_bits(a.weight_TK, b.weight_TK)


WAYS_CASES = [
    Case(f"{tokens} tokens, {experts} experts, {logits}", tokens, experts, 4, 3, logits)
    for tokens, experts, logits in ((1, 32, "normal"), (16, 128, "normal"), (13, 32, "ties"), (15, 128, "broken"))
]


@pytest.mark.parametrize("case", WAYS_CASES, ids=str)
def test_triton_tiles_give_the_same_bits(case: Case) -> None:
    interpreted(_compare_ways, case, "cpu")


def test_triton_tiles_change_at_powers_of_two() -> None:
    """The engine warms up powers of two, one less than them, and the largest size: every tile must be among those."""
    from epmoe.moe.router.triton.launch import few_options

    for experts in (32, 128, 256, 300):
        for tokens in range(1, 300):
            power = 1 << (tokens - 1).bit_length()
            assert few_options(tokens, experts) == few_options(power, experts)
        assert len({str(few_options(tokens, experts)) for tokens in range(300)}) <= 3


# gpt-oss's, and the most experts of any published model.
COMPILED = [(32, 4, "*bf16"), (128, 4, "*bf16"), (512, 8, "*bf16")]
MORE = [(3, 3, "*bf16"), (128, 4, "*fp32"), (250, 8, "*bf16")]


@pytest.mark.parametrize(
    ("experts", "top_k", "logits"), [*COMPILED, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_triton_compiles_without_spills(experts: int, top_k: int, logits: str) -> None:
    from epmoe.moe.router.triton import launch as kernels

    integers = dict.fromkeys(("tokens", "blocks", "num_local"), "i32")
    pointers = dict.fromkeys(("expert_ptr", "local_ptr", "count_ptr", "offset_ptr", "slot_ptr", "row_ptr"), "*i32")
    types = {**integers, **pointers, "logits_ptr": logits, "weight_ptr": "*fp32"}
    few = [kernels.few_options(tokens, experts) for tokens in (16, 64)]
    wanted = [(kernels._few, tile) for tile in few if tile]
    wanted += [(kernel, kernels.tile_options(experts)) for kernel in (kernels._top_experts, kernels._index)]
    assert few[0]
    assert kernels.tile_options(kernels.MOST_EXPERTS)["num_warps"] == 32 < kernels.tile_options(16385)["num_warps"]
    for kernel, tile in wanted:
        constants = {"E": experts, "K": top_k, **tile, "PDL": True}
        warps = constants.pop("num_warps")
        signature = {name: types[name] for name in kernel.arg_names if name not in constants}
        cost = compile_kernel(kernel, signature, constants, num_warps=warps)
        assert cost["spills"] == 0, f"{kernel.__name__}: {cost}"
        assert (cost["waits"], cost["early"]) == (1, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_on_the_gpu(case: Case, dtype: torch.dtype) -> None:
    _compare("triton", case, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 16, 17, 63, 64, 65, 1000, 8191, 8192])
@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(32, 4, 4), (128, 4, 3), (256, 8, 8)])
def test_triton_on_the_gpu_at_size(tokens: int, experts: int, top_k: int, ranks: int) -> None:
    """bf16 logits of thousands of tokens tie often; the index spans many blocks."""
    _compare("triton", Case("", tokens, experts, top_k, ranks), "cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("case", WAYS_CASES, ids=str)
def test_triton_tiles_give_the_same_bits_on_the_gpu(case: Case) -> None:
    _compare_ways(case, "cuda")


@pytest.mark.gpu
def test_triton_compiles_nothing_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts kernels that Triton compiles or loads from its cache, after the sizes of the engine's warm-up."""
    import triton

    route = routed("triton")

    def run(tokens: int) -> None:
        route(torch.zeros(tokens, 48, device="cuda", dtype=torch.bfloat16), 4, local_E, 16)

    compiled: list[str] = []
    local_E = contiguous(48, 3).local_E(1, torch.device("cuda"))
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *args, **keys: compiled.append(str(keys)))
    for power in range(9):
        run(2**power)
    assert compiled
    compiled.clear()
    for tokens in (*range(1, 130), 200, 255):
        run(tokens)
    assert not compiled


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTERS)
def test_no_host_synchronisation(name: str) -> None:
    route = routed(name)
    logits_TE = torch.randn(300, 32, device="cuda", dtype=torch.bfloat16)
    local_E = contiguous(32, 2).local_E(1, logits_TE.device)
    expected = route(logits_TE, 4, local_E, 16)  # compiles outside the guarded part
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = route(logits_TE, 4, local_E, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(actual, expected)
    assert_same_bits(actual.weight_TK, expected.weight_TK)
