"""Which of a function's two versions runs: torch's (epmoe/layers) or Triton's (epmoe/kernels), under the same names.

    twin("norm", x_TH).add_norm(x_TH, rows_TKH, weight_H, eps)

One rule for all: Triton's on a GPU where its file says that it serves x, torch's everywhere else. torch's is the
definition; tests compare Triton's with it, and switch the rule here and nowhere else:

    with switched(interpreted=True): ...            kernels on the CPU too, by Triton's interpreter
    with switched(torch_only={"attention"}): ...    that file's torch version on every device
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from epmoe import kernels

# Names whose torch version waits for values on the host, so that no graph can capture a step with it.
WAITING = frozenset({"attention", "sampling"})


@dataclass(frozen=True)
class Rule:
    """What tests may change of the rule."""

    torch_only: frozenset[str] = frozenset()  # names whose torch version runs on every device
    interpreted: bool = False  # a CPU has the kernels, too


_rule = Rule()


def twin(name: str, x: torch.Tensor) -> ModuleType:
    """epmoe.kernels.`name` where it serves `x`, else epmoe.layers.`name`."""
    if (kernels.run_on(x.device) or _rule.interpreted) and name not in _rule.torch_only:
        fast = _module("kernels", name)  # imported only here: a CPU machine need not have triton
        if fast.serves(x):
            return fast
    return _module("layers", name)


def torch_only() -> frozenset[str]:
    """Names whose torch version runs on every device; none but in tests."""
    return _rule.torch_only


@contextmanager
def switched(*, torch_only: Set[str] = frozenset(), interpreted: bool = False) -> Iterator[None]:
    """Another rule within the block, in this process."""
    global _rule
    before = _rule
    _rule = replace(before, torch_only=frozenset(torch_only), interpreted=interpreted)
    try:
        yield
    finally:
        _rule = before


@cache
def _module(package: str, name: str) -> ModuleType:
    return import_module(f"epmoe.{package}.{name}")
