"""What a sublayer owes: waited for, added, cleared and given back once."""

from typing import Any

import torch
from torch import nn

from epmoe.layers.norm import AddNorm
from epmoe.layers.owed import Owed


class Lender:
    def __init__(self) -> None:
        self.times = 0

    def give_back(self) -> None:
        self.times += 1


class Work:
    def __init__(self, rows_TJH: torch.Tensor) -> None:
        self.rows_TJH = rows_TJH

    def wait(self) -> None:
        self.rows_TJH += 1  # they come only now


def norm() -> AddNorm:
    made = AddNorm(8, 1e-5).requires_grad_(False)
    made.weight.fill_(1)
    return made


def test_nothing_is_owed_at_first() -> None:
    x_TH = torch.randn(3, 8)
    same_TH, norm_TH = Owed().add_to(x_TH, norm())
    assert torch.equal(same_TH, x_TH) and torch.equal(norm_TH, norm()(x_TH, None)[1])


def test_rows_that_travel_are_waited_for_and_stay() -> None:
    rows_TJH = torch.zeros(3, 2, 8)
    work: Any = Work(rows_TJH)
    x_TH, _ = Owed(rows_TJH, work).add_to(torch.zeros(3, 8), norm())
    assert torch.equal(x_TH, torch.full((3, 8), 2.0)) and rows_TJH.all()  # their own memory is not cleared


def test_borrowed_memory_is_cleared_and_given_back_once() -> None:
    lender, rows_TJH = Lender(), torch.ones(3, 4, 8)
    owed = Owed(rows_TJH, lender=lender)
    owed.wait()
    assert lender.times == 0 and rows_TJH.all()
    x_TH, _ = owed.add_to(torch.zeros(3, 8), norm())
    assert torch.equal(x_TH, torch.full((3, 8), 4.0)) and lender.times == 1 and not rows_TJH.any()


def test_a_linear_layer_reads_the_norm() -> None:
    linear = nn.Linear(8, 5).requires_grad_(False)
    x_TH, norm_TH, out_TE = Owed(torch.randn(3, 1, 8)).add_to(torch.randn(3, 8), norm(), linear)
    assert torch.equal(out_TE, linear(norm_TH)) and x_TH.shape == (3, 8)


def test_two_halves_are_joined_by_token() -> None:
    first = torch.tensor([True, False, True])[:, None, None]
    joined = Owed.join(first, Owed(torch.ones(3, 2, 8)), Owed(torch.zeros(3, 2, 8))).wait()
    assert joined is not None and joined.sum((1, 2)).tolist() == [16.0, 0.0, 16.0]
