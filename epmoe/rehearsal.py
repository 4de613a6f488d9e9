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

# What allocates memory for a kernel to fill, and what takes its place in a rehearsal. (A TorchDispatchMode would see
# every allocation, and imports torch._dynamo: two seconds of a start.)
ALLOCATIONS: tuple[tuple[Any, str, Any], ...] = (
    (torch, "empty", torch.zeros),
    (torch, "empty_like", torch.zeros_like),
    (torch.Tensor, "new_empty", torch.Tensor.new_zeros),
)

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
        with brief(), zeroed():
            yield
    finally:
        _rehearsing = False


@contextmanager
def zeroed() -> Iterator[None]:
    """New memory holds zeros within the block."""
    kept = [getattr(owner, name) for owner, name, _ in ALLOCATIONS]
    for owner, name, zeros in ALLOCATIONS:
        setattr(owner, name, zeros)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(ALLOCATIONS, kept, strict=True):
            setattr(owner, name, function)
