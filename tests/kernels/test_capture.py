"""Branches of a graph, and what comes behind them."""

import pytest
import torch

from epmoe.kernels.capture import Capture, beside


def test_elsewhere_one_follows_the_other() -> None:
    called: list[str] = []
    beside(torch.device("cpu"), lambda: called.append("first"), lambda: called.append("second"))
    assert called == ["first", "second"]


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["first", "second"])
@pytest.mark.parametrize("behind", ["few", "tiled", "sum"])
def test_what_comes_behind_waits_for_both(behind: str, slow: str) -> None:
    """Also a kernel that is launched early, as the products are that read what attention gives."""
    from epmoe.kernels.few import few
    from epmoe.kernels.product import Tile, tiled

    device = torch.device("cuda", 0)
    source_TH = torch.randn(8, 512, device=device).bfloat16()
    weight_NH = torch.randn(64, 512, device=device).bfloat16()
    x_TH = torch.zeros_like(source_TH)

    def fill(half: slice, *, late: bool) -> None:
        if late:
            torch.cuda._sleep(20_000_000)  # ten milliseconds
        torch.add(source_TH[:, half], 0, out=x_TH[:, half])

    def step() -> torch.Tensor:
        beside(
            device,
            lambda: fill(slice(0, 256), late=slow == "first"),
            lambda: fill(slice(256, 512), late=slow == "second"),
        )
        if behind == "sum":
            return x_TH.float().sum(1)
        if behind == "few":
            return few(x_TH, weight_NH, None, Tile.parse("16x8x256x1x4"))
        return tiled(x_TH, weight_NH, None, Tile(64, 16, 128, 4, 4))

    wanted = step().clone()
    found: list[torch.Tensor] = []
    graph = Capture(device)(lambda: found.append(step()))
    for _ in range(5):
        x_TH.zero_()
        graph.replay()
        assert torch.equal(found[-1], wanted)
