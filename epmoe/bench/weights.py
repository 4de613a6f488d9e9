"""Random weights of a named size, made on the device in seconds: a checkpoint without files.

The distributions are those of epmoe/weights/synthetic.py (block bytes uniform, scale bytes 119 or 120, embeddings of
deviation 1), drawn by the device's own generator: a stream for each (layer, expert) of an experts' tensor, and one for
each other tensor. So a rank makes just its own experts, and an expert has the same values whatever the number of ranks.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import torch

from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.reader import Reader
from epmoe.weights.source import TensorInfo
from epmoe.weights.synthetic import LEAST_VOCAB, SIZES, Drawn, Synthetic, config_of, tensors_of, write_tokenizer

# Positions cost no weights: every size has as many as gpt-oss, so that any prompt fits.
POSITIONS = 131072


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """What the loader reads of a checkpoint, with tensors that are drawn when they are read."""

    seed: int
    drawn: Mapping[str, Drawn] = field(repr=False)

    @classmethod
    def of(cls, size: str, seed: int = 0) -> Self:
        """`size` is a name of SIZES."""
        spec = replace(SIZES[size], max_position=max(POSITIONS, SIZES[size].max_position))
        drawn = {tensor.name: tensor for tensor in tensors_of(spec)}
        nowhere = Path(f"random-{size}")
        return cls(
            path=nowhere,
            config=config_of(spec),
            generation_config={},
            tensors={name: TensorInfo(nowhere, tensor.shape, tensor.dtype, 0) for name, tensor in drawn.items()},
            files=(),
            tokenizer_file=None,
            tokenizer_config={},
            reader=Reader(),
            seed=seed,
            drawn=drawn,
        )

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor `name`, drawn in its stored dtype, then cast."""
        tensor = self.drawn[name]
        if ".experts." in name:
            return self.read_rows(name, range(tensor.shape[0]), device).to(dtype or tensor.dtype)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        self._draw(tensor, out, name)
        return out.to(dtype or tensor.dtype)

    def read_rows(self, name: str, ids: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """The rows `ids`; of a tensor that is drawn as a whole too."""
        tensor = self.drawn[name]
        if ".experts." not in name:
            return self.read(name, device)[list(ids)]
        out = torch.empty((len(ids), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
        for row, expert in zip(out, ids, strict=True):
            self._draw(tensor, row, f"{name} {expert}")
        return out

    def _draw(self, tensor: Drawn, out: torch.Tensor, stream: str) -> None:
        """Fill `out` with the values of one stream."""
        digest = hashlib.sha256(f"{self.seed} {stream}".encode()).digest()
        generator = torch.Generator(out.device).manual_seed(int.from_bytes(digest[:7], "little"))
        if tensor.dtype != torch.uint8:
            out.normal_(tensor.mean, tensor.std, generator=generator)
        elif tensor.name.endswith("_scales"):
            out.random_(119, 121, generator=generator)
        else:  # eight bytes a draw
            words = torch.empty(math.ceil(out.numel() / 8), dtype=torch.int64, device=out.device)
            words.random_(-(2**63), None, generator=generator)
            out.view(-1).copy_(words.view(torch.uint8)[: out.numel()])


def byte_tokenizer(vocab: int) -> Tokenizer:
    """For a model without one, of so many ids: a byte is an id, harmony's special tokens are some, others no text."""
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), Synthetic(vocab=max(vocab, LEAST_VOCAB)))
        return Tokenizer(Path(folder) / "tokenizer.json")
