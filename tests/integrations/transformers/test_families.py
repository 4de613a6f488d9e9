"""Families of transformers with epmoe's experts on one rank, against the untouched model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import FAMILIES, Ran, load, logits, stored, tokens

from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.integrations.transformers import EpmoeConfig
from epmoe.integrations.transformers.fit import PROJECTIONS, layout_of

# The products are the same sums in other orders than the library's, in float32: a few units in the last place,
# amplified by two layers.
ERROR = 1e-5


def round_experts(model: Any) -> None:
    """Give a model the experts' values that MXFP4 holds, in its own dtype."""
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            for name in PROJECTIONS:
                value, turned = getattr(module, name), layout_of(module).transposed
                rows = Mxfp4Matrix.quantize(value.transpose(1, 2) if turned else value).dequantize(torch.float32)
                value.data = rows.transpose(1, 2).contiguous() if turned else rows


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_untouched_model(family: str, folder: Path, alone: dict[str, Ran]) -> None:
    untouched = load(folder / family)
    expected = logits(untouched)
    assert (alone[family].plain - expected).abs().max() < ERROR * expected.std()
    round_experts(untouched)
    rounded = logits(untouched)
    assert (rounded - expected).abs().max() > 0.01 * expected.std(), "rounding to MXFP4 cannot be seen here"
    assert (alone[family].packed - rounded).abs().max() < ERROR * rounded.std()
    assert alone[family].tokens == tokens(untouched)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_again(family: str, folder: Path, alone: dict[str, Ran]) -> None:
    out = folder / f"{family}-1"
    original, plain, packed = stored(folder / family), stored(out / "plain"), stored(out / "packed")
    assert plain.keys() == original.keys() and all(torch.equal(plain[name], original[name]) for name in plain)
    blocks = [value for name, value in packed.items() if name.endswith("gate_up_proj_blocks")]
    assert blocks and all(value.shape == (6, 64, 2, 16) for value in blocks)
    again = load(out / "packed", quantization_config=EpmoeConfig())
    assert torch.equal(logits(again), alone[family].packed)
    if family != "gpt_oss":  # whose files say mxfp4, which is transformers' own quantiser without being asked for ours
        assert torch.equal(logits(load(out / "packed")), alone[family].packed)
