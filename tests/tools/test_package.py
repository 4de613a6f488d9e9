"""The wheel: a non-editable install holds conf/ and the embedded model, and works from any folder."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MOST_DEMO_BYTES = 18 * 2**20  # the model and its head


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without build isolation hatchling comes from this environment: no network.
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder), str(ROOT))
    (file,) = folder.glob("epmoe-*.whl")
    return file


def test_dependencies_are_the_imports() -> None:
    """What epmoe imports it declares, also where another dependency happens to bring it along; and nothing else."""
    # bench/peer.py compares with transformers where a user has it, integrations/transformers/ is for its models,
    # experts=hub loads kernels by a package (extras of their names); nothing else may import these
    apart = {ROOT / "epmoe/bench/peer.py", ROOT / "epmoe/moe/experts/hub/kernel.py"}
    files = set((ROOT / "epmoe").rglob("*.py")) - apart - set((ROOT / "epmoe" / "integrations").rglob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"epmoe"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", each)[0].lower().replace("-", "_") for each in project["dependencies"]}
    name = {"hydra": "hydra_core", "yaml": "pyyaml"}
    assert {name.get(module, module) for module in imported} == declared


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {info.filename: info.file_size for info in archive.infolist()}
        for file in (ROOT / "conf").rglob("*.yaml"):
            name = f"epmoe/conf/{file.relative_to(ROOT / 'conf')}"
            assert archive.read(name) == file.read_bytes()
    demo = {str(file.relative_to(ROOT)): file.stat().st_size for file in (ROOT / "epmoe" / "demo").rglob("*.*")}
    assert {name: held.get(name) for name in demo} == demo
    assert {f"epmoe/server/page/{name}" for name in ("index.html", "page.css", "page.js", "page.svg")} <= held.keys()
    assert sum(demo.values()) <= MOST_DEMO_BYTES
    assert "epmoe/py.typed" in held and "epmoe/moe/experts/triton/tiles.json" in held
    top = {name.partition("/")[0] for name in held}
    assert len(top) == 2 and "epmoe" in top  # the other one is the metadata: no tests, no scripts
    assert any(name.endswith("/licenses/LICENSE") for name in held)


def test_installed_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """The installed package, not the checkout, is what runs: its own configuration, its own embedded model."""
    site, folder = tmp_path / "site", tmp_path / "anywhere"
    folder.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))

    def python(*arguments: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python("-c", "import epmoe.config.compose as c; print(c.conf_dir())") == f"{site}/epmoe/conf\n"
    assert yaml.safe_load(python("-m", "epmoe.generate", "--cfg", "job", "prompt=é, ${x}"))["prompt"] == "é, ${x}"
    assert len(python("-m", "epmoe.generate", "runtime=cpu", "max_new_tokens=8", "prompt=In the").split()) > 1
    words = (f"{site}/bin/epmoe", "generate", "--cfg", "job", "--max-new-tokens", "8")
    assert yaml.safe_load(python(*words))["max_new_tokens"] == 8
    assert list(folder.iterdir()) == []
