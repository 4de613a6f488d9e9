"""Passes that only warm up: which layers they run, and what a rehearsal does not keep."""

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load_rank
from steps import make_step

import epmoe
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.kernels import vendor
from epmoe.rehearsal import brief, is_brief, rehearsal, rehearsing
from epmoe.weights.synthetic import make_checkpoint

REAL = torch.empty, torch.empty_like, torch.Tensor.new_empty


def layers_run(path: Path, *, briefly: bool) -> list[int]:
    model, _ = load_rank(path, progress=False)
    config = model.config
    cache = Cache(
        CacheConfig(config.windows, config.kv_heads, config.head_dim, tokens=64, sequences=1, dtype=torch.float32),
        "cpu",
    )
    ran: list[int] = []
    for index, layer in enumerate(model.layers):
        layer.moe.register_forward_hook(lambda *_, index=index: ran.append(index))
    with brief() if briefly else nullcontext(), torch.inference_mode():
        logits_OV = model(make_step([(cache.admit(5), [1, 2, 3], 0)]), cache)
    assert logits_OV.shape == (3, config.vocab) and not is_brief()
    return ran


def test_a_brief_pass_runs_a_layer_of_each_kind(tmp_path: Path) -> None:
    """The first one, to which nothing is owed; those between, with and without a window; the last one."""
    path = make_checkpoint(tmp_path, layers=8)
    assert layers_run(path, briefly=False) == list(range(8))
    assert layers_run(path, briefly=True) == [0, 5, 6, 7]


def test_new_memory_holds_zeros() -> None:
    x = torch.full((3,), 7)
    with rehearsal():
        new = torch.empty(1000), torch.empty_like(x), x.new_empty(4), torch.empty(2, 3, dtype=torch.int32), x + 1
    assert [each.count_nonzero().item() for each in new] == [0, 0, 0, 0, 3]
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == REAL


def test_it_imports_no_compiler_of_torchs() -> None:
    """Which would take seconds of every start."""
    code = """
import sys, torch
from epmoe.rehearsal import rehearsal
with rehearsal():
    torch.empty(3) + torch.empty_like(torch.ones(3)) @ torch.ones(3)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_all_allocations_of_kernels_are_known() -> None:
    """What is not filled with zeros in a rehearsal is not used beside a kernel."""
    root = Path(epmoe.__file__).parent
    files = [
        *root.glob("kernels/**/*.py"),
        *root.glob("moe/**/*.py"),
        *root.glob("layers/*.py"),
        *root.glob("engine/*.py"),
    ]
    calls = re.compile(r"\.((?:new_)?empty(?:_like|_strided)?)\(")
    names = {name for file in files for name in calls.findall(file.read_text())}
    assert names == {"empty", "empty_like", "new_empty"}


def test_it_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), rehearsal():
        assert rehearsing() and is_brief()
        raise ZeroDivisionError
    assert not rehearsing() and not is_brief()


def test_a_rehearsal_compares_nothing() -> None:
    kind = vendor.Product(torch.device("cpu"), 24, 32, False, torch.bfloat16, 24, 64)
    calls: list[Any] = []

    def tiled(*args: Any) -> Any:
        calls.append(args)
        return args[-1]

    vendor.compared.cache_clear()
    with pytest.MonkeyPatch.context() as patch, rehearsal():
        patch.setattr(vendor, "tiled", tiled)
        assert vendor.agreeing(kind) == vendor.agreeing(kind) == tuple(vendor.candidates(64))
    assert len(calls) == 1 and vendor.compared.cache_info().currsize == 0
