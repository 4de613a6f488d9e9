#!/usr/bin/env python3
"""Judge an expert backend: does it keep the contract, how far off is it, are its bits the reference's, how fast is it?

    scripts/bench/experts.py package.module:Class      from the working directory, PYTHONPATH or an installed package
    scripts/bench/experts.py triton                    a name of the table
    scripts/bench/experts.py mine:Mine --device cpu --tokens 1,64 --hidden 256 --intermediate 256

Rows are compared with the equations in float64 and with `reference`, in every format that the backend names and in both
dtypes, at every edge of shape and routing (expert_cases.py). Then what the contract asks for besides: bits of a row
that follow neither from the batch nor from the placement, `unpack`, the memory that is given for the rows, formats that
are refused, no wait for the device where it promises none.

Times are of one layer's two products, µs a call, beside the first other backend of the table that serves the device
(`triton` on a GPU, `reference` on a CPU): on a GPU as moe.py measures, in a CUDA graph, with weights that rotate past
the L2 cache, unless the backend waits for the device; else the median of single calls, after a warm-up. The last line
is one JSON object. The exit status is 1 when a check fails.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, os.getcwd())  # a module there comes before one of the same name beside this file
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.errors import UserError
from epmoe.formats import FORMATS, ExpertWeights
from epmoe.moe.experts import EXPERTS, Experts
from epmoe.tables import lookup
from scripts.bench.expert_cases import Case, dispatched, random_input, random_weights
from scripts.bench.expert_contract import judge

REPEATS = 20
SIZES = {"cpu": (256, 256, 8), "other": (2880, 2880, 32)}  # hidden, intermediate and experts of the timed layer


def peer_of(backend: type[Experts], device: str, format: str) -> str | None:
    """The first other backend of the table that serves the device and runs the format."""
    for name in EXPERTS:
        other: type[Experts] = lookup("experts", EXPERTS, name)
        if other is not backend and other.serves(torch.device(device)) and format in other.formats:
            return name
    return None


def times(backend: type[Experts], peer: str | None, format: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """µs a call for each number of tokens."""
    sizes = {key: getattr(options, key) for key in ("hidden", "intermediate", "experts", "top_k")}
    rows = []
    for tokens in map(int, options.tokens.split(",")):
        case = Case("timed", tokens, **sizes)
        row: dict[str, Any] = {"tokens": tokens, "us": measure_us(backend, format, case, options.device)}
        said = f"{tokens:6} tokens  {row['us']:10.1f} µs"
        if peer is not None:
            row["peer_us"] = measure_us(lookup("experts", EXPERTS, peer), format, case, options.device)
            row["speedup"] = row["peer_us"] / row["us"]
            said += f"  {peer} {row['peer_us']:10.1f} µs  {row['speedup']:6.2f} times as fast"
        print(said, flush=True)
        rows.append(row)
    return rows


def measure_us(backend: type[Experts], format: str, case: Case, device: str) -> float:
    """In a graph where the device has them and the backend fits one."""
    alone = device == "cpu" or backend.waits
    return (_single_us if alone else _graph_us)(backend, format, case, device)


def _single_us(backend: type[Experts], format: str, case: Case, device: str) -> float:
    """The median of calls whose end the host waits for; in the dtype that a model has on the device."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    experts = backend.pack(random_weights(case, format, dtype, device), case.activation)
    x_TH, logits_TE = random_input(case, dtype, device)
    dispatch = dispatched(case, logits_TE)

    def call() -> float:
        begin = time.perf_counter()
        experts.forward(x_TH, dispatch)
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - begin

    call()
    return 1e6 * statistics.median(call() for _ in range(REPEATS))


def _graph_us(backend: type[Experts], format: str, case: Case, device: str) -> float:
    """As moe.py: other tokens in each call of a graph, and other copies of the weights in turn."""
    from scripts.bench import moe  # imports triton

    layer = moe.Layer(case.experts, case.experts, case.hidden, case.intermediate, case.top_k)
    copies = moe.copies_needed(layer, case.tokens, 16)
    weights = (of_format(moe.random_weights(layer, seed), format) for seed in range(copies))
    packed = [backend.pack(each, case.activation) for each in weights]
    xs, dispatches = moe.inputs(layer, case.tokens)
    return moe.measure_us(lambda call: packed[call % copies].forward(xs[call], dispatches[call]))


def of_format(weights: ExpertWeights, format: str) -> ExpertWeights:
    """The same values, as far as the format can hold them."""
    if weights.gate_up.format == format:
        return weights
    matrix = lookup("quant", FORMATS, format)
    gate_up, down = (matrix.quantize(each.dequantize(torch.bfloat16)) for each in (weights.gate_up, weights.down))
    return replace(weights, gate_up=gate_up, down=down)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", help="package.module:Class, or a name of EXPERTS")
    parser.add_argument("--device", help="cpu or cuda; left out: a GPU where there is one")
    parser.add_argument("--tokens", default="1,16,64,256", help="of the timed calls, with commas")
    parser.add_argument("--hidden", type=int, default=0, help="of the timed layer, a multiple of 32; 0: by the device")
    parser.add_argument("--intermediate", type=int, default=0, help="likewise")
    parser.add_argument("--experts", type=int, default=0, help="likewise")
    parser.add_argument("--top-k", type=int, default=4)
    options = parser.parse_args()
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for key, size in zip(("hidden", "intermediate", "experts"), SIZES.get(options.device, SIZES["other"]), strict=True):
        setattr(options, key, getattr(options, key) or size)
    try:
        backend: type[Experts] = lookup("experts", EXPERTS, options.backend, Experts)
        if not backend.serves(torch.device(options.device)):
            raise UserError(f"{options.backend} does not serve {options.device}: take another --device")
    except UserError as error:
        sys.exit(f"scripts/bench/experts.py: {error}")

    with torch.inference_mode():
        errors, failed = judge(backend, options.device)
        rows: list[dict[str, Any]] = []
        format = "mxfp4" if "mxfp4" in backend.formats else min(backend.formats, default="")
        peer = peer_of(backend, options.device, format)
        if failed:
            print("a backend that breaks the contract is not timed")
        else:
            rows = times(backend, peer, format, options)
    gpu = torch.get_device_module(options.device).get_device_name() if options.device != "cpu" else "cpu"
    record = {
        "bench": "experts",
        "backend": options.backend,
        "device": gpu,
        "torch": torch.__version__,
        "formats": sorted(backend.formats),
        "passed": not failed,
        "failed": failed,
        "same_bits": bool(errors) and all(error.same_bits for error in errors),
        "errors": [asdict(error) for error in errors],
        "timed": {key: getattr(options, key) for key in ("hidden", "intermediate", "experts", "top_k")}
        | {"format": format, "peer": peer},
        "rows": rows,
    }
    print(json.dumps(record))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
