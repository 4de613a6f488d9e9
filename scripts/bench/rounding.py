#!/usr/bin/env python3
"""What rounding to MXFP4 does to a checkpoint's experts: each layer's error, by each rule of quant.scale.

    scripts/bench/rounding.py CHECKPOINT                          all rules, all layers
    scripts/bench/rounding.py CHECKPOINT --scale best,up --plot errors.svg

Of a layer's two matrices together, w as stored and ŵ as it is after encoding and decoding:

    rms     ‖ŵ − w‖ / ‖w‖          the bars
    max     max |ŵ − w|

A few experts at a time are read, and nothing of them is kept; arithmetic on the device, sums in float64. Experts that
are stored in mxfp4 already have no error by ocp and best. --plot needs matplotlib (`pip install 'epmoe[bench]'`). The
last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from epmoe.errors import UserError
from epmoe.formats import SCALES
from epmoe.formats.mxfp4 import decode, encode
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.hub import resolve
from epmoe.weights.load import model_of
from epmoe.weights.manifest import Manifest, Matrix
from scripts.bench.plot import plotter, save

BAR = 40  # characters of the largest error
AT_ONCE = 64 << 20  # values that are converted at a time, or one expert's


@dataclass
class Sums:
    """Of the values so far."""

    errors: float = 0.0  # Σ (ŵ − w)²
    values: float = 0.0  # Σ w²
    largest: float = 0.0

    def add(self, value: torch.Tensor, scale: str) -> None:
        error = decode(*encode(value, scale=scale), torch.float32) - value
        self.errors += float(error.double().square_().sum())
        self.values += float(value.double().square_().sum())
        self.largest = max(self.largest, float(error.abs().max()))

    @property
    def rms(self) -> float:
        return (self.errors / self.values) ** 0.5 if self.values else 0.0


def experts_of(source: Checkpoint, matrix: Matrix, device: torch.device) -> Iterator[torch.Tensor]:
    """A matrix's values in float32, some experts at a time."""
    experts, rows, columns = matrix.shape
    for some in torch.arange(experts).split(max(1, AT_ONCE // (rows * columns))):
        read = matrix.stored.read(matrix.name, some.tolist(), lambda name, ids: source.read_rows(name, ids, device))
        yield read.dequantize(torch.float32)


def measure(path: str, scales: list[str], device: torch.device) -> list[dict[str, Any]]:
    """A row for each layer: {rule: {"rms", "max"}}."""
    source = Checkpoint.open(resolve(path))
    family, config = model_of(source)
    with torch.device("meta"):
        manifest = Manifest.of(source, family(config), "auto")
    manifest.check()
    rows = []
    for layer, pair in enumerate(manifest.layers):
        sums = {scale: Sums() for scale in scales}
        for matrix in pair:
            for value in experts_of(source, matrix, device):
                for scale, each in sums.items():
                    each.add(value, scale)
        row: dict[str, Any] = {"layer": layer, "stored": pair[0].stored.format}
        row |= {scale: {"rms": each.rms, "max": each.largest} for scale, each in sums.items()}
        rows.append(row)
    return rows


def told(rows: list[dict[str, Any]], scales: list[str]) -> Iterator[str]:
    """A line for each layer and rule, with a bar."""
    most = max((row[scale]["rms"] for row in rows for scale in scales), default=0.0) or 1.0
    for row in rows:
        for scale in scales:
            rms, largest = row[scale]["rms"], row[scale]["max"]
            bar = "█" * round(BAR * rms / most)
            yield f"layer {row['layer']:3} {scale:4}  rms {100 * rms:6.3f} %  max {largest:9.3g}  {bar}"


def draw(rows: list[dict[str, Any]], scales: list[str], picture: Path, title: str) -> None:
    """Both errors by layer, a curve for each rule."""
    figure, axes = plotter().subplots(1, 2, figsize=(10, 4), layout="constrained")
    layers = [row["layer"] for row in rows]
    for axis, key, label in zip(axes, ("rms", "max"), ("relative RMS error, %", "largest error"), strict=True):
        for scale in scales:
            axis.plot(layers, [row[scale][key] * (100 if key == "rms" else 1) for row in rows], "o-", label=scale)
        axis.set_xlabel("layer")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    save(figure, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a directory or a Hub id")
    parser.add_argument("--scale", default=",".join(SCALES), help="rules, with commas")
    parser.add_argument("--device", help="left out: the accelerator, where there is one")
    parser.add_argument("--plot", type=Path, help="written; its name ends in .svg or .png")
    options = parser.parse_args()
    scales = options.scale.split(",")
    if unknown := [scale for scale in scales if scale not in SCALES]:
        parser.error(f"--scale {unknown[0]!r} is unknown; known: {', '.join(SCALES)}")
    if options.plot is not None and options.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot {options.plot} must end in .svg or .png")
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        rows = measure(options.checkpoint, scales, torch.device(options.device or found))
    except UserError as error:
        sys.exit(f"scripts/bench/rounding.py: {error}")
    for line in told(rows, scales):
        print(line)
    if options.plot is not None:
        draw(rows, scales, options.plot, f"experts of {Path(options.checkpoint).name} rounded to MXFP4")
    print(json.dumps({"bench": "rounding", "checkpoint": options.checkpoint, "scales": scales, "layers": rows}))


if __name__ == "__main__":
    main()
