"""What is owed to the residual stream: waited for, added in order, and its memory cleared and given back, once each.

Letters: T tokens · J rows a token · H hidden · E outputs of a linear layer.
"""

from typing import Any

import pytest
import torch
from torch import nn

from epmoe.layers.norm import AddNorm, add_norm, add_norm_linear
from epmoe.layers.owed import Owed

TOKENS, ROWS, HIDDEN = 5, 3, 16


class Work:
    """Rows under way: they are in their place only once they were waited for."""

    def __init__(self, place_TJH: torch.Tensor, rows_TJH: torch.Tensor) -> None:
        self.place_TJH, self.rows_TJH, self.waits = place_TJH, rows_TJH, 0

    def wait(self) -> bool:
        self.waits += 1
        self.place_TJH.copy_(self.rows_TJH)
        return True


class Lender:
    def __init__(self) -> None:
        self.returns = 0

    def give_back(self) -> None:
        self.returns += 1


@pytest.fixture
def norm() -> AddNorm:
    made = AddNorm(HIDDEN, 1e-5).requires_grad_(False)
    made.weight.copy_(torch.rand(HIDDEN, generator=torch.Generator().manual_seed(7)) + 0.5)
    return made


def stream() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


def some_rows(seed: int = 1) -> torch.Tensor:
    """Of very different sizes, so that the order of an addition shows."""
    random, shape = torch.Generator().manual_seed(seed), (TOKENS, ROWS, HIDDEN)
    return torch.randn(shape, generator=random) * 2.0 ** torch.randint(-8, 9, shape, generator=random)


def same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_nothing_owed_leaves_the_stream_alone(norm: AddNorm) -> None:
    assert same(Owed().add_to(stream(), norm), add_norm(stream(), None, norm.weight, 1e-5))
    assert torch.equal(Owed().add_to(stream(), norm)[0], stream()) and Owed().wait() is None


def test_rows_are_added_before_the_norm(norm: AddNorm) -> None:
    """And stay as they are: nobody lent their memory."""
    rows_TJH = some_rows()
    assert same(Owed(rows_TJH).add_to(stream(), norm), add_norm(stream(), some_rows(), norm.weight, 1e-5))
    assert torch.equal(rows_TJH, some_rows())


def test_a_linear_layer_of_the_norm(norm: AddNorm) -> None:
    torch.manual_seed(3)
    linear = nn.Linear(HIDDEN, 4).requires_grad_(False)
    wanted = add_norm_linear(stream(), some_rows(), norm.weight, 1e-5, linear)
    assert same(Owed(some_rows()).add_to(stream(), norm, linear), wanted)


@pytest.mark.parametrize("outputs", [None, 4])
def test_rows_under_way_are_waited_for_once(norm: AddNorm, outputs: int | None) -> None:
    place_TJH = torch.full((TOKENS, ROWS, HIDDEN), torch.nan)
    work: Any = Work(place_TJH, some_rows())
    owed = Owed(place_TJH, work)
    assert work.waits == 0 and place_TJH.isnan().all()
    if outputs is None:
        found: tuple[torch.Tensor, ...] = owed.add_to(stream(), norm)
    else:
        found = owed.add_to(stream(), norm, nn.Linear(HIDDEN, outputs).requires_grad_(False))
    assert work.waits == 1 and same(found[:2], add_norm(stream(), some_rows(), norm.weight, 1e-5))


def test_borrowed_memory_is_cleared_and_given_back_once(norm: AddNorm) -> None:
    place_TJH, lender = torch.full((TOKENS, ROWS, HIDDEN), torch.nan), Lender()
    work: Any = Work(place_TJH, some_rows())
    owed = Owed(place_TJH, work, lender)
    assert lender.returns == 0
    assert same(owed.add_to(stream(), norm), add_norm(stream(), some_rows(), norm.weight, 1e-5))
    assert (work.waits, lender.returns) == (1, 1) and not place_TJH.any()


def test_a_look_gives_nothing_back() -> None:
    """`wait` alone: the lender goes on to believe that the memory is in use."""
    lender = Lender()
    owed = Owed(some_rows(), lender=lender)
    seen_TJH = owed.wait()
    assert seen_TJH is not None and torch.equal(seen_TJH, some_rows()) and lender.returns == 0


def test_borrowed_rows_before_a_linear_layer_are_a_bug(norm: AddNorm) -> None:
    """Its kernel reads them several times, so it cannot clear them."""
    with pytest.raises(AssertionError, match="borrows"):
        Owed(some_rows(), lender=Lender()).add_to(stream(), norm, nn.Linear(HIDDEN, 4))
    with pytest.raises(AssertionError, match="borrows"):
        Owed().add_to(stream(), norm, nn.Linear(HIDDEN, 4))


def test_two_halves_become_one() -> None:
    """Each token's rows from its own half, both waited for once."""
    own_T11 = torch.tensor([True, False, True, True, False])[:, None, None]
    places = [torch.full((TOKENS, ROWS, HIDDEN), torch.nan) for _ in range(2)]
    works: list[Any] = [Work(place_TJH, some_rows(seed)) for seed, place_TJH in enumerate(places)]
    joined = Owed.join(own_T11, *(Owed(place_TJH, work) for place_TJH, work in zip(places, works, strict=True)))
    assert [work.waits for work in works] == [1, 1]
    assert joined.rows_TJH is not None and joined.work is None and joined.lender is None
    for token, own in enumerate(own_T11.flatten().tolist()):
        assert torch.equal(joined.rows_TJH[token], some_rows(0 if own else 1)[token])


def test_halves_in_borrowed_memory_are_a_bug() -> None:
    """There is room for one of them only."""
    own_T11 = torch.ones(TOKENS, 1, 1, dtype=torch.bool)
    own, borrowed = Owed(some_rows()), Owed(some_rows(), lender=Lender())
    for first, second in ((borrowed, own), (own, borrowed)):
        with pytest.raises(AssertionError, match="memory of their own"):
            Owed.join(own_T11, first, second)
