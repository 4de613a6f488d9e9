"""Devices that our kernels are not made for: what is tried, what is refused; a device that stands in for one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from absent_gpu import absent_gpu
from triton.backends.compiler import GPUTarget

from epmoe.errors import UserError
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.experts.trial import tried
from epmoe.moe.experts.triton import TritonExperts, products
from epmoe.moe.experts.triton.words import WordMatrix
from scripts.bench.expert_cases import CASES, Case, dispatched, random_input, random_weights

CASE = CASES[1]


def stand_in(patch: pytest.MonkeyPatch, device: str, generation: int = 0) -> None:
    """Weights say that they are on another device, of that generation."""
    patch.setattr(Mxfp4Matrix, "device", property(lambda self: torch.device(device)))
    patch.setattr("epmoe.kernels.gpu.generation", lambda device: generation)


def test_neither_nvidia_nor_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "xpu:0")
    weights = random_weights(CASE, "mxfp4", torch.bfloat16, "cpu")
    with pytest.raises(UserError, match=r"experts=triton has no kernels for xpu:0, .*: choose experts=hub or"):
        TritonExperts.pack(weights, CASE.activation)


@pytest.mark.parametrize(("generation", "tries"), [(0, 1), (7, 1), (8, 0), (9, 0), (10, 0), (12, 0)])
def test_what_is_not_known_to_run_is_tried(generation: int, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0: AMD's."""
    stand_in(monkeypatch, "cuda:0", generation)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("epmoe.moe.experts.triton.tried", lambda *what: calls.append(what))
    made = TritonExperts.pack(random_weights(CASE, "mxfp4", torch.bfloat16, "cpu"), CASE.activation)
    assert [(call[0], call[2:]) for call in calls] == [(made, (torch.bfloat16, "experts=triton"))] * tries


def test_a_token_goes_through() -> None:
    """To an expert that is here, as a rank's own dispatch would send it."""
    weights = random_weights(CASE, "mxfp4", torch.float32, "cpu")
    experts = ReferenceExperts.pack(weights, CASE.activation)
    seen: list[torch.Tensor] = []

    class Noted:
        def forward(self, x_TH: torch.Tensor, dispatch: Any, y_TKH: torch.Tensor | None = None) -> torch.Tensor:
            seen.append(experts.forward(x_TH, dispatch, y_TKH))
            return seen[-1]

    tried(Noted(), weights.gate_up, torch.float32, "it")  # type: ignore[arg-type]
    assert seen[0].shape == (1, 1, CASE.hidden) and seen[0].any(), "the biases' row"


def test_what_fails_is_one_line() -> None:
    weights = random_weights(CASE, "mxfp4", torch.float32, "cpu")

    class Fails:
        def forward(self, *_: Any) -> torch.Tensor:
            raise RuntimeError("PassManager::run failed\nand much more")

    with pytest.raises(UserError) as caught:
        tried(Fails(), weights.gate_up, torch.float32, "experts=triton")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "experts=triton does not run on cpu (RuntimeError: PassManager::run failed): choose other experts=, reference "
        "runs everywhere"
    )


TARGETS = {
    "Ampere": GPUTarget("cuda", 80, 32),
    "Blackwell": GPUTarget("cuda", 100, 32),
    "MI300": GPUTarget("hip", "gfx942", 64),
}


@pytest.mark.parametrize(
    "name", [each if each == "Blackwell" else pytest.param(each, marks=pytest.mark.slow) for each in TARGETS]
)
def test_products_compile_for_other_devices(name: str, tmp_path: Path) -> None:
    """The kernels of few rows, which every GPU has; compiled, not run: what they compute there nobody has seen."""
    case = Case("few", tokens=2, hidden=128, intermediate=64)
    weights = random_weights(case, "mxfp4", torch.bfloat16, "cpu")
    x_TH, logits_TE = random_input(case, torch.bfloat16, "cpu")
    dispatch = dispatched(case, logits_TE)
    assert isinstance(weights.gate_up, Mxfp4Matrix) and isinstance(weights.down, Mxfp4Matrix)
    gate_up, down = WordMatrix.pack(weights.gate_up), WordMatrix.pack(weights.down)
    with absent_gpu(tmp_path, TARGETS[name]) as gpu:
        h_RI = products.gate_up(x_TH, gate_up, weights.gate_up_bias_LN, dispatch, case.activation)
        products.down(h_RI, down, weights.down_bias_LH, dispatch, None)
    assert gpu.launched == ["gate_up_kernel", "down_kernel"]
