"""The projection to the vocabulary: the kernel for few rows against the library, and a logit's bits in all company.

Letters: T rows · H hidden · V vocabulary.
"""

from dataclasses import dataclass

import pytest
import torch
from interpret import interpreted

from epmoe.kernels import vocabulary as vocabulary_triton
from epmoe.kernels.vocabulary import MOST_ROWS, TILES, serves
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
    Case("more than a tile's rows", 2 * MOST_ROWS + 2, 130, 200),
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_in_the_interpreter(case: Case) -> None:
    interpreted(compare, case, "cpu", torch.float32)


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


def test_what_the_kernels_serve() -> None:
    """bf16 on a GPU; the interpreter, which cannot multiply bf16, float32."""
    x_TH = torch.empty(1000, 8, dtype=torch.bfloat16, device="meta")
    assert serves(x_TH) and serves(x_TH[:1]) and serves(x_TH[:0]) and not serves(x_TH.float())
    assert serves(torch.empty(1, 8)) and not serves(torch.empty(1, 8, dtype=torch.bfloat16))
    assert TILES[-1].tokens == MOST_ROWS and [tile.tokens for tile in TILES] == sorted(tile.tokens for tile in TILES)


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    for case in (*CASES, Case("gpt-oss", MOST_ROWS, 2880, 20_000)):
        compare(case, "cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "vocab"), [(2880, 2 * 16384 + 1088), (200, 1000)])
def test_bits_follow_neither_part_nor_batch_on_a_gpu(hidden: int, vocab: int) -> None:
    """Every row of every batch, in every part, has the bits that it has in the largest batch over the whole."""
    x_TH, weight_VH = (each.cuda() for each in operands(300, hidden, vocab, torch.bfloat16))
    wanted_TV = twin("vocabulary", x_TH).part_logits(x_TH, weight_VH, (0, vocab), 16384)
    torch.testing.assert_close(
        wanted_TV, part_logits(x_TH, weight_VH, (0, vocab), 16384), rtol=0, atol=1e-5 * hidden**0.5
    )
    for rows in (1, 2, 15, 16, 17, 32, 33, 64, 65, 100, 256, 257):
        first_TV = twin("vocabulary", x_TH).part_logits(x_TH[:rows], weight_VH, (0, vocab), 16384)
        assert torch.equal(first_TV, wanted_TV[:rows]), rows
        last_TV = twin("vocabulary", x_TH).part_logits(x_TH[-rows:], weight_VH, (0, vocab), 16384)
        assert torch.equal(last_TV, wanted_TV[-rows:]), rows
        for begin in range(0, vocab, 320):
            part = (begin, min(begin + 320, vocab))
            assert torch.equal(
                twin("vocabulary", x_TH).part_logits(x_TH[:rows], weight_VH, part, 320), wanted_TV[:rows, slice(*part)]
            )
