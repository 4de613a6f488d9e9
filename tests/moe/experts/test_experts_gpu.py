"""Expert backends on a GPU: every case, gpt-oss's real shapes, bits, memory, graphs, and the inline PTX."""

from dataclasses import replace

import pytest
import torch

from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.kernels.gpu import generation
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.experts.triton import TritonExperts
from epmoe.moe.experts.triton.products import down, down_torch, gate_up, gate_up_torch
from epmoe.moe.experts.triton.tiles import TILES, ExpertTile, table, tile_for
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
from tests.moe.experts.test_experts import BACKENDS, run_batches, run_case, run_decode, run_nan, run_placements

pytestmark = pytest.mark.gpu

GPT_OSS_20B = Case("gpt-oss-20b", tokens=1, hidden=2880, intermediate=2880, experts=32, top_k=4)
# T·K/E of 1/2 (alone) to 350 (all), beyond the limits of all tiles but the last
ACROSS_TILES = Case("across tiles", tokens=700, hidden=288, intermediate=416, experts=8, top_k=4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Every backend computes the layer's equations, at every edge of shape and routing."""
    run_case(backend, "mxfp4", case, "cuda", dtype)


def test_nan_scales_reach_the_output() -> None:
    """A NaN weight is seen in the rows of its expert: minima and clamps must not swallow it."""
    run_nan("cuda")


@pytest.mark.parametrize("ptx", [True, False])
@pytest.mark.parametrize("wide", [False, True])
def test_decoding(wide: bool, ptx: bool) -> None:
    """PTX and its integer twin, on all bytes × all scale bytes, equal quant.mxfp4 bit by bit; so each other."""
    run_decode("cuda", wide, ptx)


@pytest.fixture(scope="module")
def real() -> tuple[TritonExperts, ReferenceExperts]:
    """One layer of gpt-oss-20b in both backends."""
    weights = random_weights(GPT_OSS_20B, "mxfp4", torch.bfloat16, "cuda")
    activation = GPT_OSS_20B.activation
    return TritonExperts.pack(weights, activation), ReferenceExperts.pack(weights, activation)


def real_input(tokens: int) -> tuple[torch.Tensor, Dispatch]:
    x_TH, logits_TE = random_input(replace(GPT_OSS_20B, tokens=tokens), torch.bfloat16, "cuda")
    return x_TH, dispatched(GPT_OSS_20B, logits_TE)


@pytest.mark.parametrize("tokens", [1, 7, 64, 128, 250, 1500])  # every tile
def test_real_shapes(tokens: int, real: tuple[TritonExperts, ReferenceExperts]) -> None:
    """gpt-oss-20b's layer in bfloat16 against the float32 reference; h and the result are rounded to 8 bits each."""
    fast, reference = real
    x_TH, dispatch = real_input(tokens)
    actual_TKH, wanted_TKH = fast.forward(x_TH, dispatch), reference.forward(x_TH.float(), dispatch)
    assert relative_error(actual_TKH, wanted_TKH) <= TOLERANCE[torch.bfloat16]
    rows = (actual_TKH - wanted_TKH).norm(dim=-1) / wanted_TKH.norm(dim=-1)
    assert rows.max() <= 2 * TOLERANCE[torch.bfloat16], f"slot {int(rows.argmax())} is off by {rows.max():.1e}"


@pytest.mark.parametrize("tokens", [3, 200])
def test_each_product_has_a_torch_twin(tokens: int, real: tuple[TritonExperts, ReferenceExperts]) -> None:
    """The two products apart, so that a failure of the layer names its half."""
    fast, _ = real
    x_TH, dispatch = real_input(tokens)
    first = (x_TH, fast.gate_up, fast.gate_up_bias_LN, dispatch, fast.activation)
    h_RI, wanted_RI = gate_up(*first), gate_up_torch(*first)
    # both round once, so they differ where float32 sums fall on two sides of a bf16 midpoint
    assert relative_error(h_RI, wanted_RI) <= 1e-3
    second = (wanted_RI, fast.down, fast.down_bias_LH, dispatch)
    assert relative_error(down(*second), down_torch(*second)) <= 1e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_bits_do_not_follow_the_placement(tokens: int, dtype: torch.dtype) -> None:
    """A slot's row has the same bits whichever other experts live on the rank, at each tile size."""
    case = Case("placement", tokens=tokens, hidden=672, intermediate=352, experts=8, top_k=4)
    run_placements("triton", case, "cuda", dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bits_do_not_follow_the_batch(dtype: torch.dtype) -> None:
    """A token alone (a decode step) has the bits that it has in a large batch (a prefill), at any place in it."""
    case = ACROSS_TILES
    mine = generation(torch.device("cuda", 0))
    tiles = table(torch.bfloat16, mine)
    counts = [int(limit * case.experts) // case.top_k for limit, _ in tiles[:-1]]  # the most that a tile serves
    chosen = [tile_for(torch.bfloat16, tokens * case.top_k, case.experts, mine) for tokens in (*counts, case.tokens)]
    assert chosen == [tile for _, tile in tiles]
    run_batches("triton", case, "cuda", dtype, counts)


def test_all_tiles_add_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the groups of columns have large terms that cancel in pairs: another order would show in most rows."""
    case = Case("order", tokens=600, hidden=2880, intermediate=2880, experts=4, top_k=2)
    weights = random_weights(case, "mxfp4", torch.bfloat16, "cuda")
    assert isinstance(weights.gate_up, Mxfp4Matrix)
    blocks_LNG16, scales_LNG = weights.gate_up.blocks_LNG16, weights.gate_up.scales_LNG
    groups = scales_LNG.shape[2]
    one_P, other_P = torch.randperm(groups, generator=torch.Generator().manual_seed(0))[: groups // 4 * 2].chunk(2)
    blocks_LNG16[:, :, other_P] = blocks_LNG16[:, :, one_P] ^ 0x88  # the same values with other signs
    scales_LNG[:, :, other_P] = scales_LNG[:, :, one_P]
    experts = TritonExperts.pack(weights, case.activation)
    x_TH, _ = random_input(case, torch.bfloat16, "cuda")
    x_TGV = x_TH.view(case.tokens, groups, -1)
    x_TGV[:, one_P] *= 4096
    x_TGV[:, other_P] = x_TGV[:, one_P]
    dispatch = dispatched(case, torch.randn(case.tokens, case.experts, device="cuda"))
    found = []
    for _, tile in table(torch.bfloat16, generation(torch.device("cuda", 0))):
        monkeypatch.setitem(TILES, torch.bfloat16, {0: ((float("inf"), tile),)})
        found.append(gate_up(x_TH, experts.gate_up, experts.gate_up_bias_LN, dispatch, case.activation))
    assert found[0].isfinite().all() and found[0].any(1).all()
    assert all(torch.equal(each, found[0]) for each in found)


# Both products of gpt-oss, whose columns end with one pair; columns that end with half a pair, and whole runs alone,
# with scales that need the wide decoding, one of them NaN; weight rows of which 192 and 224 are left for the last tile
# of 256, and columns that end within a run. A case compiles eight kernels, seconds each.
@pytest.mark.parametrize(("hidden", "intermediate", "wide"), [(2880, 2880, False), (544, 512, True), (480, 480, False)])
def test_hopper_kernels_give_the_same_bits(
    hidden: int, intermediate: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever columns end a row, narrow and wide scales; experts of 0, 1, 16, 17, 33, 64, 65 … rows."""
    if generation(torch.device("cuda", 0)) != 9:
        pytest.fail("this GPU is no Hopper: its table has no such kernels")
    case = Case("many rows", tokens=1500, hidden=hidden, intermediate=intermediate, experts=15, top_k=4)
    weights = random_weights(case, "mxfp4", torch.bfloat16, "cuda")
    assert isinstance(weights.gate_up, Mxfp4Matrix) and isinstance(weights.down, Mxfp4Matrix)
    if wide:
        weights.down.scales_LNG[3, 5:9] = 130
        weights.gate_up.scales_LNG[2, 0] = 255
    experts = TritonExperts.pack(weights, case.activation)
    assert experts.gate_up.wide == experts.down.wide == wide
    x_TH, _ = random_input(case, torch.bfloat16, "cuda")
    logits_TE = torch.full((case.tokens, case.experts), -1e4, device="cuda")
    # Rows of experts 1 to 11; 0 takes ties, 12 to 14 nearly all tokens.
    counts = (0, 1, 16, 17, 33, 64, 65, 96, 97, 128, 257)
    begin = 0
    for expert, count in enumerate(counts, 1):
        logits_TE[begin : begin + count, expert] = 100.0
        begin += count
    logits_TE[:, 12:] += 2e4 * (1 + torch.rand(case.tokens, 3, device="cuda"))
    dispatch = dispatched(case, logits_TE)
    assert dispatch.offset_L1.diff()[1:12].tolist() == list(counts)
    found = []
    for tile in ("128x32x64x4x3", *(f"hopper:{each}" for each in ("256x128x64x8x2", "128x96x64x4x2", "128x32x64x4x2"))):
        monkeypatch.setitem(TILES, torch.bfloat16, {0: ((float("inf"), ExpertTile.parse(tile)),)})
        h_RI = gate_up(x_TH, experts.gate_up, experts.gate_up_bias_LN, dispatch, case.activation)
        found.append((h_RI, down(h_RI, experts.down, experts.down_bias_LH, dispatch)))
    for plain, *fast in zip(*found, strict=True):
        assert all(torch.equal(each.view(torch.int16), plain.view(torch.int16)) for each in fast)


def test_offsets_beyond_31_bits() -> None:
    """Rows whose offset in the output passes 2^31 are right: the last tokens have the bits that they have alone."""
    case = Case("large", tokens=190_000, hidden=2880, intermediate=32, experts=4, top_k=4)
    experts = TritonExperts.pack(random_weights(case, "mxfp4", torch.bfloat16, "cuda"), case.activation)
    x_TH, logits_TE = random_input(case, torch.bfloat16, "cuda")
    y_TKH = experts.forward(x_TH, dispatched(case, logits_TE))
    assert y_TKH.numel() > 2**31
    few_TKH = experts.forward(x_TH[-5:], dispatched(case, logits_TE[-5:]))
    assert few_TKH.any() and torch.equal(y_TKH[-5:], few_TKH)


@pytest.mark.usefixtures("settled_device")
def test_memory_is_packed_bytes_and_workspace() -> None:
    """No dequantised copy, ever: a layer's memory is its packed bytes; a forward adds h and y and nothing else."""
    case = replace(GPT_OSS_20B, tokens=600, experts=8)
    start = torch.cuda.memory_allocated()
    weights = random_weights(case, "mxfp4", torch.bfloat16, "cuda")
    stored = torch.cuda.memory_allocated() - start
    torch.cuda.reset_peak_memory_stats()
    experts = TritonExperts.pack(weights, case.activation)
    # the packed copy, and temporaries of four experts' gate_up: at most 3 bytes a byte of it
    temporary = 3 * weights.gate_up.nbytes // case.experts * 4
    assert torch.cuda.max_memory_allocated() - start <= stored + experts.nbytes + temporary
    assert experts.nbytes <= 1.01 * stored
    del weights
    x_TH, logits_TE = random_input(case, torch.bfloat16, "cuda")
    dispatch = dispatched(case, logits_TE)
    experts.forward(x_TH, dispatch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert before - start <= 1.01 * experts.nbytes + 2 * (x_TH.nbytes + logits_TE.nbytes) + (1 << 20)
    torch.cuda.reset_peak_memory_stats()
    experts.forward(x_TH, dispatch)
    workspace = case.tokens * case.top_k * (case.intermediate + case.hidden) * 2
    assert torch.cuda.max_memory_allocated() - before <= workspace + (1 << 20)


@pytest.mark.parametrize("ids", [tuple(range(8)), (1, 4, 6)], ids=["all local", "some local"])
def test_no_host_synchronisation_and_graphs(ids: tuple[int, ...]) -> None:
    """A captured forward follows new tokens and a new routing: the schedule is made on the device."""
    case = Case("graph", tokens=24, hidden=288, intermediate=160, experts=8, top_k=4, local=ids)
    weights = random_weights(case, "mxfp4", torch.bfloat16, "cuda")
    experts = TritonExperts.pack(of_experts(weights, ids), case.activation)
    x_TH, logits_TE = random_input(case, torch.bfloat16, "cuda")
    dispatch = dispatched(case, logits_TE)
    experts.forward(x_TH, dispatch)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts.forward(x_TH, dispatch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TKH = experts.forward(x_TH, dispatch)
    for shift in range(1, 4):
        other = dispatched(case, logits_TE.roll(shift, 1))
        for name in ("expert_TK", "weight_TK", "offset_L1", "slot_R", "row_S"):
            getattr(dispatch, name).copy_(getattr(other, name))
        x_TH.copy_(x_TH.roll(1, 0))
        graph.replay()
        assert torch.equal(y_TKH, experts.forward(x_TH, other))
