"""The projection to the vocabulary: the kernel for few rows against the library, and a logit's bits in all company.

Letters: T rows · H hidden · V vocabulary.
"""

from dataclasses import dataclass

import pytest
import torch
from compile_sm90 import MOST_SHARED, MOST_TENSOR, compile_kernel
from interpret import interpreted

from epmoe.kernels import vocabulary as vocabulary_triton
from epmoe.kernels.vocabulary import MOST_ROWS, TILES, few_logits_kernel, serves
from epmoe.layers.twin import twin
from epmoe.layers.vocabulary import part_logits


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    hidden: int
    vocab: int
    part: tuple[int, int] | None = None  # None: all of it


CASES = [
    Case("one row", 1, 96, 200),
    Case("no rows", 0, 96, 200),
    Case("three rows, odd sizes", 3, 33, 101),
    Case("a step and a half along H", 16, 192, 128),
    Case("the next tile", 17, 96, 200),
    Case("the last tile", MOST_ROWS, 130, 200),
    Case("first part", 5, 96, 200, (0, 64)),
    Case("part that ends within a program", 5, 96, 200, (64, 74)),
    Case("last part", 33, 96, 203, (128, 203)),
    Case("part that begins anywhere", 2, 96, 203, (7, 14)),
]


def operands(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(rows)
    x_TH = torch.randn(rows, hidden, generator=random)
    return x_TH.to(dtype), (torch.randn(vocab, hidden, generator=random) * 0.1).to(dtype)


def compare(case: Case, device: str, dtype: torch.dtype) -> None:
    """Within 1e-5 of the size of a logit's terms: rounding errors of float32 sums, not of bf16 or TF32 operands."""
    x_TH, weight_VH = operands(case.rows, case.hidden, case.vocab, dtype)
    part = case.part or (0, case.vocab)
    logits_TP = vocabulary_triton.part_logits(x_TH.to(device), weight_VH.to(device), part, 16)
    assert logits_TP.shape == (case.rows, part[1] - part[0]) and logits_TP.dtype == torch.float32
    assert logits_TP.stride(1) == 1 and (case.rows < 2 or logits_TP.stride(0) == case.vocab)
    exact_TP = x_TH.double() @ weight_VH[slice(*part)].double().T
    size_TP = x_TH.double().abs() @ weight_VH[slice(*part)].double().abs().T
    assert ((logits_TP.cpu().double() - exact_TP).abs() <= 1e-5 * size_TP).all()


def in_order(device: str, dtype: torch.dtype) -> None:
    """2^24 absorbs each 1 of the steps after it, until the last step takes it away: two sums would keep some of them.

    The ones fall on even and odd steps of every tile, each on a step of its own.
    """
    weight_VH = torch.zeros(65, 128 * 6)
    weight_VH[:, 0] = 2.0**24
    weight_VH[:, 128:-128:192] = 1.0
    weight_VH[:, -1] = -(2.0**24)
    for rows in (1, 17, MOST_ROWS):
        x_TH = torch.ones(rows, weight_VH.shape[1])
        logits_TV = vocabulary_triton.part_logits(x_TH.to(device, dtype), weight_VH.to(device, dtype), (0, 65), 16)
        assert not logits_TV.any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_in_the_interpreter(case: Case) -> None:
    interpreted(compare, case, "cpu", torch.float32)


def test_sums_in_order_in_the_interpreter() -> None:
    interpreted(in_order, "cpu", torch.float32)


@pytest.mark.parametrize("rows", [0, 1, 70])
def test_chunks_of_the_library(rows: int) -> None:
    """What a CPU takes, and a GPU for many rows: columns are where they belong for any chunk and part."""
    x_TH, weight_VH = operands(rows, 24, 50, torch.float32)
    whole_TV = x_TH @ weight_VH.T
    for part in ((0, 50), (0, 14), (14, 28), (28, 50)):
        torch.testing.assert_close(part_logits(x_TH, weight_VH, part, 7), whole_TV[:, slice(*part)])
    for part in ((3, 50), (0, 13)):
        with pytest.raises(AssertionError):
            part_logits(x_TH, weight_VH, part, 7)


def test_what_the_kernel_serves() -> None:
    """bf16 of few rows on a GPU; the interpreter, which cannot multiply bf16, float32."""
    x_TH = torch.empty(MOST_ROWS + 1, 8, dtype=torch.bfloat16, device="meta")
    assert serves(x_TH[:1]) and serves(x_TH[:MOST_ROWS]) and not serves(x_TH) and not serves(x_TH[:1].float())
    assert serves(torch.empty(1, 8)) and not serves(torch.empty(1, 8, dtype=torch.bfloat16))
    assert TILES[-1].tokens == MOST_ROWS and sorted(TILES) == list(TILES)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_compiles_without_spills(tile: vocabulary_triton.VocabularyTile, arch: int) -> None:
    signature = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "logits_ptr": "*fp32"}
    signature |= dict.fromkeys(("tokens", "first", "vocab"), "i32")
    constants = {"HIDDEN": 2880, "N": tile.rows, "M": tile.tokens, "K": tile.depth}
    options = (tile.warps, tile.stages, arch, ("first", "vocab"))
    cost = compile_kernel(few_logits_kernel, signature, constants, *options)
    assert cost["spills"] == 0 and cost["serialized"] == 0, cost
    assert cost["shared"] <= MOST_SHARED[arch] and cost["tensor"] <= MOST_TENSOR, cost
    assert arch != 90 or cost["wgmma"], "Hopper's tensor cores are not used"


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    for case in (*CASES, Case("gpt-oss", MOST_ROWS, 2880, 20_000)):
        compare(case, "cuda", torch.bfloat16)
    in_order("cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "vocab"), [(2880, 2 * 16384 + 1088), (200, 1000)])
def test_bits_follow_neither_part_nor_batch_on_a_gpu(hidden: int, vocab: int) -> None:
    """Every row of every batch, in every part, has the bits that it has in the largest batch over the whole."""
    x_TH, weight_VH = (each.cuda() for each in operands(MOST_ROWS, hidden, vocab, torch.bfloat16))
    wanted_TV = twin("vocabulary", x_TH).part_logits(x_TH, weight_VH, (0, vocab), 16384)
    torch.testing.assert_close(
        wanted_TV, part_logits(x_TH, weight_VH, (0, vocab), 16384), rtol=0, atol=1e-5 * hidden**0.5
    )
    for rows in (1, 2, 15, 16, 17, 32, 33, 63):
        first_TV = twin("vocabulary", x_TH).part_logits(x_TH[:rows], weight_VH, (0, vocab), 16384)
        assert torch.equal(first_TV, wanted_TV[:rows]), rows
        last_TV = twin("vocabulary", x_TH).part_logits(x_TH[-rows:], weight_VH, (0, vocab), 16384)
        assert torch.equal(last_TV, wanted_TV[-rows:]), rows
        for begin in range(0, vocab, 320):
            part = (begin, min(begin + 320, vocab))
            assert torch.equal(
                twin("vocabulary", x_TH).part_logits(x_TH[:rows], weight_VH, part, 320), wanted_TV[:rows, slice(*part)]
            )
