"""A rehearsal: the passes of a start run once without the kernels of Triton, so that these are known before any runs.

    with rehearsal():       torch's operations and the collectives run; a launch in Triton only says which kernel it is
        warm-up             (compile_ahead.py); memory that one of them would fill holds zeros

Zeros are ids, positions and rows that exist, so whatever torch does with them is in bounds; none of it is kept. All
ranks rehearse the same passes, so no collective waits for a rank that does not come.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}

_inside = False


def rehearsing() -> bool:
    """Whether this is a rehearsal: what is computed means nothing, and nothing of it may be kept."""
    return _inside


@contextmanager
def rehearsal() -> Iterator[None]:
    """The block is one. What it runs reads no result of a kernel on the host, as what a CUDA graph captures."""
    global _inside
    _inside = True
    try:
        with Zeroed():
            yield
    finally:
        _inside = False


class Zeroed(TorchDispatchMode):
    """New memory holds zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.zero_() if isinstance(out, torch.Tensor) and func._schema.name in ALLOCATIONS else out
