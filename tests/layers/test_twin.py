"""The one rule for twins, and that they are twins: the same names and signatures in layers/ and kernels/."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from epmoe.layers.twin import switched, torch_only, twin

FUNCTIONS = {
    "norm": ["add_norm", "add_norm_linear"],
    "linear": ["linear"],
    "rotary": ["cos_sin"],
    "vocabulary": ["part_logits"],
    "greedy": ["largest", "join_largest"],
    "attention": ["cached_attention"],
    "sequence_state": ["take", "advance"],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_twins_have_the_same_names_and_signatures(name: str) -> None:
    layers, kernels = import_module(f"epmoe.layers.{name}"), import_module(f"epmoe.kernels.{name}")
    for function in FUNCTIONS[name]:
        ours, theirs = (inspect.signature(getattr(module, function)) for module in (layers, kernels))
        assert list(ours.parameters) == list(theirs.parameters), function
        assert ours.return_annotation == theirs.return_annotation
    assert list(inspect.signature(kernels.serves).parameters)


def test_torch_on_a_cpu_kernels_where_they_are_switched_on() -> None:
    few_TH, many_TH = torch.zeros(1, 8), torch.zeros(9, 8)
    for x_TH in (few_TH, many_TH):
        assert twin("linear", x_TH).__name__ == twin("linear", x_TH.bfloat16()).__name__ == "epmoe.layers.linear"
    with switched(interpreted=True):
        assert twin("linear", few_TH).__name__ == "epmoe.kernels.linear"
        assert twin("linear", many_TH).__name__ == "epmoe.layers.linear"  # not served
        assert twin("norm", many_TH).__name__ == "epmoe.kernels.norm"
        with switched(interpreted=True, torch_only={"norm"}):
            assert twin("norm", many_TH).__name__ == "epmoe.layers.norm" and torch_only() == {"norm"}
            assert twin("linear", few_TH).__name__ == "epmoe.kernels.linear"
        assert not torch_only()
    assert twin("norm", few_TH).__name__ == "epmoe.layers.norm"


def test_a_gpu_has_the_kernels() -> None:
    """Asked of something that stands on a GPU; there need not be one."""

    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

        def __len__(self) -> int:
            return 1

    x: torch.Tensor = OnGpu()  # type: ignore[assignment]
    assert all(twin(name, x).__name__ == f"epmoe.kernels.{name}" for name in FUNCTIONS)
    with switched(torch_only={"attention"}):
        assert twin("attention", x).__name__ == "epmoe.layers.attention"


def test_a_cpu_never_imports_triton() -> None:
    code = "import sys, torch, epmoe.models.gpt_oss; from epmoe.layers.twin import twin\n"
    code += "twin('norm', torch.zeros(1)); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
