"""bfloat16: the plain format, two bytes a value.

Letters: L experts on this rank · E experts · N output rows of a matrix · C its contraction columns.

Checkpoints hold gpt-oss's unquantised experts transposed, as their models multiply from the right: `gate_up_proj`
[E, H, 2I] and `down_proj` [E, I, H], so [E, C, N]. In memory every format is [L, N, C], contraction last.

Values that come from MXFP4 are kept exactly (see epmoe/formats/mxfp4.py), in a float32 run too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from epmoe.formats import ReadExperts


@dataclass(frozen=True)
class Bf16Matrix:
    """One projection of L experts in bfloat16."""

    format: ClassVar[str] = "bf16"

    value_LNC: torch.Tensor  # bfloat16

    def __post_init__(self) -> None:
        assert self.value_LNC.dtype == torch.bfloat16 and self.value_LNC.dim() == 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, N, C)."""
        experts, rows, columns = self.value_LNC.shape
        return experts, rows, columns

    @property
    def nbytes(self) -> int:
        return self.value_LNC.nbytes

    @property
    def device(self) -> torch.device:
        return self.value_LNC.device

    def to(self, device: torch.device) -> Self:
        return type(self)(self.value_LNC.to(device))

    def select(self, experts: slice) -> Self:
        """Some of the L experts, as a view."""
        return type(self)(self.value_LNC[experts])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values [L, N, C]; this matrix's own memory where `dtype` is bfloat16."""
        return self.value_LNC.to(dtype)

    def finite_L(self) -> torch.Tensor:
        """Of each expert whether all its values are numbers: bool [L]. One by one: a mask is half an expert's bytes."""
        return torch.stack([value_NC.isfinite().all() for value_NC in self.value_LNC])

    @classmethod
    def quantize(cls, value_LNC: torch.Tensor, scale: str = "ocp") -> Self:
        """Round to the nearest bfloat16, ties to even; shares memory with a bfloat16 argument."""
        return cls(value_LNC.to(torch.bfloat16))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join along L."""
        return cls(torch.cat([part.value_LNC for part in parts]))

    @classmethod
    def stored(cls, name: str, shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`<name>` [E, C, N]: the checkpoint's orientation."""
        experts, rows, columns = shape
        return {name: ((experts, columns, rows), torch.bfloat16)}

    @classmethod
    def read(cls, name: str, experts: Sequence[int], read: ReadExperts) -> Self:
        """Matrix `name` of the given experts, transposed one by one: one expert more than the result in memory.

        Values of another floating-point dtype are rounded.
        """
        first_CN = read(name, experts[:1])[0]
        columns, rows = first_CN.shape
        value_LNC = torch.empty((len(experts), rows, columns), dtype=torch.bfloat16, device=first_CN.device)
        value_LNC[0] = first_CN.T
        del first_CN
        for i in range(1, len(experts)):
            value_LNC[i] = read(name, experts[i : i + 1])[0].T
        return cls(value_LNC)
