"""What auto stands for, on every kind of machine: nothing here touches a device."""

from dataclasses import dataclass, field, replace

import pytest
from loading import rank_of

from epmoe.errors import UserError
from epmoe.weights.choices import Choices, resolve, waiting

MXFP4, MIXED, BF16 = frozenset({"mxfp4"}), frozenset({"mxfp4", "bf16"}), frozenset({"bf16"})
ON_GPU = Choices("mxfp4", "triton", "triton", "slots", "contiguous", "bfloat16")
ON_CPU = Choices("mxfp4", "reference", "reference", "slots", "contiguous", "float32")


@dataclass(frozen=True)
class Case:
    name: str
    formats: frozenset[str]
    device: str
    chosen: Choices
    waits: tuple[str, ...] = ()
    asked: Choices = field(default_factory=Choices)
    nodes: int = 1

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("a GPU", MXFP4, "cuda:0", ON_GPU),
    Case("a CPU", MXFP4, "cpu", ON_CPU, ("experts=reference", "router=reference")),
    Case("several nodes", MXFP4, "cuda:0", replace(ON_GPU, combine="all_reduce"), nodes=2),
    Case(
        "requests of their own",
        MXFP4,
        "cuda:0",
        replace(ON_GPU, combine="all_to_all", attention="data"),
        asked=Choices(attention="data"),
        nodes=2,
    ),
    Case(
        "one layer that triton's experts do not run",
        MIXED,
        "cuda:0",
        replace(ON_GPU, experts="reference"),
        ("experts=reference",),
    ),
    Case("bf16", BF16, "cuda:0", replace(ON_GPU, quant="bf16", experts="reference"), ("experts=reference",)),
    Case(
        "what is asked for stays",
        MXFP4,
        "cuda:0",
        replace(ON_GPU, router="reference", combine="all_reduce", dtype="float32"),
        ("router=reference",),
        asked=Choices(router="reference", combine="all_reduce", dtype="float32"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_auto(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = replace(rank_of(0, 1, case.device), nodes=case.nodes)
    chosen = resolve(case.asked, case.formats, ranks)
    assert chosen == case.chosen and waiting(chosen) == case.waits
    told = [key for key in ("quant", "experts", "router", "combine", "dtype") if getattr(case.asked, key) == "auto"]
    said = ", ".join(f"{key}={getattr(case.chosen, key)}" for key in told)
    assert capsys.readouterr().err == f"epmoe: auto chose {said}\n"


@pytest.mark.parametrize(
    ("there", "formats", "experts"),
    [(True, MXFP4, "hub"), (False, MXFP4, "reference"), (True, MIXED, "reference"), (True, BF16, "reference")],
    ids=["with the package kernels", "without", "mixed", "bf16"],
)
def test_another_accelerator(
    there: bool, formats: frozenset[str], experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither NVIDIA's nor AMD's: our kernels are for none; the community's, where they can be loaded, or torch."""
    monkeypatch.setattr("epmoe.moe.experts.hub.find_spec", lambda name: there or None)
    chosen = resolve(Choices(), formats, rank_of(1, 2, "xpu:0"))
    quant = "mxfp4" if "mxfp4" in formats else "bf16"
    assert chosen == Choices(quant, experts, "reference", "slots", "contiguous", "bfloat16")
    assert "router=reference" in waiting(chosen)  # so no graph is captured


def test_only_rank_0_says_it_and_only_when_there_is_something(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve(Choices(), MXFP4, rank_of(1, 2)) == ON_CPU
    assert resolve(ON_CPU, MXFP4, rank_of(0, 1)) == ON_CPU
    assert capsys.readouterr().err == ""


def test_a_backend_that_does_not_run_the_formats() -> None:
    with pytest.raises(UserError, match=r"experts=triton does not run bf16, only mxfp4: choose another backend or"):
        resolve(Choices(experts="triton"), MIXED, rank_of(0, 1, "cuda:0"))


@pytest.mark.parametrize(
    ("combine", "attention", "ranks", "line"),
    [
        ("local", "replicate", 2, r"combine=local brings no rows from one of 2 ranks .*: take combine=slots"),
        ("local", "data", 3, r"combine=local brings no rows from one of 3 ranks .*: take combine=slots"),
        (
            "all_to_all",
            "replicate",
            2,
            r"combine=all_to_all .* mesh.attention=replicate .*: take combine=slots, or mesh",
        ),
        ("all_to_all", "replicate", 1, r"combine=all_to_all .*: take combine=slots, or mesh.attention=data"),
    ],
)
def test_a_combine_that_cannot_be(combine: str, attention: str, ranks: int, line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        resolve(Choices(combine=combine, attention=attention), MXFP4, rank_of(0, ranks))
