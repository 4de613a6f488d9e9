"""Machine: what ranks must have in common is named, and a change of it shows."""

import shutil
from pathlib import Path

import pytest
import torch

from epmoe.ranks import machine


def test_every_part_has_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.machine(torch.device("cpu"))
    assert list(found) == ["epmoe", "torch", "triton", "device"] and all(found.values())
    assert found["torch"] == torch.__version__ and found["device"].startswith("cpu ")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    assert machine.machine(torch.device("cpu"))["device"] == f"{found['device'].rpartition(' ')[0]} ABACUS"


def test_sources_count_by_name_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the package lies; compiled files and data do not count."""

    def digest() -> str:
        return machine.machine(torch.device("cpu"))["epmoe"]

    here = digest()
    copy = tmp_path / "elsewhere"
    shutil.copytree(machine.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(machine, "PACKAGE", copy)
    assert digest() == here
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "\n")
    changed = digest()
    (copy / "errors.py").rename(copy / "mistakes.py")
    assert len({here, changed, digest()}) == 3


@pytest.mark.gpu
def test_a_gpu_has_its_model() -> None:
    assert machine.machine(torch.device("cuda", 0))["device"] == torch.cuda.get_device_name(0)
