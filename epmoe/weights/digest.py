"""Digests of what all ranks must have alike: config.json, the tensors' names and shapes, the weights that all hold.

An expert lives on one rank, so its weights have no second copy to be compared with; nor have heads that ranks share. Of
those each rank looks at a few bytes in its own files: another training's differ everywhere, and so do experts in
another order.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from epmoe.errors import UserError
from epmoe.models import Family
from epmoe.weights.checkpoint import Checkpoint

SAME_COPY = "give every rank the same copy of the checkpoint"

# Odd numbers of 64 random bits, as torch's and Python's signed and unsigned integers hold them.
STEP, FIRST, SECOND, BASE = (
    -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, 0x5851F42D4C957F2D,
)  # fmt: skip
SAMPLE, ROWS = 64, 8  # bytes of a row (an expert's matrix is one), and of how many rows of a tensor
CHUNK = 4 << 20  # words of 8 bytes at a time, so that temporaries stay small


def contents(source: Checkpoint) -> Mapping[str, str]:
    """What is known before any weight is read: config.json by key, the tensors' table by layer, tokenizer.json.

    Every rank makes text from ids, and ends a request where that holds a stop string.
    """
    found = {f"config.json's {key}": _short(value) for key, value in source.config.items()}
    tables: dict[str, list[Any]] = {}
    for name, info in sorted(source.tensors.items()):
        tables.setdefault(_layer(name), []).append([name, info.shape, str(info.dtype)])
    found |= {f"digest(names, shapes and dtypes of {part})": _hex(rows) for part, rows in tables.items()}
    if source.tokenizer_file is not None:
        found["digest(tokenizer.json)"] = hashlib.sha256(source.tokenizer_file.read_bytes()).hexdigest()[:8]
    return found


def expert_samples(source: Checkpoint) -> Mapping[str, str]:
    """`samples` of each of the files' tensors of experts."""
    return samples(source, [name for name in source.tensors if ".experts." in name], "experts")


def head_samples(source: Checkpoint, model: Family) -> Mapping[str, str]:
    """`samples` of what ranks share by heads; none where each has all of them."""
    return samples(source, [name for name, target in model.shared_tensors().items() if target.stored], "heads")


def samples(source: Checkpoint, names: Iterable[str], what: str) -> Mapping[str, str]:
    """Digests by layer of SAMPLE bytes from the middle of some rows (an expert is one) of these tensors in files.

    Raises:
        UserError: a file that can no longer be read.
    """
    found: dict[str, hashlib._Hash] = {}
    for name in sorted(names):
        info = source.tensors[name]
        if info.file not in source.files or not info.shape or not info.row_bytes:
            continue
        digest = found.setdefault(_layer(name), hashlib.sha256())
        try:
            with info.file.open("rb", buffering=0) as file:
                for row in range(0, info.shape[0], -(-info.shape[0] // ROWS)):
                    file.seek(info.offset + row * info.row_bytes + max(0, info.row_bytes - SAMPLE) // 2)
                    digest.update(file.read(min(SAMPLE, info.row_bytes)))
        except OSError as error:
            raise UserError(f"{info.file} cannot be read ({error.strerror}): check the disk") from error
    return {f"digest(a sample of the {what} of {layer})": each.hexdigest()[:8] for layer, each in found.items()}


def shared_digests(model: Family) -> Mapping[str, str]:
    """`digests` of the loaded weights that every rank holds whole, by their names in the checkpoint."""
    parameters, shared = dict(model.named_parameters()), model.shared_tensors().items()
    tensors = {name: each.of(parameters[each.parameter]) for name, each in shared if each.stored is None}
    return {f"digest({name})": f"{value:016x}" for name, value in digests(tensors).items()}


def held(source: Checkpoint, model: Family) -> Mapping[str, str]:
    """What tells the weights that this rank has loaded from another copy's: no expert's, see `expert_samples`."""
    return {**head_samples(source, model), **shared_digests(model)}


def fingerprint(source: Checkpoint, model: Family) -> str:
    """16 hex digits of all that is digested here: of one checkpoint the same on every rank and at every start, where
    attention lies on the ranks in one way."""
    return _hex([contents(source), expert_samples(source), held(source, model)], 16)


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """64 bits of each tensor's bits in their order, the same on every device; waits for the device once.

    For the words w_i of a chunk, all modulo 2^64 (^: exclusive or, `high`: the upper half):

        sum over i of SECOND · fold(FIRST · fold(w_i + i · STEP)),    fold(z) = z ^ high(z)

    Sums of integers are exact in any order; the position goes through products and folds, so that values that have
    changed places are seen. With one fold, words that differ in their highest bit alone were not: it stays the highest
    through products. The chunks' sums are the digits, base BASE, of the result.

    Args:
        tensors: contiguous, of any dtypes and sizes, on one device.
    """
    sums: list[torch.Tensor] = []
    counts = {}
    steps = torch.empty(0, dtype=torch.int64)
    for name, tensor in tensors.items():
        before = len(sums)
        for words in _words(tensor):
            if len(words) > len(steps):
                steps = torch.arange(1, len(words) + 1, device=words.device) * STEP
            sums.append(_sum(words, steps))
        counts[name] = len(sums) - before
    numbers = iter(torch.stack(sums).tolist() if sums else [])
    found = {}
    for name, count in counts.items():
        value = 0
        for _ in range(count):
            value = (value * BASE + next(numbers)) % 2**64
        found[name] = value
    return found


def _words(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's bytes as int64 in chunks, its end filled up with zeros."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:  # rows within a larger tensor may begin anywhere
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    yield from flat[:whole].view(torch.int64).split(CHUNK)
    if whole < flat.numel():
        end = flat.new_zeros(8)
        end[: flat.numel() - whole] = flat[whole:]
        yield end.view(torch.int64)


def _sum(words: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The sum of the mixed words of one chunk, on the device: six launches, 12 bytes of traffic a byte of the chunk."""
    mixed = words + steps[: len(words)]
    halves = mixed.view(torch.int32).view(-1, 2)
    low, high = halves[:, 0], halves[:, 1]  # little endian
    low.bitwise_xor_(high)
    mixed.mul_(FIRST)
    low.bitwise_xor_(high)
    return mixed.mul_(SECOND).sum()


def _layer(name: str) -> str:
    """A tensor's name up to its layer's number: a table for each tensor would be long."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _short(value: Any) -> str:
    """A value of config.json in at most 60 characters."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"digest {_hex(value)}"


def _hex(value: Any, digits: int = 8) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]
