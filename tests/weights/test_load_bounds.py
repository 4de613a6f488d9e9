"""Load: a rank reads its share of the bytes and no more, in bounded memory; both seen from outside the loader."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from loading import share_of
from spawn import run_ranks

from epmoe.formats import FORMATS
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.moe.placement import contiguous
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.experts import Limits
from epmoe.weights.load import load
from epmoe.weights.synthetic import make_checkpoint


def read_so_far() -> int:
    """Bytes that this process has asked the system for, by the system's count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def bytes_of_loads(
    ranks: Ranks, warm: Path, loads: Sequence[tuple[Path, str]], attention: str = "replicate"
) -> list[tuple[int, int]]:
    """(bytes by the system's count, bytes by the report) of each (checkpoint, quant)."""
    for path, quant in ((warm, "mxfp4"), (warm, "bf16")):  # imports are read from files, too
        load(Checkpoint.open(path), ranks, Choices(quant=quant))
    result = []
    for path, quant in loads:
        before = read_so_far()
        _, report = load(Checkpoint.open(path), ranks, Choices(quant=quant, attention=attention))
        result.append((read_so_far() - before, report.bytes_read))
    return result


# JSON files, /proc itself, /sys: far less than one expert of one layer (0.8 MB in MXFP4).
IO_SLACK = 100_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of 7 experts, each larger than what else a process reads, in both formats; `warm` is a tiny one."""
    path, sizes = tmp_path_factory.mktemp("large"), {"experts": 7, "hidden": 512, "intermediate": 1024, "layers": 1}
    return {
        "warm": make_checkpoint(path / "warm", layers=1),
        "mxfp4": make_checkpoint(path / "mxfp4", "tiny", **sizes, shards=2),
        "bf16": make_checkpoint(path / "bf16", "tiny", **sizes, dtype_experts="bf16"),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_rank_reads_its_share_by_the_systems_count(size: int, large: dict[str, Path]) -> None:
    """Its experts, the shared tensors and the headers: on real ranks, without and with conversion, by /proc/self/io."""
    loads = [(large[stored], quant) for stored in ("mxfp4", "bf16") for quant in ("mxfp4", "bf16")]
    results = run_ranks(bytes_of_loads, size, large["warm"], loads)
    for rank, local in enumerate(map(len, contiguous(7, size).experts)):
        for (path, _), (by_system, by_report) in zip(loads, results[rank], strict=True):
            assert by_report == share_of(path, local, 7)
            assert by_report <= by_system <= by_report + IO_SLACK


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_reads_its_heads_by_the_systems_count(size: int, tmp_path: Path, large: dict[str, Path]) -> None:
    """mesh.attention=tensor: 16 query heads of 64 on 2, of which two ranks may have one together."""
    path = make_checkpoint(tmp_path, experts=8, hidden=512, layers=1, heads=16, kv_heads=2, head_dim=64)
    results = run_ranks(bytes_of_loads, size, large["warm"], [(path, "mxfp4")], "tensor")
    query, kv = 16 - 16 // size, 2 - max(1, 2 // size)
    elsewhere = (query + 2 * kv) * 64 * (512 + 1) * 2 + query * 2  # rows of weights, biases, sinks, in bf16
    assert elsewhere > 4 * IO_SLACK
    for [(by_system, by_report)] in results:
        assert by_report == share_of(path, 8 // size, 8) - elsewhere
        assert by_report <= by_system <= by_report + IO_SLACK


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


class SmallChunks(Mxfp4Matrix):
    """Converted a little at a time."""

    chunk_values = 1 << 18


def peak_of_load(ranks: Ranks, warm: Path, path: Path, quant: str) -> tuple[int, int]:
    """(growth of the resident memory's peak during a load, bytes of the loaded weights), with small chunks."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed leaves the resident memory at once
    FORMATS["mxfp4"] = f"{__name__}:SmallChunks"
    choices, limits = Choices(quant=quant), Limits(chunk_bytes=4 << 20)
    load(Checkpoint.open(warm), ranks, choices)  # what libraries allocate once
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = memory("VmRSS")
    model, _ = load(replace(Checkpoint.open(path), cast_bytes=4 << 20), ranks, choices, limits=limits)
    growth = memory("VmHWM") - before
    packed = [layer.experts for layer in model.moe_layers()]
    weights = sum(value.nbytes for _, value in model.named_parameters()) + sum(each.nbytes for each in packed if each)
    return growth, weights


@pytest.mark.parametrize(
    ("dtype_experts", "quant"),
    [
        *(("mxfp4", "mxfp4"), ("bf16", "mxfp4")),
        *(pytest.param(each, "bf16", marks=pytest.mark.slow) for each in ("bf16", "mxfp4")),
    ],
)
def test_host_memory_in_flight_is_bounded(
    dtype_experts: str, quant: str, large: dict[str, Path], tmp_path: Path
) -> None:
    """Beside the weights: chunks; and where chunks were converted, the last matrix again while they are joined.

    Without chunks, bf16 → MXFP4 takes 52 MiB more; a whole gate_up read before it is transposed or cast, 64 MiB.
    """
    path = make_checkpoint(
        tmp_path, layers=2, experts=16, hidden=1024, intermediate=1024, vocab=20000, dtype_experts=dtype_experts
    )
    values = 16 * 1024 * 1024
    joined = 0 if dtype_experts == quant else 2 * values if quant == "bf16" else values * 17 // 32
    [(growth, weights)] = run_ranks(peak_of_load, 1, large["warm"], path, quant)
    assert growth <= weights + joined + (20 << 20)
