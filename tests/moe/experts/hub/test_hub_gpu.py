"""experts=hub with the community's own kernels, on a GPU: rows, bits, ranks' slots, graphs. Skipped where none are.

They are found as `hub.kernel` finds them by default: in the Hub's cache, by the network, or by
LOCAL_KERNELS=kernels-community/gpt-oss-triton-kernels=DIRECTORY.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from epmoe.config.schema import Hub
from epmoe.errors import UserError
from epmoe.formats.mxfp4 import encode
from epmoe.moe.experts.hub import HubExperts
from epmoe.moe.experts.hub.kernel import kernel_package
from epmoe.moe.experts.triton import TritonExperts
from epmoe.moe.router import Dispatch
from scripts.bench.expert_cases import (
    CASES,
    TOLERANCE,
    Case,
    dispatched,
    of_experts,
    random_input,
    random_weights,
    relative_error,
)
from tests.moe.experts.test_experts import run_batches, run_case, run_placements, run_round_trip

pytestmark = pytest.mark.gpu

GPT_OSS_20B = Case("gpt-oss-20b", tokens=1, hidden=2880, intermediate=2880, experts=32, top_k=4)
BITS = Case("bits", tokens=700, hidden=672, intermediate=352, experts=8, top_k=4)
OURS = [case for case in CASES if case.activation.up_offset == 1]
TOKENS = [1, 2, 7, 33, 250, 1500]  # the contraction in parts, and in one; every tile


@pytest.fixture(scope="module")
def package() -> Any:
    try:
        return kernel_package(Hub().kernel)
    except UserError as error:
        pytest.skip(f"the kernels are not here: {error}")


@pytest.fixture(scope="module", params=[False, True], ids=["by size", "bitwise"])
def backend(request: pytest.FixtureRequest, package: Any) -> type[HubExperts]:
    return HubExperts.configured(Hub(bitwise=request.param))


@pytest.fixture(scope="module")
def bitwise(package: Any) -> type[HubExperts]:
    return HubExperts.configured(Hub(bitwise=True))


@pytest.mark.parametrize("case", OURS, ids=str)
@pytest.mark.parametrize("backend", [False], indirect=True, ids=["by size"])
def test_forward(backend: type[HubExperts], case: Case) -> None:
    """The layer's equations, at every edge of shape and routing."""
    run_case(backend, "mxfp4", case, "cuda", torch.bfloat16)


@pytest.mark.parametrize("case", OURS[2::4], ids=str)
def test_forward_with_one_tile(bitwise: type[HubExperts], case: Case) -> None:
    run_case(bitwise, "mxfp4", case, "cuda", torch.bfloat16)


def real_input(tokens: int) -> tuple[torch.Tensor, Dispatch]:
    x_TH, logits_TE = random_input(replace(GPT_OSS_20B, tokens=tokens), torch.bfloat16, "cuda")
    return x_TH, dispatched(GPT_OSS_20B, logits_TE)


def test_real_shapes(backend: type[HubExperts]) -> None:
    """gpt-oss-20b's layer as experts=triton computes it: both round h and the result, each by half a step."""
    weights = random_weights(GPT_OSS_20B, "mxfp4", torch.bfloat16, "cuda")
    ours, theirs = (each.pack(weights, GPT_OSS_20B.activation) for each in (TritonExperts, backend))
    for tokens in TOKENS:
        x_TH, dispatch = real_input(tokens)
        error = relative_error(theirs.forward(x_TH, dispatch), ours.forward(x_TH, dispatch))
        assert error <= TOLERANCE[torch.bfloat16], f"{tokens} tokens: relative error {error:.1e}"


def test_two_ranks_slots_on_one_gpu(backend: type[HubExperts]) -> None:
    """Each half of the experts gives its own slots' rows, and zeros for the other's: together the rows of one rank."""
    weights, ids = random_weights(GPT_OSS_20B, "mxfp4", torch.bfloat16, "cuda"), tuple(range(32))
    whole = backend.pack(of_experts(weights, ids), GPT_OSS_20B.activation)
    halves = [(half, backend.pack(of_experts(weights, half), GPT_OSS_20B.activation)) for half in (ids[:16], ids[16:])]
    for tokens in TOKENS:
        x_TH, logits_TE = random_input(replace(GPT_OSS_20B, tokens=tokens), torch.bfloat16, "cuda")
        wanted_TKH = whole.forward(x_TH, dispatched(GPT_OSS_20B, logits_TE))
        rows = [part.forward(x_TH, dispatched(GPT_OSS_20B, logits_TE, half)) for half, part in halves]
        assert not (rows[0].any(-1) & rows[1].any(-1)).any(), f"{tokens} tokens: a slot has two owners"
        error = relative_error(rows[0] + rows[1], wanted_TKH)
        assert error <= TOLERANCE[torch.bfloat16], f"{tokens} tokens: relative error {error:.1e}"
        if backend.settings.bitwise:
            assert torch.equal(rows[0] + rows[1], wanted_TKH), f"{tokens} tokens: other bits"


@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_bits_do_not_follow_the_placement(bitwise: type[HubExperts], tokens: int) -> None:
    run_placements(bitwise, replace(BITS, tokens=tokens), "cuda", torch.bfloat16)


def test_bits_do_not_follow_the_batch(bitwise: type[HubExperts]) -> None:
    run_batches(bitwise, BITS, "cuda", torch.bfloat16, (1, 16, 130))


def test_pack_round_trip(backend: type[HubExperts]) -> None:
    run_round_trip(backend, "cuda")


@pytest.mark.parametrize("tokens", [1, 64])
def test_graphs(backend: type[HubExperts], tokens: int) -> None:
    """A captured call gives the bits of a plain one for other tokens and another routing; nothing waits."""
    weights = random_weights(GPT_OSS_20B, "mxfp4", torch.bfloat16, "cuda")
    experts, (x_TH, dispatch) = backend.pack(weights, GPT_OSS_20B.activation), real_input(tokens)
    other_TH, logits_TE = random_input(replace(GPT_OSS_20B, tokens=2 * tokens), torch.bfloat16, "cuda")
    other = dispatched(GPT_OSS_20B, logits_TE[tokens:])
    experts.forward(x_TH, dispatch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts.forward(x_TH, dispatch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TKH = experts.forward(x_TH, dispatch)
    x_TH.copy_(other_TH[tokens:])
    for name in ("expert_TK", "weight_TK", "offset_L1", "slot_R", "row_S"):
        getattr(dispatch, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(y_TKH, experts.forward(x_TH, dispatch))


def test_rounding_up_is_theirs(package: Any) -> None:
    """quant.scale=up has the bytes of the package's own conversion, whatever the group's size."""
    generator = torch.Generator().manual_seed(6)
    exponent = torch.randint(-100, 100, (4000, 1), generator=generator)
    value = torch.ldexp(torch.randn(4000, 96, generator=generator), exponent).to("cuda", torch.bfloat16)
    code, scale = package.numerics_details.mxfp.downcast_to_mxfp_torch(value, torch.uint8, axis=-1)
    blocks, scales = encode(value, scale="up")
    assert torch.equal(blocks.flatten(1), code) and torch.equal(scales, scale)
