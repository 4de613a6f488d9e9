"""The residual sum with its norm: the kernel against the reference, and the order and roundings of both.

Letters: T tokens · K rows a token · H hidden.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from compile_sm90 import MOST_SHARED, compile_kernel
from interpret import interpreted

from epmoe.kernels import norm as norm_triton
from epmoe.layers.norm import AddNorm, add_norm, add_rows

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    rows: int | None  # K; None: nothing to add
    hidden: int = 96


CASES = [
    Case("first layer", 3, None),
    Case("attention", 5, 1),
    Case("four slots", 3, 4),
    Case("one token", 1, 4, 2880),
    Case("eight slots, odd width", 2, 8, 33),
    Case("no tokens", 0, 4),
]


def operands(
    case: Case, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, float]:
    """Rows of very different sizes, so that the order of an addition shows; a token of zeros, a large one."""
    random = torch.Generator().manual_seed(0)
    x_TH = torch.randn(case.tokens, case.hidden, generator=random)
    rows_TKH = None
    if case.rows is not None:
        shape = (case.tokens, case.rows, case.hidden)
        rows_TKH = torch.randn(shape, generator=random) * 2.0 ** torch.randint(-8, 9, shape, generator=random)
        rows_TKH[:1] = -0.0
    if case.tokens > 1:
        x_TH[0] = 0
        x_TH[1] *= 1e4
    weight_H = torch.rand(case.hidden, generator=random) + 0.5
    return x_TH.to(dtype), None if rows_TKH is None else rows_TKH.to(dtype), weight_H.to(dtype), EPS


def compare(case: Case, device: str, dtype: torch.dtype, tolerance: float) -> None:
    x_TH, rows_TKH, weight_H, eps = operands(case, dtype)
    wanted_sum_TH, wanted_TH = add_norm(x_TH, rows_TKH, weight_H, eps)
    moved_TH, moved_TKH = x_TH.to(device), None if rows_TKH is None else rows_TKH.to(device)
    sum_TH, norm_TH = norm_triton.add_norm(moved_TH, moved_TKH, weight_H.to(device), eps)
    if moved_TKH is not None:
        given_TKH, fresh_TKH = moved_TKH.clone(), operands(case, dtype)[1]
        again = norm_triton.add_norm(moved_TH, given_TKH, weight_H.to(device), eps, clear=True)
        assert all(torch.equal(a, b) for a, b in zip(again, (sum_TH, norm_TH), strict=True))
        assert not given_TKH.any() and not given_TKH.signbit().any()
        assert fresh_TKH is not None and torch.equal(moved_TKH.cpu(), fresh_TKH), "cleared what it was not told to"
    assert torch.equal(moved_TH.cpu(), operands(case, dtype)[0]), "changed its argument"
    assert sum_TH.dtype == norm_TH.dtype == dtype
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(sum_TH.cpu().view(bits), wanted_sum_TH.view(bits)), "the residual sum must have the same bits"
    torch.testing.assert_close(norm_TH.cpu(), wanted_TH, rtol=tolerance, atol=0)


def compare_linear(case: Case, outputs: int, bias: bool, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """The same bits for sum and norm as without the linear layer, and a product within `tolerance` of its size."""
    x_TH, rows_TKH, weight_H, eps = operands(case, dtype)
    assert rows_TKH is not None
    torch.manual_seed(0)
    linear = torch.nn.Linear(case.hidden, outputs, bias, dtype=dtype).requires_grad_(False)
    moved = (x_TH.to(device), rows_TKH.to(device), weight_H.to(device), eps)
    linear_there = copy.deepcopy(linear).to(device)
    sum_TH, norm_TH, out_TE = norm_triton.add_norm_linear(*moved, linear_there)
    for got, wanted in zip((sum_TH, norm_TH), norm_triton.add_norm(*moved), strict=True):
        assert torch.equal(got, wanted)
    assert out_TE.shape == (case.tokens, outputs) and out_TE.dtype == dtype
    exact_TE = torch.nn.functional.linear(norm_TH.cpu().double(), linear.weight.double())
    if linear.bias is not None:
        exact_TE += linear.bias.double()
    size_T1 = norm_TH.cpu().double().norm(dim=1, keepdim=True) / case.hidden**0.5
    assert ((out_TE.cpu().double() - exact_TE).abs() <= tolerance * (exact_TE.abs() + size_T1)).all()


# the last has more tokens times outputs than one kernel takes
LINEARS = [
    (Case("five outputs", 3, 1), 5, True),
    (Case("one token", 1, 4, 2880), 32, False),
    (Case("T", 130, 1), 16, True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_in_the_interpreter(case: Case) -> None:
    interpreted(compare, case, "cpu", torch.float32, 1e-6)  # the sum of squares in another order


@pytest.mark.parametrize(("case", "outputs", "bias"), LINEARS, ids=lambda value: getattr(value, "name", str(value)))
def test_linear_kernel_in_the_interpreter(case: Case, outputs: int, bias: bool) -> None:
    assert (case.tokens * outputs > norm_triton.MOST_AGAIN) == (case.tokens == 130)
    interpreted(compare_linear, case, outputs, bias, "cpu", torch.float32, 1e-6)


def together_and_alone() -> None:
    x_TH, rows_TKH, weight_H, eps = operands(Case("batch", 7, 4))
    assert rows_TKH is not None
    sum_TH, norm_TH = norm_triton.add_norm(x_TH, rows_TKH, weight_H, eps)
    linear = torch.nn.Linear(96, 9).requires_grad_(False)
    out_TE = norm_triton.add_norm_linear(x_TH, rows_TKH, weight_H, eps, linear)[2]
    for t in range(7):
        row = slice(t, t + 1)
        assert torch.equal(
            norm_triton.add_norm_linear(x_TH[row], rows_TKH[row], weight_H, eps, linear)[2][0], out_TE[t]
        )
        alone = norm_triton.add_norm(x_TH[t : t + 1].clone(), rows_TKH[t : t + 1].clone(), weight_H, eps)
        assert torch.equal(alone[0][0], sum_TH[t]) and torch.equal(alone[1][0], norm_TH[t])


def test_a_row_does_not_depend_on_the_batch() -> None:
    interpreted(together_and_alone)


def test_rows_are_added_upwards_from_plus_zero() -> None:
    """2^24 absorbs the first 1 but not the 2 that comes after it, in the reference; the kernel has its bits (above)."""
    rows_TKH = torch.tensor([[2.0**24, 1.0, 1.0], [1.0, 1.0, 2.0**24], [-0.0, -0.0, -0.0]])[:, :, None]
    assert add_rows(rows_TKH).flatten().tolist() == [2.0**24, 2.0**24 + 2, 0.0]
    assert not add_rows(rows_TKH).signbit().any()


def test_three_roundings() -> None:
    """The rows' sum, the residual and the norm are each rounded to bf16 once, and nothing else is."""
    rows_TKH = torch.tensor([1.0, 2**-9, 2**-9, 2**-9]).bfloat16().view(1, 4, 1)
    assert add_rows(rows_TKH).item() == 1 + 2**-7  # rounded after each addition it would stay 1
    x_TH = torch.full((1, 1), 2.0**-8).bfloat16()
    sum_TH, norm_TH = add_norm(x_TH, rows_TKH, torch.full((1,), 1.25), 0.0)
    # 1 + 2^-7 + 2^-8 is halfway and goes to the even 1 + 2^-6; the exact 1 + 3·2^-9 + 2^-8 would go to 1 + 2^-7
    assert sum_TH.item() == 1 + 2**-6 and sum_TH.dtype == torch.bfloat16
    assert norm_TH.item() == 1.25 and norm_TH.dtype == torch.bfloat16


def test_the_reference_clears_when_told() -> None:
    x_TH, rows_TKH, weight_H, eps = operands(Case("four slots", 3, 4))
    assert rows_TKH is not None
    kept_TKH = rows_TKH.clone()
    wanted = add_norm(x_TH, kept_TKH, weight_H, eps)
    got = add_norm(x_TH, rows_TKH, weight_H, eps, clear=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert kept_TKH.any() and not rows_TKH.any()


def test_the_norm_is_rms() -> None:
    """Against the formula in float64, with an epsilon that shows."""
    x_TH, _, weight_H, _ = operands(Case("plain", 4, None))
    layer = AddNorm(96, 0.5)
    layer.weight.data = weight_H
    same_TH, norm_TH = layer(x_TH, None)
    wide_TH = x_TH.double()
    wanted_TH = wide_TH / (wide_TH.square().mean(1, keepdim=True) + 0.5).sqrt() * weight_H.double()
    torch.testing.assert_close(norm_TH.double(), wanted_TH, rtol=1e-6, atol=0)
    assert torch.equal(same_TH, x_TH)


def overflowing(device: str) -> None:
    x_TH = torch.ones(4, 96)
    x_TH[1:, 5] = torch.tensor([3e20, torch.inf, torch.nan])  # the first one's square is what is not finite
    one_H = torch.ones(96)
    for version in (add_norm, norm_triton.add_norm):
        norm_TH = version(x_TH.to(device), None, one_H.to(device), EPS)[1]
        assert norm_TH.isnan().all(1).tolist() == [False, True, True, True], version


def test_a_row_that_overflows_is_nan() -> None:
    """Protects from silence: an infinite rms makes zeros of the row's finite numbers, and a model goes on with them."""
    interpreted(overflowing, "cpu")


@pytest.mark.gpu
def test_a_row_that_overflows_is_nan_on_a_gpu() -> None:
    overflowing("cuda")


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("rows", "clear"), [(0, False), (1, False), (4, False), (4, True)])
def test_compiles_without_spills(rows: int, clear: bool, arch: int) -> None:
    types = {**dict.fromkeys(("x_ptr", "rows_ptr", "weight_ptr", "sum_ptr", "norm_ptr"), "*bf16"), "eps": "fp32"}
    options = norm_triton.tile_options(2880)
    constants = {"H": 2880, "K": rows, "HP": options["HP"], "PDL": arch >= 90} | ({} if rows else {"rows_ptr": None})
    signature = {name: kind for name, kind in types.items() if name not in constants}
    cleared = {**constants, "CLEAR": clear}
    cost = compile_kernel(norm_triton.add_norm_kernel, signature, cleared, options["num_warps"], arch=arch)
    assert cost["spills"] == 0, cost
    assert (cost["waits"], cost["early"]) == (arch >= 90, arch >= 90)  # the next kernel is let in before the wait
    if rows and not clear:
        signature = {**types, **dict.fromkeys(("linear_ptr", "bias_ptr", "out_ptr"), "*bf16")}
        constants |= {"E": 32, "B": norm_triton.OUTPUTS, "R": norm_triton.RUNS}
        cost = compile_kernel(norm_triton.add_norm_linear_kernel, signature, constants, options["num_warps"], arch=arch)
        assert cost["spills"] == 0 and cost["shared"] <= MOST_SHARED[arch], cost
        assert (cost["waits"], cost["early"]) == (arch >= 90, arch >= 90)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    """A unit in the last place where the sum of squares, in another order, decides a rounding."""
    for case in (*CASES, Case("prefill", 4096, 4, 2880)):
        compare(case, "cuda", dtype, {torch.bfloat16: 2.0**-7, torch.float32: 1e-6}[dtype])


@pytest.mark.gpu
def test_kernel_with_a_linear_layer_on_a_gpu() -> None:
    """Rounded once: half a unit in the last place."""
    for case, outputs, bias in LINEARS:
        compare_linear(case, outputs, bias, "cuda", torch.bfloat16, 2.0**-8)
