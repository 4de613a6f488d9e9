"""The greedy choice over parts of the vocabulary: ties, what is not finite, zeros of both signs; torch and kernels.

Letters: B rows · V vocabulary.
"""

from itertools import pairwise

import pytest
import torch
from compile_sm90 import compile_kernel
from interpret import interpreted

from epmoe.kernels import greedy as greedy_triton
from epmoe.layers import greedy

VOCAB = 20_000  # three runs of a program, the last one short
CUTS = [[0, VOCAB], [0, 7, 8, VOCAB], [0, 8192, VOCAB], [0, 9000, 9001, 9002, VOCAB]]


def rows() -> torch.Tensor:
    """Each row has its trap; `expected` has their answers."""
    logits_BV = torch.randn(10, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    logits_BV[0, [7, 9000, VOCAB - 1]] = 40.0
    logits_BV[1] = -2.0
    logits_BV[2, [8191, 8192]] = 41.0
    logits_BV[3, 9001], logits_BV[3, 5] = torch.nan, torch.inf
    logits_BV[4], logits_BV[4, :600] = 0.0, -0.0
    logits_BV[5] = -torch.inf
    logits_BV[6], logits_BV[6, 12_345] = -3.2e38, -3.0e38
    logits_BV[7, VOCAB - 1] = torch.inf
    logits_BV[8] = -torch.arange(VOCAB) - 1.0
    logits_BV[9, 9000] = -torch.inf
    return logits_BV


EXPECTED = [7, 0, 8191, VOCAB, 0, VOCAB, 12_345, VOCAB, 0, VOCAB]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_parts_choose_what_the_whole_chooses(cuts: list[int]) -> None:
    """Ranks that have a part each find the lowest id of the largest logit; V where one is not finite."""
    parts = [greedy.largest(rows()[:, a:b], a) for a, b in pairwise(cuts)]
    found_B = greedy.join_largest(torch.cat(parts), VOCAB)
    assert found_B.tolist() == EXPECTED


def kernels(cuts: list[int], device: str) -> None:
    padded_BV = torch.full((10, VOCAB + 64), torch.nan).to(device)  # what is beyond a row must not be read
    padded_BV[:, :VOCAB] = rows()
    keys = []
    for a, b in pairwise(cuts):
        keys.append(greedy_triton.largest(padded_BV[:, a:b], a))
        expected_B = greedy.largest(rows()[:, a:b], a)[0]
        bad_B = expected_B >> 32 == greedy.NOT_FINITE
        assert torch.equal(bad_B, keys[-1].amax(0).cpu() >> 32 == greedy.NOT_FINITE)
        assert torch.equal(expected_B[~bad_B], keys[-1].amax(0).cpu()[~bad_B])  # which element it is, is open
    assert greedy_triton.join_largest(torch.cat(keys), VOCAB).tolist() == EXPECTED


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_kernels_in_the_interpreter(cuts: list[int]) -> None:
    interpreted(kernels, cuts, "cpu")


def empty() -> None:
    keys = greedy_triton.largest(torch.zeros(0, 100), 0)
    assert greedy_triton.join_largest(keys, 100).tolist() == []


def test_no_rows() -> None:
    interpreted(empty)
    assert greedy.join_largest(greedy.largest(torch.zeros(0, 100), 0), 100).tolist() == []


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_without_spills(arch: int) -> None:
    ints = dict.fromkeys(("stride", "ids", "first", "rows", "parts", "vocab"), "i32")
    types = {"logits_ptr": "*fp32", "key_ptr": "*i64", "id_ptr": "*i64", **ints}
    shipped = [
        (greedy_triton.largest_kernel, {"N": greedy_triton.RUN}, greedy_triton.WARPS),
        (greedy_triton.join_kernel, {"SP": 32}, 1),
    ]
    for kernel, constants, warps in shipped:
        signature = {name: types[name] for name in kernel.arg_names if name not in constants}
        assert compile_kernel(kernel, signature, constants, warps, arch=arch)["spills"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_kernels_on_a_gpu(cuts: list[int]) -> None:
    kernels(cuts, "cuda")
