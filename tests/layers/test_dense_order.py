"""Each dense product alone, at every number of rows: a row has the same bits in any company.

Letters: T rows · H inputs · N outputs · V vocabulary.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from epmoe.layers.linear import linear
from epmoe.layers.norm import add_norm_linear
from epmoe.layers.vocabulary import part_logits

MOST = 300
Product = Callable[[torch.Tensor], torch.Tensor]  # rows [T, H] → [T, N]


def layer(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    random = torch.Generator().manual_seed(outputs)
    made = nn.Linear(inputs, outputs).requires_grad_(False)
    made.weight.copy_(torch.randn(outputs, inputs, generator=random) * 0.1)
    made.bias.copy_(torch.randn(outputs, generator=random))
    return made.to(dtype)


def products(inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, Product]:
    """What multiplies a step's rows with a weight, the experts aside."""
    projection, ones_H = layer(inputs, outputs, dtype), torch.ones(inputs, dtype=dtype)
    return {
        "linear": lambda x_TH: linear(x_TH, projection),
        "router": lambda x_TH: add_norm_linear(x_TH, x_TH[:, None], ones_H, 1e-5, projection)[2],
        "vocabulary": lambda x_TH: part_logits(x_TH, projection.weight, (0, outputs), 64),
    }


def other_rows(product: Product, x_TH: torch.Tensor, sizes: range) -> list[int]:
    """Numbers of rows at which some row has other bits than among all of them; the first ones, and the last ones."""
    wanted_TN = product(x_TH)
    return [
        rows
        for rows in sizes
        if not torch.equal(product(x_TH[:rows]), wanted_TN[:rows])
        or not torch.equal(product(x_TH[-rows:]), wanted_TN[-rows:])
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(96, 200), (33, 101), (256, 32)], ids=str)
@pytest.mark.parametrize("name", ["linear", "router", "vocabulary"])
def test_a_row_has_the_same_bits_at_every_number_of_rows(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    x_TH = torch.randn(MOST, size[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    assert other_rows(products(*size, dtype)[name], x_TH, range(1, MOST + 1)) == []


def test_the_library_by_itself_does_not() -> None:
    """So these tests can fail."""
    x_TH = torch.randn(MOST, 256, generator=torch.Generator().manual_seed(0))
    assert other_rows(layer(256, 32, torch.float32), x_TH, range(1, MOST + 1))
