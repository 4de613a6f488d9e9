"""Checkpoints of all families, and what one rank makes of them, for tests that compare with it."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from moe_families import FAMILIES, Ran, make, run, saved

# Where an older release is installed, as on a machine that runs only the tests for GPUs, these cannot even be imported.
# scripts/setup installs one that is not.
if tuple(int(number) for number in version("transformers").split(".")[:2]) < (5, 23):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As ranks have, whose bits are compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<family>: its checkpoint in float32. <family>-1: what one rank saved of it, packed and plain."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        saved(make(family), folder / family)
    return folder


@pytest.fixture(scope="package")
def alone(folder: Path) -> dict[str, Ran]:
    """What one rank says, by family."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {family: run(folder / family, folder / f"{family}-1") for family in FAMILIES}
    torch.set_num_threads(threads)
    return found
