"""Source: where the loader takes a model's tensors from; a checkpoint's files, or a stand-in that makes them up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` counts from the beginning of `file`."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Source(Protocol):
    """What the loader needs of a checkpoint."""

    @property
    def path(self) -> Path:
        """For messages."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json's object."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def bytes_read(self) -> int:
        """Bytes of the tensors' files read so far."""
        ...

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor `name`, cast to `dtype`; None: as stored."""
        ...

    def read_rows(self, name: str, ids: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """The rows `ids` of tensor `name` along its first dimension: [len(ids), ...], dtype as stored."""
        ...

    def close(self) -> None:
        """Free what reading has taken; the next read takes it again."""
        ...
