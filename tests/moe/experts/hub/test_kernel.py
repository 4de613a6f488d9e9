"""Which kernels hub.kernel names: found, or refused in one line that says how to get them."""

import sys
from pathlib import Path
from typing import Any

import kernels
import pytest
from hub_kernel import NAME, written

from epmoe.config.schema import Hub
from epmoe.errors import UserError
from epmoe.moe.experts.hub.kernel import NAMES, kernel_package

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the Hub, and none finds what another one has loaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kernel_package.cache_clear()
    kernels.load._parse_local_kernel_overrides.cache_clear()


def test_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any way to it, and the build within it."""
    written(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    found = [kernel_package(str(place)) for place in (tmp_path / "here", "here", "here/build/torch-cpu")]
    assert {module.__file__ for module in found} == {
        str(tmp_path / "here/build/torch-cpu/gpt_oss_triton_kernels/__init__.py")
    }


@pytest.mark.parametrize("kernel", [Hub().kernel, f"{NAME}@{COMMIT}", f"some-one/else@{COMMIT}"])
def test_local_kernels(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the environment stands for a repository of the Hub, at any version or commit."""
    written(tmp_path)
    monkeypatch.setenv("LOCAL_KERNELS", f"{kernel.partition('@')[0]}={tmp_path}")
    assert Path(kernel_package(kernel).__file__).is_relative_to(tmp_path)


def test_what_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of a publisher that the Hub trusts; a commit of anybody, for whoever pins it has looked at it."""
    asked: list[tuple[str, dict[str, Any]]] = []
    module = kernel_package(str(written(tmp_path)))

    def get_kernel(name: str, **how: Any) -> Any:
        asked.append((name, how))
        return module

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    for kernel in (Hub().kernel, f"some-one/else@{COMMIT}"):
        assert kernel_package(kernel) is module
    assert asked == [
        (NAME, {"version": 1}),
        ("some-one/else", {"revision": COMMIT, "trust_remote_code": ["some-one/else"]}),
    ]


@pytest.mark.parametrize("kernel", ["", "here", "some-one/else", "some-one/else@main", f"some-one/else@{COMMIT[:7]}"])
def test_what_is_not_pinned_is_refused(kernel: str) -> None:
    with pytest.raises(UserError, match=f"^hub.kernel={kernel} is neither a directory nor a pinned name: give"):
        kernel_package(kernel)


@pytest.mark.parametrize("kernel", [Hub().kernel, f"some-one/else@{COMMIT}"])
def test_no_network(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.resolver.CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        kernel_package(kernel)
    said = str(caught.value)
    assert said.startswith(f"hub.kernel={kernel} cannot be loaded (") and "give hub.kernel=DIRECTORY" in said
    assert "\n" not in said


def test_no_build_for_this_machine(tmp_path: Path) -> None:
    written(tmp_path, "xpu")
    with pytest.raises(UserError, match=r"cannot be loaded \(FileNotFoundError: Cannot find a build variant .*: give"):
        kernel_package(str(tmp_path))


def test_code_that_fails(tmp_path: Path) -> None:
    """Kernels run code of their own; what it raises has one line, too."""
    written(tmp_path)
    (file,) = tmp_path.rglob("__init__.py")
    file.write_text("raise RuntimeError('not with this\\ncompiler')\n")
    with pytest.raises(UserError, match=r"cannot be loaded \(RuntimeError: not with this\): give"):
        kernel_package(str(tmp_path))


def test_another_package(tmp_path: Path) -> None:
    """All that is called is looked for before a weight is read."""
    written(tmp_path)
    (file,) = tmp_path.rglob("__init__.py")
    file.write_text(file.read_text() + "\ndel routing.compute_expt_data\ndel swiglu\n")
    with pytest.raises(UserError, match=r"it lacks routing\.compute_expt_data, swiglu\.swiglu_fn: give"):
        kernel_package(str(tmp_path))
    assert sum(map(len, NAMES.values())) == 15


def test_without_the_package_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(UserError, match=r"^experts=hub needs the package kernels .*: pip install kernels, or choose"):
        kernel_package(str(written(tmp_path)))
