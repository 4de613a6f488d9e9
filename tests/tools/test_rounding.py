"""scripts/bench/rounding.py: each layer's error, counted by hand; bars, a picture, one line for a mistake."""

import json
from pathlib import Path

import pytest
import torch
from forked import python
from loading import EXPERTS, stored

from epmoe.formats import SCALES
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.weights.synthetic import make_checkpoint
from scripts.bench import rounding

ROOT = Path(__file__).resolve().parents[2]


def test_errors_are_those_of_the_whole_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, dtype_experts="bf16", experts=5)
    monkeypatch.setattr(rounding, "AT_ONCE", 2 * 128 * 96)  # two experts of gate_up at a time
    rows, tensors = rounding.measure(str(tmp_path), list(SCALES), torch.device("cpu")), stored(tmp_path)
    assert [(row["layer"], row["stored"]) for row in rows] == [(0, "bf16"), (1, "bf16")]
    for row in rows:
        names = (EXPERTS.format(row["layer"]) + name for name in ("gate_up_proj", "down_proj"))
        values = [tensors[name].mT.contiguous().float() for name in names]
        for scale in SCALES:
            errors = [Mxfp4Matrix.quantize(value, scale).dequantize(torch.float32) - value for value in values]
            squares, norm = (sum(float(x.double().square().sum()) for x in each) for each in (errors, values))
            assert row[scale]["rms"] == pytest.approx((squares / norm) ** 0.5, rel=1e-9)
            assert row[scale]["max"] == max(float(error.abs().max()) for error in errors)
        assert row["best"]["rms"] < min(row["ocp"]["rms"], row["up"]["rms"])


def test_the_command(tmp_path: Path) -> None:
    """On the embedded model, whose experts are MXFP4 already: ocp and best return every byte's value."""
    script, picture = str(ROOT / "scripts/bench/rounding.py"), tmp_path / "errors.svg"
    make_checkpoint(tmp_path / "m", experts=3)
    done = python(script, str(tmp_path / "m"), "--device", "cpu", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    record = json.loads(last)
    assert (
        [row["ocp"] for row in record["layers"]]
        == [row["best"] for row in record["layers"]]
        == [{"rms": 0.0, "max": 0.0}] * 2
    )
    assert len(lines) == 2 * len(SCALES) and lines[0].startswith("layer   0 ocp ")
    assert "relative RMS error" in picture.read_text() and ">best<" in picture.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["x", "--scale", "ocp,down"], "--scale 'down' is unknown; known: ocp, up, best"),
        (["x", "--plot", "errors.gif"], "--plot errors.gif must end in .svg or .png"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str) -> None:
    done = python(str(ROOT / "scripts/bench/rounding.py"), *words)
    assert done.returncode != 0 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
