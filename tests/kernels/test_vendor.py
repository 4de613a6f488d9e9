"""The library's products, called only where they were seen to have the kernels' bits."""

from itertools import pairwise

import pytest
import torch

from epmoe.kernels import vendor
from epmoe.kernels.vendor import Product, candidates, filled_up, rows

QKV = Product(torch.device("cuda", 0), 5120, 2880, True, torch.bfloat16, 5120)


def test_candidates_waste_an_eighth_and_meet_every_bucket_of_a_batch() -> None:
    from epmoe.engine.graphs import buckets

    sizes = candidates(4096)
    assert sizes[-1] == 4096 and all(below < above <= 1.5 * below for below, above in pairwise(sizes))
    assert all(above <= 1.13 * below for below, above in pairwise(size for size in sizes if size >= 256))
    assert {size for size in buckets(512) if size >= 16} <= set(sizes)


def test_rows_are_filled_up_to_the_next_size_that_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to one far above: then a kernel is faster."""
    monkeypatch.setattr(vendor, "compared", lambda kind: (48, 64, 256))
    expected = {17: 48, 48: 48, 49: 64, 64: 64, 65: None, 102: None, 103: 256, 256: 256, 257: None}
    assert {tokens: rows(QKV, tokens) for tokens in expected} == expected


def test_filling_up() -> None:
    x_TH = torch.randn(3, 5)
    assert filled_up(x_TH, 3) is x_TH
    assert filled_up(x_TH, 8).shape == (8, 5) and torch.equal(filled_up(x_TH, 8)[:3], x_TH)


@pytest.mark.gpu
def test_a_library_that_splits_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that adds two halves of the columns: no size agrees, and the kernels serve all."""
    from torch import nn

    from epmoe.kernels.linear import linear

    def split(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        sum_SN = x[:, :half].float() @ weight[:, :half].float().T + x[:, half:].float() @ weight[:, half:].float().T
        return out.copy_(sum_SN if bias is None else sum_SN + bias.float())

    layer = nn.Linear(2880, 640).requires_grad_(False).to("cuda", torch.bfloat16)
    x_TH = torch.randn(512, 2880, device="cuda").bfloat16()
    wanted_TN = linear(x_TH, layer)
    vendor.compared.cache_clear()
    monkeypatch.setattr(vendor, "multiply", split)
    kind = Product(x_TH.device, 640, 2880, True, torch.bfloat16, 640)
    assert vendor.compared(kind) == ()
    assert torch.equal(linear(x_TH, layer), wanted_TN)
    vendor.compared.cache_clear()


@pytest.mark.gpu
def test_sizes_that_agree_on_a_gpu() -> None:
    """q/k/v at all of them; the output projection at most, or the library would not be worth its name."""
    import time

    device, bf16 = torch.device("cuda", 0), torch.bfloat16
    torch.zeros(1, device=device)
    begin = time.perf_counter()
    assert vendor.compared(QKV._replace(device=device)) == tuple(candidates(4096))
    output = vendor.compared(Product(device, 2880, 4096, True, bf16, 2880))
    vocabulary = vendor.compared(Product(device, 16384, 2880, False, torch.float32, 201_088, 256))
    print(f"compared three products in {time.perf_counter() - begin:.2f} s; output projection: {output}")
    assert len(output) > 30 and vocabulary == tuple(candidates(256))
