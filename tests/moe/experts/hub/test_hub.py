"""experts=hub with a package that stands in for the community's: rows, bits, layouts, ranks, refusals."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_kernel import written
from loading import rank_of
from spawn import run_ranks

from epmoe.config.schema import Hub
from epmoe.errors import UserError
from epmoe.moe.experts.hub import HubExperts
from epmoe.moe.experts.hub.kernel import kernel_package
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.hub import DEMO
from epmoe.weights.load import load
from scripts.bench.expert_cases import CASES, TOLERANCE, Case, random_weights
from tests.moe.experts.test_experts import run_batches, run_case, run_placements, run_round_trip

BITS = Case("bits", tokens=37, hidden=288, intermediate=256, experts=5, top_k=3)
OURS = [case for case in CASES if case.activation.up_offset == 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(params=[False, True], ids=["by size", "bitwise"])
def backend(request: pytest.FixtureRequest, place: Path) -> Iterator[type[HubExperts]]:
    yield HubExperts.configured(Hub(str(place), request.param))


@pytest.mark.parametrize("case", OURS, ids=str)
def test_forward(backend: type[HubExperts], case: Case) -> None:
    """The layer's equations, at every edge of shape and routing."""
    run_case(backend, "mxfp4", case, "cpu", torch.bfloat16)


def test_pack_round_trip(backend: type[HubExperts]) -> None:
    run_round_trip(backend)


def test_nbytes(backend: type[HubExperts]) -> None:
    """What was filled up counts; biases are kept in float32."""
    case, inner = CASES[1], 64
    assert (case.hidden, case.intermediate) == (64, 32)
    weights = random_weights(case, "mxfp4", torch.bfloat16, "cpu")
    values = case.experts * (2 * inner * case.hidden + case.hidden * inner) // 2
    scales = case.experts * (2 * inner * case.hidden + case.hidden * inner) // 32
    biases = 4 * case.experts * (2 * inner + case.hidden)
    assert backend.pack(weights, case.activation).nbytes == values + scales + biases


def test_bits_follow_the_batch_unless_asked_otherwise(place: Path) -> None:
    """The stand-in cuts the contraction as the real one does, so the flag shows."""
    run_batches(HubExperts.configured(Hub(str(place), True)), BITS, "cpu", torch.bfloat16, (18, 2))
    with pytest.raises(AssertionError):
        run_batches(HubExperts.configured(Hub(str(place), False)), BITS, "cpu", torch.bfloat16, (18, 2))


def test_bits_do_not_follow_the_placement(backend: type[HubExperts]) -> None:
    """Tiles are chosen by all experts of the layer, not by those that are here."""
    run_placements(backend, BITS, "cpu", torch.bfloat16)


def test_an_older_package(place: Path, tmp_path: Path) -> None:
    """One that cannot be told how many rows to expect is not told."""
    written(tmp_path)
    (file,) = tmp_path.rglob("__init__.py")
    source = file.read_text().replace("    expected_tokens_per_expt: int | None = None\n", "")
    file.write_text(source.replace("routing_data.expected_tokens_per_expt or ", ""))
    run_case(HubExperts.configured(Hub(str(tmp_path))), "mxfp4", BITS, "cpu", torch.bfloat16)


def test_what_it_refuses(place: Path) -> None:
    backend, case = HubExperts.configured(Hub(str(place))), CASES[1]
    other = replace(case.activation, up_offset=0.0)
    mistakes = {
        "experts=hub runs quant=mxfp4, not quant=bf16: choose": ("bf16", torch.bfloat16, case.activation),
        "experts=hub computes in bfloat16, and this model in float32: set": ("mxfp4", torch.float32, case.activation),
        r"gate · \(up \+ 1\), and this model's adds 0: choose": ("mxfp4", torch.bfloat16, other),
    }
    for said, (format, dtype, activation) in mistakes.items():
        with pytest.raises(UserError, match=said):
            backend.pack(random_weights(case, format, dtype, "cpu"), activation)


def test_kernels_that_do_not_run_here(tmp_path: Path) -> None:
    """They are tried when weights are packed; too little memory stays what it is."""
    written(tmp_path)
    (file,) = tmp_path.rglob("__init__.py")
    file.write_text(file.read_text() + "\ndef fails(*args, **named):\n    raise ERROR\nmatmul_ogs.matmul_ogs = fails\n")
    backend, case = HubExperts.configured(Hub(str(tmp_path))), CASES[1]
    weights = random_weights(case, "mxfp4", torch.bfloat16, "cpu")
    package = kernel_package(str(tmp_path))
    package.ERROR = AssertionError("no driver\nof any kind")
    with pytest.raises(UserError, match=r"does not run on cpu \(AssertionError: no driver\): choose other experts="):
        backend.pack(weights, case.activation)
    package.ERROR = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        backend.pack(weights, case.activation)


# ---- a whole model ---------------------------------------------------------------------------------------------------


def hidden_states(mine: Ranks, place: str, bitwise: bool, combine: str) -> torch.Tensor:
    """The embedded model's experts, layer by layer, on rows of its own embedding."""
    choices = Choices(experts="hub", combine=combine, dtype="bfloat16", hub=Hub(place, bitwise))
    model, report = load(Checkpoint.open(DEMO), mine, choices, progress=False)
    assert report.experts == "hub" and report.waits == ("router=reference",)
    rows = []
    for layer in model.moe_layers():
        x_TH = torch.randn(37, layer.router.in_features, generator=torch.Generator().manual_seed(4)).bfloat16()
        owed = layer.routed(x_TH, layer.router(x_TH))
        rows.append(owed.add_to(torch.zeros_like(x_TH), layer.norm)[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("combine", "sizes"),
    [("slots", (3,)), *(pytest.param(each, (2,), marks=pytest.mark.slow) for each in ("slots", "all_reduce"))],
)
def test_ranks(place: Path, combine: str, sizes: tuple[int, ...]) -> None:
    """Two and three ranks have the bits of one where rows travel, and are close to them where sums do."""
    with torch.inference_mode():
        alone = hidden_states(rank_of(0, 1), str(place), True, combine)
    for size in sizes:
        for mine in run_ranks(in_inference, size, str(place), combine):
            if combine == "slots":
                assert torch.equal(mine, alone)
            assert (mine - alone).norm() <= TOLERANCE[torch.bfloat16] * alone.norm()


def in_inference(mine: Ranks, place: str, combine: str) -> torch.Tensor:
    with torch.inference_mode():
        return hidden_states(mine, place, True, combine)
