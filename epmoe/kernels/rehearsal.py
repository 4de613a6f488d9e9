"""Passes whose results mean nothing: they are run so that the passes after them find everything made.

    with brief():           one layer of each kind stands for all, since the others launch the same kernels:
        warm-up             what is compiled on the way, allocated, or loaded to the device is so for all of them

    with rehearsal():       brief, and without the kernels of Triton, so that these are known before any runs: a launch
        warm-up             only says which kernel it is (compile_ahead.py)

In a rehearsal torch's operations and the collectives run, and memory that a kernel would fill holds zeros. Zeros are
ids, positions and rows that exist, so whatever torch does with them is in bounds. All ranks rehearse the same passes,
so no collective waits for a rank that does not come.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}

_brief = _rehearsing = False


def is_brief() -> bool:
    """Whether one layer of each kind stands for all."""
    return _brief


def rehearsing() -> bool:
    """Whether nothing is launched."""
    return _rehearsing


@contextmanager
def brief() -> Iterator[None]:
    """Passes within the block are brief."""
    global _brief
    before, _brief = _brief, True
    try:
        yield
    finally:
        _brief = before


@contextmanager
def rehearsal() -> Iterator[None]:
    """The block is one. What it runs reads no result of a kernel on the host, as what a CUDA graph captures."""
    global _rehearsing
    _rehearsing = True
    try:
        with brief(), Zeroed():
            yield
    finally:
        _rehearsing = False


class Zeroed(TorchDispatchMode):
    """New memory holds zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.zero_() if isinstance(out, torch.Tensor) and func._schema.name in ALLOCATIONS else out
