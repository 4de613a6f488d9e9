"""The one rule that picks torch's version or Triton's, and that the two have the same functions."""

import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from epmoe import kernels, layers
from epmoe.layers.twin import switched, torch_only, twin

FUNCTIONS = {
    "norm": {"add_norm", "add_norm_linear"},
    "linear": {"linear"},
    "rotary": {"cos_sin"},
    "vocabulary": {"part_logits"},
    "greedy": {"largest", "join_largest"},
    "sampling": {"choose", "top_logprobs"},
    "attention": {"cached_attention"},
    "sequence_state": {"take", "look_up", "advance"},
}
TWINS = list(FUNCTIONS)
ANY_ROWS = [name for name in TWINS if name not in ("linear", "vocabulary")]  # the others are for one dtype


class Rows(SimpleNamespace):
    """Rows of some dtype on some device, without their values."""

    count: int

    def __len__(self) -> int:
        return self.count


def on_gpu(rows: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What `twin` sees of a tensor of so many rows on a GPU; there need not be one."""
    return Rows(count=rows, dtype=dtype, device=torch.device("cuda", 0))


def modules(name: str) -> tuple[ModuleType, ModuleType]:
    return import_module(f"epmoe.layers.{name}"), import_module(f"epmoe.kernels.{name}")


@pytest.mark.parametrize("name", TWINS)
def test_torch_on_a_cpu(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert twin(name, torch.empty(1, 8, dtype=dtype)) is modules(name)[0]


@pytest.mark.parametrize("name", TWINS)
def test_triton_on_a_gpu_where_it_serves(name: str) -> None:
    """What it does not serve is in each one's own test file."""
    assert twin(name, on_gpu(1)) is modules(name)[1]
    assert twin(name, on_gpu(100_000)) is modules(name)[1]
    assert twin(name, on_gpu(1, torch.float32)) is modules(name)[name in ANY_ROWS]


@pytest.mark.parametrize("name", TWINS)
def test_interpreted(name: str) -> None:
    """Kernels on a CPU too, where they serve its float32 rows; torch again after the block, and after an error."""
    small, narrow = torch.empty(1, 8), torch.empty(1, 8, dtype=torch.bfloat16)
    with switched(interpreted=True):
        assert twin(name, small) is modules(name)[1]
        assert twin(name, narrow) is modules(name)[name in ANY_ROWS]
    with pytest.raises(ZeroDivisionError), switched(interpreted=True):
        raise ZeroDivisionError
    assert twin(name, small) is modules(name)[0]


@pytest.mark.parametrize("name", TWINS)
def test_torch_only_wins(name: str) -> None:
    """On every device, over everything else, for that name alone."""
    other = TWINS[TWINS.index(name) - 1]
    with switched(torch_only={name}):
        assert torch_only() == {name}
        assert twin(name, on_gpu(1)) is modules(name)[0] and twin(other, on_gpu(1)) is modules(other)[1]
    with switched(interpreted=True):
        with switched(torch_only={name}, interpreted=True):
            assert twin(name, torch.empty(1, 8)) is modules(name)[0]
        assert twin(name, torch.empty(1, 8)) is modules(name)[1]  # as the outer block says
    with switched(torch_only={name}, interpreted=True):
        assert twin(name, torch.empty(1, 8)) is modules(name)[0]
        assert twin(other, torch.empty(1, 8)) is modules(other)[1]
    assert not torch_only() and twin(name, on_gpu(1)) is modules(name)[1]


def signatures(module: ModuleType) -> dict[str, inspect.Signature]:
    """Public functions that are defined in a module, or in the package that it is."""
    found = {name: each for name, each in vars(module).items() if isinstance(each, FunctionType)}
    return {
        name: inspect.signature(each)
        for name, each in found.items()
        if not name.startswith("_") and each.__module__.startswith(module.__name__)
    }


@pytest.mark.parametrize("name", TWINS)
def test_the_same_functions(name: str) -> None:
    """Names and signatures, annotations and defaults included: either module may be what `twin` gives."""
    ours, theirs = map(signatures, modules(name))
    assert set(ours) & set(theirs) == FUNCTIONS[name]
    assert {function: theirs[function] for function in FUNCTIONS[name]} == {
        function: ours[function] for function in FUNCTIONS[name]
    }
    assert len(theirs["serves"].parameters) == 1 and theirs["serves"].return_annotation is bool
    helpers = {"tile_options"} if name == "norm" else set()  # of the kernels' tests
    assert set(theirs) == FUNCTIONS[name] | {"serves"} | helpers


def test_every_kernel_file_is_a_twin() -> None:
    """A new file in kernels/ has its torch version in layers/, or is one of the few that all share."""
    names = {each.name for each in pkgutil.iter_modules(kernels.__path__)}
    assert names == {*TWINS, "capture", "compile_ahead", "gpu", "symmetric", "product", "few", "runs", "vendor", "ways"}
    assert set(TWINS) <= {each.name for each in pkgutil.iter_modules(layers.__path__)}


def test_a_cpu_machine_needs_no_triton() -> None:
    """In a fresh interpreter: a model and every layer are imported and asked for versions; no triton comes in."""
    code = f"""
import importlib, pkgutil, sys, torch, epmoe.models.gpt_oss
from epmoe import layers
from epmoe.layers.twin import twin
for each in pkgutil.iter_modules(layers.__path__):
    importlib.import_module(f"epmoe.layers.{{each.name}}")
for name in {TWINS!r}:
    assert twin(name, torch.empty(1, 8)).__name__ == f"epmoe.layers.{{name}}"
print(sorted(each for each in sys.modules if each.split(".")[0] == "triton" or each.startswith("epmoe.kernels.")))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
