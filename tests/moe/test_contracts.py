"""What the backends say of themselves: typed (mypy looks at the assignments), true, and known without their kernels."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch

from epmoe import kernels
from epmoe.formats import FORMATS
from epmoe.moe.experts import EXPERTS, Experts
from epmoe.moe.experts.hub import HubExperts
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.experts.triton import TritonExperts
from epmoe.moe.router import ROUTERS, Router
from epmoe.moe.router.reference import ReferenceRouter
from epmoe.moe.router.triton import TritonRouter
from epmoe.tables import lookup

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

experts: dict[str, type[Experts]] = {"triton": TritonExperts, "hub": HubExperts, "reference": ReferenceExperts}
routers: dict[str, type[Router]] = {"triton": TritonRouter, "reference": ReferenceRouter}


def test_these_are_the_tables_in_their_order() -> None:
    assert list(experts.items()) == [(name, lookup("experts", EXPERTS, name)) for name in EXPERTS]
    assert list(routers.items()) == [(name, lookup("router", ROUTERS, name)) for name in ROUTERS]


@pytest.mark.parametrize("kind", [experts, routers], ids=["experts", "router"])
def test_what_they_serve(kind: dict[str, type[Experts] | type[Router]]) -> None:
    """The fast one comes first, and leaves the CPU to the reference; which no graph is captured with."""
    found = {name: (each.serves(CPU), each.serves(GPU), each.waits) for name, each in kind.items() if name != "hub"}
    assert found == {
        "triton": (False, True, False),
        "reference": (True, True, True),
    }


@pytest.mark.parametrize("kind", [experts, routers], ids=["experts", "router"])
@pytest.mark.parametrize("tokens", [0, 1, 20, 4096])
def test_sizes_that_compile_anew(kind: dict[str, type[Experts] | type[Router]], tokens: int) -> None:
    """The same whether the kernels were imported or not; a package's submodules become names in it."""
    for module in ("experts.triton.products", "router.triton.launch"):
        import_module(f"epmoe.moe.{module}")
    assert kind["reference"].distinct(tokens) == ()
    found = kind["triton"].distinct(tokens)
    assert set(found) == kernels.distinct(tokens) and list(found) == sorted(found)


def test_hub_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves no CPU, and a GPU where its kernels can be loaded."""
    for there in (True, False):
        monkeypatch.setattr("epmoe.moe.experts.hub.find_spec", lambda name, there=there: there or None)
        assert (HubExperts.serves(CPU), HubExperts.serves(GPU), HubExperts.waits) == (False, there, False)


def test_formats() -> None:
    assert experts["triton"].formats == experts["hub"].formats == {"mxfp4"} and experts["reference"].formats == set(
        FORMATS
    )


ASK = """
import sys, torch
sys.modules["triton"] = sys.modules["kernels"] = None  # an import of either fails
from epmoe.moe.experts import EXPERTS
from epmoe.moe.router import ROUTERS
from epmoe.tables import lookup
for key, table in (("experts", EXPERTS), ("router", ROUTERS)):
    for name in table:
        backend = lookup(key, table, name)
        print(key, name, backend.serves(torch.device("cuda")), backend.waits, backend.distinct(2))
print(lookup("experts", EXPERTS, "triton").formats)
"""


def test_a_machine_without_triton_can_ask() -> None:
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "experts triton True False (1, 2)",
        "experts hub False False (1, 2)",
        "experts reference True True ()",
        "router triton True False (1, 2)",
        "router reference True True ()",
        "frozenset({'mxfp4'})",
    ]
