"""A Hugging Face checkpoint directory: config.json, safetensors files, tokenizer. Everything is checked on opening.

A safetensors file is 8 bytes n (little endian), n bytes of JSON {name: {dtype, shape, data_offsets}} and the tensors'
bytes without gaps. Several files ("shards") come with model.safetensors.index.json, whose weight_map names the shard of
each tensor. Only headers are read on opening; tensors are read by name afterwards, whole (onto a CPU by the library
safetensors: whole.py says when, and why not always) or by rows.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from epmoe import strictjson
from epmoe.errors import UserError
from epmoe.weights import layouts
from epmoe.weights.reader import Reader, Span
from epmoe.weights.source import TensorInfo
from epmoe.weights.whole import Library

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WHOLE = "model-00001-of-00001.safetensors"  # one shard, which needs no index
_MAX_HEADER = 100_000_000  # the limit of the safetensors format, bytes


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `open` makes one; `read` and `read_rows` bring tensors to a device."""

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]  # empty when there is none
    tokenizer_config: Mapping[str, Any]  # likewise
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]  # the safetensors files
    tokenizer_file: Path | None
    reader: Reader = field(repr=False)  # of headers, of rows, and of all that goes to an accelerator
    whole: Library = field(repr=False, default_factory=Library, kw_only=True)  # of all else
    # A tensor that is cast on reading passes through temporaries of this size.
    cast_bytes: int = field(default=64 << 20, kw_only=True)

    @classmethod
    def open(cls, path: str | Path, reader: Reader | None = None) -> Self:
        """Check the directory, its JSON files, the index and every shard's header.

        Raises:
            UserError: what is wrong, where, and what to do; one line.
        """
        path, reader = Path(os.path.expanduser(path)), reader or Reader()
        if not path.is_dir():
            what = "is a file, not a checkpoint directory" if path.exists() else "does not exist"
            raise UserError(f"checkpoint {path} {what}: give a directory with config.json and safetensors files")
        if not (path / "config.json").is_file():
            raise UserError(f"checkpoint {path} {layouts.without_config(path)}")
        if adapter := layouts.adapter(path):
            raise UserError(f"checkpoint {path} {adapter}")
        config = _json_object(path / "config.json")
        tokenizer_config = _json_object(path / "tokenizer_config.json", missing={})
        tensors = _read_tensors(path, reader)
        tokenizer = path / "tokenizer.json"
        return cls(
            path=path,
            config=config,
            generation_config=_json_object(path / "generation_config.json", missing={}),
            tokenizer_config=tokenizer_config,
            tensors=tensors,
            files=tuple(dict.fromkeys(info.file for info in tensors.values())),
            tokenizer_file=tokenizer if tokenizer.is_file() else None,
            reader=reader,
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of safetensors files read so far, headers included."""
        return self.reader.bytes_read + self.whole.bytes_read

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor `name`, cast to `dtype` (None: as stored) through temporaries of bounded size."""
        info = self.tensors[name]
        if dtype in (None, info.dtype) or info.nbytes <= self.cast_bytes:
            if torch.device(device).type == "cpu":
                return self.whole.read(info.file, name).to(dtype or info.dtype)
            out = torch.empty(info.shape, dtype=info.dtype, device=device)
            self.reader.read(info.file, [(info.offset, info.nbytes)], out)
            return out.to(dtype or info.dtype)
        out = torch.empty(info.shape, dtype=dtype, device=device)
        rows = max(1, self.cast_bytes // info.row_bytes)
        for start in range(0, info.shape[0], rows):
            ids = range(start, min(start + rows, info.shape[0]))
            out[start : ids.stop].copy_(self.read_rows(name, ids, device))
        return out

    def read_rows(self, name: str, ids: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """The rows `ids` of tensor `name` along its first dimension (experts, say): [len(ids), ...], dtype as stored.

        Neighbouring ids are read as one span.
        """
        info = self.tensors[name]
        assert all(0 <= row < info.shape[0] for row in ids), (name, info.shape, ids)
        out = torch.empty((len(ids), *info.shape[1:]), dtype=info.dtype, device=device)
        spans = [(info.offset + a * info.row_bytes, n * info.row_bytes) for a, n in _runs(ids)]
        self.reader.read(info.file, spans, out)
        return out

    def json(self, name: str) -> dict[str, Any]:
        """What a JSON file beside the weights holds; empty when there is none. Raises UserError for no object."""
        return _json_object(self.path / name, missing={})

    def close(self) -> None:
        """Let go of files, and of the host memory and threads that reading to an accelerator has taken.

        The next read takes them anew.
        """
        self.reader.close()
        self.whole.close()


def _runs(ids: Sequence[int]) -> Iterator[Span]:
    """(first, count) of each run of neighbouring ids: 3 4 5 9 → (3, 3), (9, 1)."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield ids[start], i - start
            start = i


def _json_object(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON file that holds an object; `missing` instead when there is no such file."""
    if missing is not None and not file.exists():
        return missing
    try:
        data = file.read_bytes()
        if layouts.is_pointer(data):
            raise UserError(f"{file} {layouts.POINTER}")
        value = strictjson.loads(data)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, expected an object: download it again")
    return value


def _read_tensors(path: Path, reader: Reader) -> dict[str, TensorInfo]:
    """All tensors of the directory; the index and the headers must agree on every one."""
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise UserError(f"checkpoint {path} has both {SINGLE} and {INDEX}: remove the stale one")
    if single.exists():
        return read_header(single, reader)
    if not index.exists():
        others = sorted(file.name for file in path.glob("*.safetensors"))
        if others == [WHOLE]:
            return read_header(path / WHOLE, reader)
        if others:
            raise UserError(f"checkpoint {path} has {others[0]} but no {INDEX}: download the index too")
        raise UserError(f"checkpoint {path} has neither {SINGLE} nor {INDEX}: it holds no safetensors weights")
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map of tensor names to files: download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: {name} is in {shard!r}, which is no plain file name: download it again")
        if not os.path.isfile(path / shard):  # Path.is_file raises for a name that is too long
            raise UserError(f"{index} names {shard} for {name}, but {path} has no such file: download it again")
    tensors: dict[str, TensorInfo] = {}
    for shard in dict.fromkeys(weight_map.values()):
        for name, info in read_header(path / shard, reader).items():
            if weight_map.get(name) != shard:
                said = f"places it in {weight_map[name]}" if name in weight_map else "does not know it"
                raise UserError(
                    f"{path / shard} holds {name}, but {INDEX} {said}: index and shards do not belong together"
                )
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"{index} places {name} in {shard}, which does not hold it: index and shards do not belong together"
            )
    return tensors


def read_header(file: Path, reader: Reader) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, every field and the file's size checked.

    Raises:
        UserError: the header's length or JSON, a dtype, a shape, gaps, overlaps, or a size that is not the file's.
    """
    try:
        size = os.stat(file).st_size
    except OSError as error:
        raise UserError(f"{file} cannot be opened: {error.strerror}") from error
    if size < 8:
        raise UserError(f"{file} has {size} bytes, too few for a safetensors header: download it again")
    length = int.from_bytes(reader.read_bytes(file, 0, 8), "little")
    if length > min(size - 8, _MAX_HEADER):
        if layouts.is_pointer(reader.read_bytes(file, 0, min(size, 64))):
            raise UserError(f"{file} {layouts.POINTER}")
        raise UserError(
            f"{file} says its header has {length} bytes, but the file has {size}: "
            f"truncated or no safetensors file; download it again"
        )
    try:
        header = strictjson.loads(reader.read_bytes(file, 8, length))
    except ValueError as error:
        raise UserError(f"{file} has a malformed header ({error}): download it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{file} has a header that is no JSON object: download it again")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, 8 + length, name, entry) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise UserError(f"{file}: {name} {what} (byte {info.offset}, expected {end}): download it again")
        end += info.nbytes
    if size != end:
        what = "truncated" if size < end else "too long"
        raise UserError(f"{file} is {what}: its header describes {end} bytes, the file has {size}; download it again")
    return tensors


def _tensor_info(file: Path, data: int, name: str, entry: Any) -> TensorInfo:
    """One entry of a header whose tensors begin at byte `data`."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise UserError(
                f"{file}: the header's entry of {name} lacks dtype, shape or data_offsets: download it again"
            )
    if not all(type(length) is int and length >= 0 for length in shape) or not 0 <= begin <= end:
        raise UserError(f"{file}: {name} has shape {shape} and data_offsets {[begin, end]}: download it again")
    if dtype not in DTYPES:
        raise UserError(f"{file}: {name} has dtype {dtype}, which is not supported; supported: {', '.join(DTYPES)}")
    info = TensorInfo(file, tuple(shape), DTYPES[dtype], data + begin)
    if info.nbytes != end - begin:
        raise UserError(
            f"{file}: {name} of {dtype} {shape} needs {info.nbytes} bytes, its data_offsets span {end - begin}"
        )
    return info
