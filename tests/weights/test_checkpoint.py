"""Checkpoint: every defect of a directory is refused on opening by one line that names it; reads are exact."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from epmoe.bench.weights import RandomCheckpoint
from epmoe.errors import UserError
from epmoe.weights.checkpoint import INDEX, SINGLE, Checkpoint
from epmoe.weights.reader import Reader, Span, _PinnedRing
from epmoe.weights.source import Source
from epmoe.weights.synthetic import make_checkpoint

FIRST, LAST = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, SINKS = "model.norm.weight", "model.layers.0.self_attn.sinks"


def rewrite_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors header and nothing else of the file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def shift(begin: int, end: int) -> Callable[[dict[str, Any]], object]:
    """Move one end of the sinks' bytes."""

    def change(header: dict[str, Any]) -> None:
        offsets = header[SINKS]["data_offsets"]
        header[SINKS]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return change


def drop_tensor(file: Path, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)


def remove_weights(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


@dataclass(frozen=True)
class Case:
    name: str
    spoil: Callable[[Path], object]
    says: str  # a regular expression of the message


def entry(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: rewrite_header(path / FIRST, lambda header: change(header[SINKS]))


def weight_map(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: rewrite_json(path / INDEX, lambda index: change(index["weight_map"]))


def prefix(length: int) -> Callable[[Path], object]:
    """Overwrite the header's length."""
    return lambda path: (path / FIRST).write_bytes(length.to_bytes(8, "little") + (path / FIRST).read_bytes()[8:])


def duplicate(path: Path) -> None:
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (path / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + b"x")


def duplicate_key(name: str) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        text = (path / name).read_text().strip()
        (path / name).write_text(text[:-1] + ', "eos_token_id": 1, "eos_token_id": 2}')

    return spoil


CASES = [
    Case("no config.json", lambda p: (p / "config.json").unlink(), "no config.json"),
    Case("config.json is no JSON", lambda p: (p / "config.json").write_text("{"), "config.json is not valid JSON"),
    Case(
        "config.json is no text",
        lambda p: (p / "config.json").write_bytes(b"\xff\xfe"),
        "config.json is not valid JSON",
    ),
    Case("config.json has a key twice", duplicate_key("config.json"), "config.json .*'eos_token_id' occurs twice"),
    Case(
        "generation_config.json has a key twice", duplicate_key("generation_config.json"), "'eos_token_id' occurs twice"
    ),
    Case("a number that is none", lambda p: (p / "config.json").write_text('{"a": NaN}'), "NaN is no number of JSON"),
    Case("nested deeply", lambda p: (p / "config.json").write_text("[" * 100_000), "nested too deeply"),
    Case("config.json is a list", lambda p: (p / "config.json").write_text("[]"), "holds a JSON list"),
    Case(
        "generation_config.json is no JSON",
        lambda p: (p / "generation_config.json").write_text("x"),
        "generation_config.json is not valid",
    ),
    Case(
        "no weights",
        remove_weights,
        "neither model.safetensors nor model.safetensors.index",
    ),
    Case("no index", lambda p: (p / INDEX).unlink(), f"{FIRST} but no {INDEX}"),
    Case("index and single file", lambda p: (p / SINGLE).write_bytes(b""), "both model.safetensors and"),
    Case("index is no JSON", lambda p: (p / INDEX).write_text("nope"), "index.json is not valid JSON"),
    Case("index without weight_map", lambda p: (p / INDEX).write_text("{}"), "no weight_map"),
    Case("index leads outside", weight_map(lambda m: m.update({NORM: "../x.safetensors"})), "no plain file name"),
    Case("index with a long name", weight_map(lambda m: m.update({NORM: "x" * 5000})), "no such file"),
    Case("index with a name of two lines", weight_map(lambda m: m.update({NORM: "a\nb"})), r"names a.nb for"),
    Case("index with a number for a file", weight_map(lambda m: m.update({NORM: 3})), "no plain file name"),
    Case("missing shard", lambda p: (p / LAST).unlink(), f"names {LAST} .* no such file"),
    Case(
        "tensor of the index is in no shard",
        lambda p: drop_tensor(p / LAST, NORM),
        f"places {NORM} in {LAST}, which does not hold it",
    ),
    Case(
        "tensor of a shard is not in the index",
        weight_map(lambda m: m.pop(NORM)),
        f"holds {NORM}, but .* does not know it",
    ),
    Case(
        "tensor in another shard than the index says",
        weight_map(lambda m: m.update({NORM: FIRST})),
        f"{LAST} holds {NORM}, but .* places it in {FIRST}",
    ),
    Case("empty file", lambda p: (p / FIRST).write_bytes(b""), "has 0 bytes, too few"),
    Case("truncated in the header", lambda p: os.truncate(p / FIRST, 100), "header has .* truncated"),
    Case("truncated by one byte", lambda p: os.truncate(p / FIRST, (p / FIRST).stat().st_size - 1), "is truncated"),
    Case("one byte too long", lambda p: (p / FIRST).write_bytes((p / FIRST).read_bytes() + b"x"), "is too long"),
    Case("header length 0", prefix(0), "malformed header"),
    Case("header length beyond the file", prefix(1 << 62), "header has 4611686018427387904 bytes"),
    Case("header length too short", prefix(50), "malformed header"),
    Case("no safetensors file", lambda p: (p / FIRST).write_bytes(b"PK\3\4" * 100), "no safetensors file"),
    Case(
        "Git LFS pointer",
        lambda p: (p / FIRST).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "is a git-lfs pointer, not the file itself",
    ),
    Case("header is a list", lambda p: (p / FIRST).write_bytes((2).to_bytes(8, "little") + b"[]"), "no JSON object"),
    Case("a name twice", duplicate, "key 'a' occurs twice"),
    Case("gap", lambda p: rewrite_header(p / FIRST, shift(2, 2)), f"{SINKS} leaves a gap"),
    Case("overlap", lambda p: rewrite_header(p / FIRST, shift(-2, -2)), f"{SINKS} overlaps"),
    Case(
        "offsets and shape differ",
        lambda p: rewrite_header(p / FIRST, shift(0, 2)),
        f"{SINKS} of BF16 .* needs 8 bytes, its data_offsets span 10",
    ),
    Case("offsets backwards", entry(lambda e: e.update(data_offsets=[8, 0])), f"{SINKS} has shape .* data_offsets"),
    Case("offset no number", entry(lambda e: e.update(data_offsets=["0", 8])), f"entry of {SINKS} lacks"),
    Case("negative length", entry(lambda e: e.update(shape=[-4])), f"{SINKS} has shape .-4."),
    Case("shape of floats", entry(lambda e: e.update(shape=[4.0])), f"{SINKS} has shape"),
    Case("no dtype", entry(lambda e: e.pop("dtype")), f"entry of {SINKS} lacks dtype"),
    Case(
        "dtype not supported",
        entry(lambda e: e.update(dtype="F8_E5M2")),
        f"{SINKS} has dtype F8_E5M2, .* supported: BF16",
    ),
    Case("wrong dtype", entry(lambda e: e.update(dtype="F32")), f"{SINKS} of F32 .* needs 16 bytes"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_defect_is_refused_by_one_line(case: Case, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    Checkpoint.open(tmp_path)
    case.spoil(tmp_path)
    with pytest.raises(UserError, match=case.says) as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Checkpoint.open(tmp_path / "file")


def test_a_file_cut_off_after_opening_ends_the_read(tmp_path: Path) -> None:
    """A read that comes back short is an error, never a loop and never stale bytes."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    info = checkpoint.tensors[NORM]
    os.truncate(info.file, info.offset + 10)
    with pytest.raises(UserError, match=f"ends at byte {info.offset + 10}, {info.nbytes - 10} bytes early"):
        checkpoint.read_rows(NORM, range(info.shape[0]))
    with pytest.raises(UserError, match=r"norm.weight cannot be read \(.*not fully covered\): copy or download"):
        checkpoint.read(NORM)


def test_a_file_cut_off_between_two_reads_ends_the_second(tmp_path: Path) -> None:
    """By the library, which has the file open and its header read."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    info = checkpoint.tensors[NORM]
    assert torch.equal(checkpoint.read(NORM), load_file(info.file)[NORM])
    os.truncate(info.file, info.offset + 10)
    with pytest.raises(UserError, match=r"norm.weight cannot be read \(.*fill whole buffer\): copy or download"):
        checkpoint.read(NORM)


def test_what_was_read_does_not_follow_the_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    info = checkpoint.tensors[NORM]
    before = (value := checkpoint.read(NORM)).clone()
    with info.file.open("r+b") as file:
        file.seek(info.offset)
        file.write(bytes(info.nbytes))
    assert torch.equal(value, before) and not checkpoint.read(NORM).any()


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_safetensors_reads_it(shards: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, shards=shards))
    expected = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    assert set(checkpoint.tensors) == set(expected) and len(checkpoint.files) == shards
    for name, value in expected.items():
        assert torch.equal(checkpoint.read(name), value)
        assert torch.equal(checkpoint.read(name, dtype=torch.float32), value.float())


def test_foreign_files_are_read_too(tmp_path: Path) -> None:
    """Files that safetensors itself wrote: scalars, empty tensors, and data that is not aligned to its dtype."""
    make_checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "odd": torch.arange(7, dtype=torch.int64)}
    save_file(tensors, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")  # one more byte of header moves all data off its alignment
    (tmp_path / SINGLE).write_bytes(
        (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    )
    checkpoint = Checkpoint.open(tmp_path)
    for name, value in tensors.items():
        assert torch.equal(checkpoint.read(name), value)
        assert torch.equal(checkpoint.read(name, dtype=torch.bfloat16), value.to(torch.bfloat16))


@pytest.mark.parametrize("ids", [(), (0,), (4,), (1, 2, 3), (0, 2, 4), (4, 3, 0, 1), (2, 2)], ids=str)
def test_rows_are_read_by_runs(ids: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    whole, before = checkpoint.read(name), checkpoint.bytes_read
    assert torch.equal(checkpoint.read_rows(name, ids), whole[list(ids)])
    assert checkpoint.bytes_read - before == len(ids) * whole[0].nbytes


def test_a_large_cast_passes_through_small_temporaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = replace(Checkpoint.open(make_checkpoint(tmp_path)), cast_bytes=1000)  # five rows, of 320
    name = "model.embed_tokens.weight"
    sizes: list[int] = []
    real = Reader.read

    def noted(self: Reader, file: Path, spans: Sequence[Span], out: torch.Tensor) -> None:
        sizes.append(out.nbytes)
        real(self, file, spans, out)

    monkeypatch.setattr(Reader, "read", noted)
    assert torch.equal(checkpoint.read(name, dtype=torch.float32), load_file(tmp_path / SINGLE)[name].float())
    assert len(sizes) == 64 and max(sizes) <= 1000


def test_checkpoints_are_sources(tmp_path: Path) -> None:
    """What the loader asks for (mypy looks at the types), of files and of weights that are made up."""
    sources: list[Source] = [Checkpoint.open(make_checkpoint(tmp_path)), RandomCheckpoint.of("tiny")]
    for source in sources:
        name = "model.layers.1.mlp.experts.down_proj_blocks"
        info, rows = source.tensors[name], source.read_rows(name, [0, 2])
        assert rows.shape == (2, *info.shape[1:]) and rows.dtype == info.dtype
        assert torch.equal(source.read(name)[[0, 2]], rows)
        source.close()
        assert torch.equal(source.read_rows(name, [2])[0], rows[1])


def test_text_files_are_found(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path))
    assert checkpoint.tokenizer_file == tmp_path / "tokenizer.json"
    assert checkpoint.json("tokenizer_config.json") == checkpoint.tokenizer_config != checkpoint.json("none.json") == {}
    assert checkpoint.config["model_type"] == "gpt_oss" and len(checkpoint.generation_config["eos_token_id"]) == 3
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).unlink()
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.tokenizer_file, checkpoint.tokenizer_config, checkpoint.generation_config) == (None, {}, {})


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_broken_text_file_is_refused(name: str, content: str, tmp_path: Path) -> None:
    """Also tokenizer_config.json beside a chat_template.jinja, where its template is not looked for."""
    make_checkpoint(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} .*download it again"):
        Checkpoint.open(tmp_path)


class HostDevice:
    """Stands for torch.cuda where there is none: streams that run at once. It shows the ring's bookkeeping alone."""

    @staticmethod
    def Stream(device: torch.device) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

    current_stream = Stream

    @staticmethod
    def Event() -> Any:
        return SimpleNamespace(synchronize=lambda: None, record=lambda stream: None)

    stream = staticmethod(contextlib.nullcontext)


@pytest.mark.parametrize("buffer_bytes", [64, 1001, 1 << 20])
def test_the_ring_fills_every_byte_once_and_survives_errors(
    buffer_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More chunks than buffers, more threads than buffers, spans in any order; a short read gives its buffer back."""
    empty = torch.empty
    monkeypatch.setattr(torch, "get_device_module", lambda device: HostDevice)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    data = torch.arange(30_011).to(torch.uint8)
    (tmp_path / "file").write_bytes(bytes(data.tolist()))
    ring = _PinnedRing(torch.device("cpu"), threads=4, buffers=3, buffer_bytes=buffer_bytes)
    spans = [(20_000, 10_011), (0, 1), (5, 7000), (1, 4)]
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    for _ in range(2):
        out = torch.full((sum(size for _, size in spans),), 77, dtype=torch.uint8)
        ring.read(fd, tmp_path / "file", spans, out)
        assert torch.equal(out, torch.cat([data[a : a + n] for a, n in spans]))
        with pytest.raises(UserError, match="bytes early"):
            ring.read(fd, tmp_path / "file", [(0, 40_000)], torch.zeros(40_000, dtype=torch.uint8))
    os.close(fd)
    ring.close()


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_bytes", [4096, 1001, 8 << 20])
def test_the_ring_delivers_the_same_bytes(buffer_bytes: int, tmp_path: Path) -> None:
    """Through buffers of a size that divides neither tensors nor dtypes, and with work queued before and after."""
    make_checkpoint(tmp_path, layers=3, experts=9, hidden=192, intermediate=96)
    host = Checkpoint.open(tmp_path)
    reader = Reader(threads=4, buffers=5, buffer_bytes=buffer_bytes)
    checkpoint = Checkpoint.open(tmp_path, reader)
    for _ in range(3):
        for name in host.tensors:
            busy = torch.full((1 << 16,), 7.0, device="cuda")  # memory that the next read may be given
            del busy
            value = checkpoint.read(name, "cuda")
            assert value.dtype == host.tensors[name].dtype and torch.equal(value.cpu(), host.read(name))
        name = "model.layers.2.mlp.experts.gate_up_proj_blocks"
        ids = (8, 0, 1, 2, 5)
        assert torch.equal(checkpoint.read_rows(name, ids, "cuda").cpu(), host.read_rows(name, ids))


@pytest.mark.gpu
def test_the_ring_is_all_the_pinned_memory(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, layers=1, experts=16, hidden=1024, intermediate=1024)
    torch.cuda.reset_peak_host_memory_stats()
    stats = torch.cuda.host_memory_stats()
    held = "active_bytes" if "active_bytes.peak" in stats else "allocated_bytes"  # the name depends on torch's version
    before = stats[held + ".current"]
    reader = Reader(threads=2, buffers=4, buffer_bytes=1 << 18)
    checkpoint = Checkpoint.open(tmp_path, reader)
    for name in checkpoint.tensors:
        checkpoint.read(name, "cuda")
    assert torch.cuda.host_memory_stats()[held + ".peak"] - before <= 4 << 18
    assert checkpoint.bytes_read > 16 << 20


@pytest.mark.gpu
def test_a_file_cut_off_under_the_ring_is_an_error(tmp_path: Path) -> None:
    """And the ring still works afterwards: no buffer is lost."""
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path), Reader(threads=2, buffers=2, buffer_bytes=1000))
    name = "model.embed_tokens.weight"
    info = checkpoint.tensors[name]
    data = info.file.read_bytes()
    for _ in range(3):
        os.truncate(info.file, info.offset + 1500)
        with pytest.raises(UserError, match="bytes early"):
            checkpoint.read(name, "cuda")
        info.file.write_bytes(data)
        assert checkpoint.read(name, "cuda").shape == info.shape
