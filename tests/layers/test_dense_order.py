"""Each dense product alone, at every number of rows: a row has the same bits in any company.

Letters: T rows · H inputs · N outputs · V vocabulary.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from epmoe.kernels.vendor import show_order
from epmoe.layers.norm import AddNorm
from epmoe.layers.twin import twin

MOST = 300
Product = Callable[[torch.Tensor], torch.Tensor]  # rows [T, H] → [T, N]


def layer(inputs: int, outputs: int, dtype: torch.dtype, device: str) -> nn.Linear:
    random = torch.Generator(device).manual_seed(outputs)
    made = nn.Linear(inputs, outputs, device=device, dtype=dtype).requires_grad_(False)
    made.weight.normal_(0, 0.05, generator=random)
    made.bias.normal_(generator=random)
    show_order(made.weight[:0], made.weight)
    return made


def some_rows(count: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Whose products with a `layer` tell in which order they were summed."""
    x_TH = torch.randn(count, columns, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    show_order(x_TH, x_TH[:0])
    return x_TH


def linear(inputs: int, outputs: int, dtype: torch.dtype, device: str) -> Product:
    made = layer(inputs, outputs, dtype, device)
    return lambda x_TH: twin("linear", x_TH).linear(x_TH, made)


def router(inputs: int, outputs: int, dtype: torch.dtype, device: str) -> Product:
    """With the norm before it, whose own bits are part of what is compared."""
    made, norm = layer(inputs, outputs, dtype, device), AddNorm(inputs, 1e-5).to(device, dtype)
    torch.nn.init.ones_(norm.weight)

    def product(x_TH: torch.Tensor) -> torch.Tensor:
        return torch.cat(norm.with_linear(x_TH, x_TH[:, None], made), 1).detach()

    return product


def vocabulary(inputs: int, outputs: int, dtype: torch.dtype, device: str) -> Product:
    weight_VH = layer(inputs, outputs, dtype, device).weight
    chunk = 16384 if device == "cuda" else 64
    return lambda x_TH: twin("vocabulary", x_TH).part_logits(x_TH, weight_VH, (0, outputs), chunk)


PRODUCTS = [linear, router, vocabulary]


def other_rows(product: Product, x_TH: torch.Tensor, sizes: Iterable[int]) -> list[int]:
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
@pytest.mark.parametrize("kind", PRODUCTS, ids=lambda kind: kind.__name__)
def test_a_row_has_the_same_bits_at_every_number_of_rows(
    kind: Callable[..., Product], size: tuple[int, int], dtype: torch.dtype
) -> None:
    x_TH = some_rows(MOST, size[0], dtype, "cpu")
    assert other_rows(kind(*size, dtype, "cpu"), x_TH, range(1, MOST + 1)) == []


def test_the_library_by_itself_does_not() -> None:
    """So these tests can fail."""
    x_TH = some_rows(MOST, 256, torch.float32, "cpu")
    assert other_rows(layer(256, 32, torch.float32, "cpu"), x_TH, range(1, MOST + 1))


# gpt-oss's q/k/v, whole and as 2, 4 and 8 ranks would share it; its output projection; small and odd ones
LINEAR = [(2880, 5120), (2880, 2560), (2880, 1280), (2880, 640), (4096, 2880), (136, 200), (96, 128), (64, 96)]
ON_GPU = [
    *((linear, size) for size in LINEAR),
    *((router, (2880, experts)) for experts in (32, 128)),
    (router, (200, 5)),
    (vocabulary, (2880, 16384 + 4480)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "size"), ON_GPU, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_row_has_the_same_bits_at_every_number_of_rows_on_a_gpu(
    kind: Callable[..., Product], size: tuple[int, int]
) -> None:
    above = [333, 512, 777, 1000, 1024] + [2048, 3000, 4095, 4096, 4097, 5000, 8192] * (kind is not vocabulary)
    x_TH = some_rows(max(above), size[0], torch.bfloat16, "cuda")
    assert other_rows(kind(*size, torch.bfloat16, "cuda"), x_TH, [*range(1, MOST + 1), *above]) == []


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PRODUCTS, ids=lambda kind: kind.__name__)
def test_a_row_in_float32_has_the_same_bits_at_every_number_of_rows_on_a_gpu(kind: Callable[..., Product]) -> None:
    """By the library, in tiles of one shape."""
    x_TH = some_rows(1000, 2880, torch.float32, "cuda")
    assert other_rows(kind(2880, 640, torch.float32, "cuda"), x_TH, [*range(1, 150), 200, 511, 1000]) == []


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(4096, 2880), (2880, 640)], ids=str)
def test_the_gpus_library_by_itself_does_not(size: tuple[int, int]) -> None:
    """Where it splits the columns."""
    x_TH = some_rows(MOST, size[0], torch.bfloat16, "cuda")
    assert other_rows(layer(*size, torch.bfloat16, "cuda"), x_TH, range(1, MOST + 1))


@pytest.mark.gpu
def test_a_splitting_call_of_the_library_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the comparison, the library is called where it splits the columns, and rows differ."""
    from epmoe.kernels import vendor

    monkeypatch.setattr(vendor, "compared", lambda kind: tuple(vendor.candidates(kind.most)))
    x_TH = some_rows(MOST, 2880, torch.bfloat16, "cuda")
    assert other_rows(linear(2880, 640, torch.bfloat16, "cuda"), x_TH, range(1, MOST + 1))
