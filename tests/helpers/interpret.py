"""Run a test's body in Triton's interpreter: kernels on the CPU, without a GPU.

Triton decides when a kernel is *decorated* whether it is interpreted, so `TRITON_INTERPRET=1` must be set before the
kernel's module is imported. Setting it here, in pytest's own process, would turn every kernel that another test imports
into an interpreted one. So the body runs in a worker process that is told first; one worker serves all tests of a
session.

    from interpret import interpreted

    def body(case): ...          # at module level; imports kernels inside, compares inside, raises on failure
    interpreted(body, case)

What the interpreter cannot do: bf16 arithmetic (`tl.dot` on bf16 is silently wrong there), so pass float32 tensors.
"""

import os
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from multiprocessing.pool import Pool
from typing import Any, TypeVar

T = TypeVar("T")


def _start() -> None:
    """First thing in the worker, before it unpickles (and so imports) anything of a test."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the interpreter copies CUDA tensors to the host; keep to CPU tensors
    import torch

    torch.set_num_threads(1)
    _patch_once()
    _know_types()
    _know_operands()


def _patch_once() -> None:
    """Let the interpreter's changes of `triton.language` stay: it makes them anew for each call of each function, which
    takes as long as all that the functions do, and this process does nothing else with the language.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    known: set[int] = set()  # modules of kernels, which live as long as the process

    def once(function: Callable[..., Any]) -> Any:
        if (module := id(function.__globals__)) not in known:
            patch(function)
            known.add(module)
        return interpreter._LangPatchScope()  # restores nothing

    interpreter._patch_lang = once


def _know_types() -> None:
    """Have each type of numpy, each type of a block and each tensor's shape once: the interpreter makes all of them
    anew for every operation, which takes as long as the rest.
    """
    from triton.language import core
    from triton.runtime import interpreter

    found = interpreter._get_np_dtype
    of_numpy: dict[str, Any] = {}
    blocks: dict[tuple[str, tuple[int, ...]], Any] = {}

    def np_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in of_numpy:
            of_numpy[name] = found(kind)
        return of_numpy[name]

    def block(element: Any, shape: Any) -> Any:
        key = element.name, tuple(map(int, shape))
        if key not in blocks:
            blocks[key] = core.block_type(element, list(key[1]))
        return blocks[key]

    make = core.tensor.__init__

    def init(self: Any, handle: Any, kind: Any) -> None:
        if known := getattr(kind, "known", None):
            self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, kind, kind.scalar, known
        else:
            make(self, handle, kind)
            kind.known = self.shape, self.numel
            if kind.is_block():
                self.type = block(kind.element_ty, kind.shape)

    core.tensor.__init__ = init
    interpreter._get_np_dtype = np_dtype
    interpreter.InterpreterBuilder.get_block_ty = lambda self, element, shape: block(element, shape)
    core.block_type.with_element_ty = lambda self, element: block(element, self.shape)


def _know_operands() -> None:
    """Have operands of one type go through as they are, and what a number becomes beside a block once: the interpreter
    looks for the type of both and converts, spreads and compares them for every operation, at twenty times its cost.
    """
    from triton.language.core import tensor
    from triton.language.semantic import TritonSemantic

    check, broadcast, cast = (
        TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value, TritonSemantic.cast
    )  # fmt: skip
    plain = {"fp32", "fp64", "int1", "int32", "int64"}  # two of a kind are one more, whatever is done with them
    numbers: dict[Any, Any] = {}

    def checked(
        self: Any, one: Any, other: Any, one_ptr: bool = False, other_ptr: bool = False, arithmetic: bool = True,
        division: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        left = one.__class__ is tensor
        block, number = (one, other) if left else (other, one)
        if block.__class__ is not tensor or block.dtype.name not in plain:
            return check(self, one, other, one_ptr, other_ptr, arithmetic, division)
        if number.__class__ is tensor and number.dtype.name == block.dtype.name:
            return self.broadcast_impl_value(one, other)
        if number.__class__ is not int and not (number.__class__ is float and number):  # zeros of both signs are equal
            return check(self, one, other, one_ptr, other_ptr, arithmetic, division)
        key = number.__class__, number, id(block.type), arithmetic
        if (known := numbers.get(key)) is None:
            found = check(self, one, other, one_ptr, other_ptr, arithmetic, division)
            known = found[left]
            if found[not left] is not block or known.type is not block.type:
                return found
            numbers[key] = known  # and its type, so that no other one has its id
        return (one, known) if left else (known, other)

    TritonSemantic.binary_op_type_checking_impl = checked
    TritonSemantic.broadcast_impl_value = lambda self, one, other: (
        (one, other) if one.type is other.type else broadcast(self, one, other)
    )
    TritonSemantic.cast = lambda self, one, kind, rounding=None: (
        one if one.dtype is kind or one.type is kind else cast(self, one, kind, rounding)
    )


def _call(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    try:
        return function(*args)
    except Exception:
        # As text: the pool waits for ever for an exception that cannot be unpickled.
        raise RuntimeError(f"in the interpreting worker:\n{traceback.format_exc()}") from None


@cache
def _worker() -> Pool:
    return get_context("spawn").Pool(1, initializer=_start)


def interpreted(function: Callable[..., T], *args: Any, timeout: float = 240) -> T:
    """`function(*args)` in the interpreting worker; arguments and result are plain Python or small CPU tensors.

    Raises:
        RuntimeError with the worker's traceback when `function` raised; TimeoutError after `timeout` seconds, also if
            the worker died.
    """
    return _worker().apply_async(_call, (function, args)).get(timeout)
