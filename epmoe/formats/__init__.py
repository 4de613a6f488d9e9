"""Weight formats: how the experts' matrices are stored in a checkpoint and in memory.

Letters: E experts · L experts on this rank · N output rows of a matrix · C its contraction columns (H or I).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch

FORMATS = {
    "mxfp4": "epmoe.formats.mxfp4:Mxfp4Matrix",
    "bf16": "epmoe.formats.bf16:Bf16Matrix",
}

# How a format whose values share scales picks one: `quant.scale`; epmoe/formats/mxfp4.py says what each is.
SCALES = ("ocp", "up", "best")

# (tensor name, expert ids) → the slice [len(ids), ...] of that tensor on the rank's device
ReadExperts = Callable[[str, Sequence[int]], torch.Tensor]


class ExpertMatrix(Protocol):
    """One projection of L experts, `[L, N, C]`, in one format. Immutable; holds tensors of one device."""

    format: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Logical (L, N, C)."""
        ...

    @property
    def nbytes(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device) -> Self: ...

    def select(self, experts: slice) -> Self:
        """Some of the L experts, as a view."""
        ...

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values `[L, N, C]`."""
        ...

    def finite_L(self) -> torch.Tensor:
        """Of each expert whether all its values are numbers: bool [L]."""
        ...

    @classmethod
    def quantize(cls, value_LNC: torch.Tensor, scale: str = "ocp") -> Self:
        """Encode values; for `bf16` a cast. `scale` is of SCALES, for formats that have any."""
        ...

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join along L; used by chunked conversion."""
        ...

    @classmethod
    def stored(cls, name: str, shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Tensors that hold matrix `name` of logical shape (E, N, C) in a checkpoint: {tensor name: (shape, dtype)}."""
        ...

    @classmethod
    def read(cls, name: str, experts: Sequence[int], read: ReadExperts) -> Self:
        """This format's matrix `name` for the given expert ids, through `read`."""
        ...


@dataclass(frozen=True)
class ExpertWeights:
    """All weights of one layer's experts on one rank, in expert-id order.

    `gate_up` is [L, 2I, H] with rows interleaved (even gate, odd up), `down` is [L, H, I]; biases are in the model's
    dtype.
    """

    gate_up: ExpertMatrix
    gate_up_bias_LN: torch.Tensor
    down: ExpertMatrix
    down_bias_LH: torch.Tensor
