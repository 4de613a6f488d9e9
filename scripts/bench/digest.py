#!/usr/bin/env python3
"""Time the digest of the weights that all ranks hold, by which they compare their copies after loading.

    scripts/bench/digest.py                    gpt-oss-20b's shared weights, random, on the GPU
    scripts/bench/digest.py --size tiny --device cpu

Ends in a line of JSON: bytes, tensors, seconds (the median of five, after one to warm up), bytes read a second, the
peak of memory beside the weights.
"""

import argparse
import json
import statistics
import time

import torch

from epmoe.bench.weights import RandomCheckpoint
from epmoe.weights.digest import digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="20b")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    source = RandomCheckpoint.of(options.size)
    shared = [name for name in source.tensors if ".experts." not in name]
    tensors = {name: source.read(name, options.device, torch.bfloat16) for name in shared}
    on_gpu = options.device != "cpu"
    before = torch.accelerator.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.accelerator.reset_peak_memory_stats()
        torch.accelerator.synchronize()  # the weights are still being drawn
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        digests(tensors)
        seconds.append(time.perf_counter() - begin)
    count, median = sum(each.nbytes for each in tensors.values()), statistics.median(seconds[1:])
    record = {
        "bench": "digest",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "size": options.size,
        "tensors": len(tensors),
        "bytes": count,
        "first_s": seconds[0],
        "seconds": median,
        "GB_s": count / median / 1e9,
        "extra_bytes": torch.accelerator.max_memory_allocated() - before if on_gpu else None,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
