"""Count what a GPU would launch: torch's operations that compute or copy, and Triton's kernels, in the interpreter.

A library's product counts as one, although it may take a second kernel that adds up its parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """`names` of the launches within `with launches():`, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False  # a Triton kernel, which the interpreter runs by torch's operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        view = alias is not None and not alias.is_write
        name = func._schema.name.removeprefix("aten::")
        if not (self.inside or view or name in ALLOCATIONS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[list[str]]:
    """The list of names, filled while the block runs; in the interpreting worker."""
    counter, real = Launches(), GridExecutor.__call__

    def counted(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        counter.names.append(self.fn.__name__)
        counter.inside = True
        try:
            real(self, *args, **kwargs)
        finally:
            counter.inside = False

    GridExecutor.__call__ = counted
    try:
        with counter:
            yield counter.names
    finally:
        GridExecutor.__call__ = real
