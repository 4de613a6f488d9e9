"""Families of transformers with epmoe's experts on 1, 2 and 3 ranks, against the untouched model.

Attention is not split, so every rank of every number of ranks has the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import FAMILIES, load, logits, make, saved, stored, tokens
from spawn import run_ranks

from epmoe.ranks.mesh import Ranks

RANKS = (2, 3)
# The products are exact sums of other orders than the library's, in float32: a few units in the last place, amplified
# by two layers.
ERROR = 1e-5


@dataclass(frozen=True)
class Ran:
    """What a model says."""

    packed: torch.Tensor  # logits of EpmoeConfig
    plain: torch.Tensor  # of experts_implementation="epmoe"
    tokens: list[list[int]]  # of EpmoeConfig


def run(path: Path, out: Path, **options: Any) -> Ran:
    """Both models, each saved again under `out`."""
    from epmoe.integrations.transformers import EpmoeConfig

    packed = load(path, quantization_config=EpmoeConfig(), **options)
    plain = load(path, experts_implementation="epmoe", **options)
    ran = Ran(logits(packed), logits(plain), tokens(packed))
    packed.save_pretrained(out / "packed")
    plain.save_pretrained(out / "plain")
    return ran


def on_ranks(ranks: Ranks, folder: Path) -> dict[str, Ran]:
    """All families; one start of the ranks serves them."""
    from moe_families import config_of

    from epmoe.integrations.transformers import expert_parallel

    torch.set_num_threads(1)
    return {
        family: run(
            folder / family,
            folder / f"{family}-{ranks.size}",
            distributed_config=expert_parallel(config_of(family), ranks.size),
        )
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of each family, and what one rank wrote of it."""
    folder, threads = tmp_path_factory.mktemp("families"), torch.get_num_threads()
    torch.set_num_threads(1)
    for family in FAMILIES:
        saved(make(family), folder / family)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Ran]:
    return {family: run(folder / family, folder / f"{family}-1") for family in FAMILIES}


@pytest.fixture(scope="module")
def together(folder: Path) -> dict[int, list[dict[str, Ran]]]:
    """By number of ranks, by rank, by family."""
    return {size: run_ranks(on_ranks, size, folder, timeout=120) for size in RANKS}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_against_the_untouched_model(family: str, folder: Path, alone: dict[str, Ran]) -> None:
    untouched = load(folder / family)
    expected = logits(untouched)
    assert (alone[family].plain - expected).abs().max() < ERROR * expected.std()
    # the untouched model with the values that MXFP4 holds
    from epmoe.integrations.transformers.fit import PROJECTIONS, layout_of
    from epmoe.formats.mxfp4 import Mxfp4Matrix

    for module in untouched.modules():
        if not hasattr(module, "gate_up_proj") or module.gate_up_proj.__class__ is torch.nn.Linear:
            continue
        for name in PROJECTIONS:
            value = getattr(module, name)
            rows = value.transpose(1, 2) if layout_of(module).transposed else value
            rounded = Mxfp4Matrix.quantize(rows).dequantize(torch.float32)
            value.data = rounded.transpose(1, 2).contiguous() if layout_of(module).transposed else rounded
    rounded = logits(untouched)
    assert (alone[family].packed - rounded).abs().max() < ERROR * rounded.std()
    assert (rounded - expected).abs().max() > 0.01 * expected.std(), "rounding to MXFP4 cannot be seen here"
    assert alone[family].tokens == tokens(untouched)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", RANKS)
def test_the_same_bits_on_any_number_of_ranks(
    family: str, size: int, alone: dict[str, Ran], together: dict[int, list[dict[str, Ran]]]
) -> None:
    for ran in together[size]:
        assert torch.equal(ran[family].packed, alone[family].packed)
        assert torch.equal(ran[family].plain, alone[family].plain)
        assert ran[family].tokens == alone[family].tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", (1, *RANKS))
def test_what_is_saved_has_all_experts_and_loads_again(
    family: str, size: int, folder: Path, alone: dict[str, Ran], together: dict[int, list[dict[str, Ran]]]
) -> None:
    from epmoe.integrations.transformers import EpmoeConfig

    assert together
    out = folder / f"{family}-{size}"
    original, plain, packed = stored(folder / family), stored(out / "plain"), stored(out / "packed")
    assert plain.keys() == original.keys() and all(torch.equal(plain[name], original[name]) for name in plain)
    first = stored(folder / f"{family}-1" / "packed")
    assert packed.keys() == first.keys() and all(torch.equal(packed[name], first[name]) for name in packed)
    blocks = [value for name, value in packed.items() if name.endswith("gate_up_proj_blocks")]
    assert blocks and all(value.shape == (6, 64, 2, 16) for value in blocks)
    again = load(out / "packed", quantization_config=EpmoeConfig())
    assert torch.equal(logits(again), alone[family].packed)
