#!/usr/bin/env python3
"""How long loading takes, against the time that the same bytes take by plain read and copy.

    scripts/bench/load.py /tmp/20b --size 20b --ranks 1,2        (the checkpoint is made when it is not there)
    scripts/bench/load.py /tmp/20b --ranks 1 --variants          (which threads and buffers are best)

Measured for each number of ranks, every rank a process with its own device, all at the same time, files in the page
cache (a read of all of them comes first), the slowest rank counts, the median of --repeat runs:

    plain   read 32 MiB into one pinned buffer, copy it to the device, wait, again, until this rank's bytes are through:
            one thread, no overlap, into one device buffer. The bytes are exactly those that the rank loads.
    read    the same without the copy            copy    the same without the read
    ring    epmoe.weights.reader alone: all tensors that the rank loads, into their own memory, none packed
    mmap    the same by the library safetensors, which maps the files; on a CPU the values are copied out of the mapping
    pread   the same with backend="pread", which reads a whole tensor for a slice of it
    fast    the same by fastsafetensors, where it is installed, on one rank: it reads whole files
    load    epmoe.weights.load: checks, ring, packing, everything up to a model that can run

One load of a tiny checkpoint comes first, so that imports, the device's start and the pinning of the ring's buffers
(`pin`, once a process) are not in `load`.

The aim is load ≤ 1.5 × plain. On a CPU plain and ring have no copy.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.moe.placement import contiguous
from epmoe.ranks import command, mesh
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.load import load, model_of
from epmoe.weights.reader import Reader, Span
from epmoe.weights.synthetic import SIZES, make_checkpoint

KINDS = ("plain", "read", "copy", "ring", "mmap", "pread", "fast", "load")  # what is timed, in the table's order
PLAIN_BYTES = 32 << 20
THREADS = (1, 2, 4, 8, 12)
BUFFER_MIB = (2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", choices=SIZES, default="20b", help="of the checkpoint, when it has to be made")
    parser.add_argument("--ranks", default="1", help="numbers of ranks, with commas")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", action="store_true", help="time the ring with several threads and buffers")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this process is a rank; results go there
    options = parser.parse_args()
    if options.worker:
        command.main(lambda: work(options))
    if not (options.checkpoint / "config.json").exists():
        begin = time.perf_counter()
        make_checkpoint(options.checkpoint, options.size)
        print(f"made {options.checkpoint} in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    rows = [measure(size, options) for size in map(int, options.ranks.split(","))]
    report(rows, options)


def measure(size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run `size` ranks of this script; their results, the slowest rank's time of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
        subprocess.run([*command, *sys.argv[1:], "--worker", folder], check=True, timeout=3600)
        results = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]
    row = {key: max(result[key] for result in results) for key in ("bytes", "pin", *KINDS) if key in results[0]}
    first = results[0]
    variants = {name: max(r["variants"][name] for r in results) for name in first["variants"]}
    return row | {"ranks": size, "device": first["device"], "cores": first["cores"], "variants": variants}


def work(options: argparse.Namespace) -> None:
    """One rank: measure and write the seconds of each kind to a file."""
    with mesh.start(device=options.device, timeout_s=600) as mine, tempfile.TemporaryDirectory() as tiny:
        accelerated = mine.device.type != "cpu"
        synchronize(mine.device)
        begin = time.perf_counter()
        reader = Reader()
        [torch.empty(reader.buffer_bytes, dtype=torch.uint8, pin_memory=accelerated) for _ in range(reader.buffers)]
        result: dict[str, Any] = {"pin": time.perf_counter() - begin}
        load(Checkpoint.open(make_checkpoint(tiny, experts=max(8, mine.size))), mine)
        checkpoint = Checkpoint.open(options.checkpoint)
        share = list(share_of(checkpoint, mine))
        for _ in plain(share, mine.device, read=True, copy=False):  # into the page cache
            pass

        def timed(run: Callable[[], object]) -> float:
            seconds = []
            for _ in range(options.repeat):
                gc.collect()
                if accelerated:
                    torch.accelerator.empty_cache()  # every run pays for its memory, as the first in a process does
                mine.barrier()
                begin = time.perf_counter()
                kept = run()
                synchronize(mine.device)
                seconds.append(time.perf_counter() - begin)
                del kept
            return statistics.median(seconds)

        result["bytes"] = sum(part.span[1] for part in share)
        for name, read, copy in (("plain", True, True), ("read", True, False), ("copy", False, True)):
            result[name] = timed(lambda r=read, c=copy: list(plain(share, mine.device, r, c)))  # type: ignore[misc]
        result["ring"] = timed(lambda: ring(share, mine.device, Reader()))
        for backend in ("mmap", "pread"):
            result[backend] = timed(lambda b=backend: library(share, mine.device, b))  # type: ignore[misc]
        if mine.size == 1 and find_spec("fastsafetensors"):
            result["fast"] = timed(lambda: fast(checkpoint, mine.device))
        result["load"] = timed(lambda: load(Checkpoint.open(options.checkpoint), mine, progress=False))
        result["variants"] = {}
        for threads, mib in [(t, m) for t in THREADS for m in BUFFER_MIB] if options.variants and accelerated else []:
            reader = Reader(threads, buffers=2 * threads, buffer_bytes=mib << 20)
            result["variants"][f"{threads}x{mib}"] = timed(lambda reader=reader: ring(share, mine.device, reader))  # type: ignore[misc]
        result["device"] = torch.get_device_module(mine.device).get_device_name(mine.device) if accelerated else "cpu"
        result["cores"] = len(os.sched_getaffinity(0))
        (options.worker / f"{mine.rank}.json").write_text(json.dumps(result))


@dataclass(frozen=True)
class Part:
    """What a rank reads of a tensor: its rows from `first` on."""

    file: Path
    name: str
    first: int
    shape: tuple[int, ...]  # of the part
    whole: bool
    dtype: torch.dtype
    span: Span


def share_of(checkpoint: Checkpoint, mine: mesh.Ranks) -> Iterator[Part]:
    """What this rank reads."""
    _, config = model_of(checkpoint)
    ids = contiguous(config.num_experts, mine.expert_size).experts[mine.expert_rank]
    for name, info in checkpoint.tensors.items():
        first, count = (ids[0], len(ids)) if ".experts." in name else (0, info.shape[0])
        span = (info.offset + first * info.row_bytes, count * info.row_bytes)
        shape = (count, *info.shape[1:])
        yield Part(info.file, name, first, shape, count == info.shape[0], info.dtype, span)


def plain(share: list[Part], device: torch.device, read: bool, copy: bool) -> Iterator[None]:
    """The baseline; `read` and `copy` leave a half out."""
    accelerated = device.type != "cpu"
    buffer = torch.empty(PLAIN_BYTES, dtype=torch.uint8, pin_memory=accelerated)
    target = torch.empty(PLAIN_BYTES, dtype=torch.uint8, device=device)
    view = buffer.numpy().data
    for part in share:
        fd, (offset, size) = os.open(part.file, os.O_RDONLY), part.span
        for at in range(0, size, PLAIN_BYTES):
            count = min(PLAIN_BYTES, size - at)
            if read:
                got = os.preadv(fd, [view[:count]], offset + at)
                assert got == count, "a file in the page cache is read at once"
            if copy and accelerated:
                target[:count].copy_(buffer[:count], non_blocking=True)
                synchronize(device)
            yield
        os.close(fd)


def ring(share: list[Part], device: torch.device, reader: Reader) -> list[torch.Tensor]:
    """All of the share through `reader`."""
    kept = []
    for part in share:
        kept.append(torch.empty(part.shape, dtype=part.dtype, device=device))
        reader.read(part.file, [part.span], kept[-1])
    reader.close()
    return kept


def library(share: list[Part], device: torch.device, backend: str) -> list[torch.Tensor]:
    """All of the share by safetensors."""
    kept, opened = [], {}
    for part in share:
        if part.file not in opened:
            opened[part.file] = safe_open(part.file, framework="pt", device=str(device), backend=backend)
        file = opened[part.file]
        rows = slice(part.first, part.first + part.shape[0])
        found = file.get_tensor(part.name) if part.whole else file.get_slice(part.name)[rows]
        kept.append(found.clone() if device.type == "cpu" and backend == "mmap" else found)
    return kept


def fast(checkpoint: Checkpoint, device: torch.device) -> list[Any]:
    """All of the checkpoint by fastsafetensors, through the host's memory."""
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), str(device), nogds=True)
    loader.add_filenames({0: [str(file) for file in checkpoint.files]})
    files = loader.copy_files_to_device()
    return [loader, files, *(files.get_tensor(name) for name in checkpoint.tensors)]


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"{options.checkpoint}, {rows[0]['device']}, {rows[0]['cores']} cores, torch {torch.__version__}; seconds")
    print(f"{'ranks':>5} {'GB a rank':>9}" + "".join(f" {kind:>7}" for kind in KINDS) + " load/plain")
    for row in rows:
        seconds = "".join(f" {row[kind]:7.3f}" if kind in row else f" {'-':>7}" for kind in KINDS)
        print(f"{row['ranks']:5} {row['bytes'] / 1e9:9.2f}{seconds} {row['load'] / row['plain']:10.2f}")
    for row in rows:
        speed = {key: row["bytes"] / 1e9 / row[key] for key in ("read", "copy", "ring", "load")}
        rest = row["load"] - row["ring"]
        limit = "the ring" if row["ring"] > rest else "what comes after reading (allocation, packing)"
        row["limit"] = limit
        row["fastest"] = min((kind for kind in ("ring", "mmap", "pread", "fast") if kind in row), key=row.__getitem__)
        print(
            f"{row['ranks']} ranks: one thread reads {speed['read']:.1f} GB/s, the link copies {speed['copy']:.1f}, "
            f"the ring does both at {speed['ring']:.1f}, load at {speed['load']:.1f} GB/s a rank; {limit} limits load; "
            f"the fastest reader is {row['fastest']}"
        )
        for name, took in sorted(row["variants"].items(), key=lambda item: item[1]):
            threads, mib = name.split("x")
            print(f"  {threads:>2} threads, {2 * int(threads):>2} buffers of {mib:>2} MiB: {took:.3f} s")
    print(
        json.dumps({"bench": "load", "checkpoint": options.checkpoint.name, "torch": torch.__version__, "rows": rows})
    )


if __name__ == "__main__":
    main()
