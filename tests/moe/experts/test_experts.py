"""Expert backends against the equations in float64; layouts; bits that depend on neither batch nor placement."""

from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from interpret import interpreted

from epmoe.errors import UserError
from epmoe.formats import FORMATS, ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix, decode
from epmoe.moe.experts import EXPERTS, Experts
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.experts.triton.words import WordMatrix, words_to_values
from epmoe.tables import lookup
from scripts.bench.expert_cases import (
    CASES,
    TOLERANCE,
    Case,
    dispatched,
    expected,
    of_experts,
    random_input,
    random_weights,
    relative_error,
)

BACKENDS = [name for name in EXPERTS if name != "hub"]  # which has bfloat16 alone: tests/moe/experts/hub/


def class_of(backend: str | type[Experts]) -> type[Experts]:
    """A name of the table, or the class itself."""
    return lookup("experts", EXPERTS, backend) if isinstance(backend, str) else backend


def run_case(backend: str | type[Experts], format: str, case: Case, device: str, dtype: torch.dtype) -> None:
    """One forward of one backend against the equations; other ranks' slots are exact zeros."""
    weights = random_weights(case, format, dtype, device)
    x_TH, logits_TE = random_input(case, dtype, device)
    dispatch = dispatched(case, logits_TE)
    experts = class_of(backend).pack(of_experts(weights, case.ids), case.activation)
    y_TKH = experts.forward(x_TH, dispatch)
    assert y_TKH.shape == (case.tokens, case.top_k, case.hidden) and y_TKH.dtype == dtype
    wanted_TKH = expected(x_TH, weights, dispatch, case.ids, case.activation)
    assert not y_TKH[wanted_TKH == 0].any(), "a slot of another rank is not zero"
    error = relative_error(y_TKH, wanted_TKH)
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"
    given_TKH = torch.zeros_like(y_TKH)
    assert experts.forward(x_TH, dispatch, given_TKH) is given_TKH and torch.equal(given_TKH, y_TKH)


def on_cpu(backend: str, function, *args):
    """Triton's kernels run on a CPU only in its interpreter."""
    return interpreted(function, backend, *args) if backend == "triton" else function(backend, *args)


def run_cases(backend: str, format: str, cases: tuple[Case, ...], dtype: torch.dtype) -> None:
    for case in cases:
        run_case(backend, format, case, "cpu", dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend: str, case: Case) -> None:
    """Every backend computes the layer's equations, at every edge of shape and routing."""
    on_cpu(backend, run_case, "mxfp4", case, "cpu", torch.float32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_formats(backend: str, format: str) -> None:
    """A backend runs each format that it names and refuses the others with the names of its own."""
    on_cpu(backend, run_format, format)


def run_format(backend: str, format: str) -> None:
    formats = class_of(backend).formats
    if format in formats:
        run_case(backend, format, CASES[1], "cpu", torch.float32)
    else:
        with pytest.raises(UserError, match="|".join(formats)):
            run_case(backend, format, CASES[1], "cpu", torch.float32)


def test_reference_in_bf16() -> None:
    """bfloat16 in and out, float32 between."""
    for case in CASES:
        run_case("reference", "mxfp4", case, "cpu", torch.bfloat16)


def test_reference_decodes_large_layers_on_the_fly() -> None:
    """The bits do not tell whether the decoded values were kept; the memory does."""
    case = CASES[-2]
    weights = random_weights(case, "mxfp4", torch.float32, "cpu")
    x_TH, logits_TE = random_input(case, torch.float32, "cpu")
    kept = ReferenceExperts.pack(weights, case.activation)
    decoding = ReferenceExperts(weights, case.activation, held_bytes=0)
    assert decoding.nbytes == weights.gate_up.nbytes + weights.down.nbytes + 4 * 4 * (64 + 64) < kept.nbytes
    dispatch = dispatched(case, logits_TE)
    assert torch.equal(kept.forward(x_TH, dispatch), decoding.forward(x_TH, dispatch))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pack_round_trip(backend: str) -> None:
    """`unpack` gives back every byte, for even and odd numbers of groups."""
    on_cpu(backend, run_round_trip)


def run_round_trip(backend: str | type[Experts], device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(3)
    for hidden, inter, experts in ((32, 32, 1), (96, 64, 5), (128, 160, 2), (544, 448, 2)):
        matrices = [
            Mxfp4Matrix(
                torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator),
                torch.randint(0, 256, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator),
            )
            for rows, columns in ((2 * inter, hidden), (hidden, inter))
        ]
        biases = [torch.randn(experts, m.shape[1], generator=generator).to(device, torch.bfloat16) for m in matrices]
        matrices = [matrix.to(torch.device(device)) for matrix in matrices]
        weights = ExpertWeights(matrices[0], biases[0], matrices[1], biases[1])
        packed = class_of(backend).pack(of_experts(weights, tuple(range(experts))), CASES[0].activation)
        back = packed.unpack()
        for a, b in ((back.gate_up, weights.gate_up), (back.down, weights.down)):
            assert isinstance(a, Mxfp4Matrix) and isinstance(b, Mxfp4Matrix) and a.shape == b.shape
            assert torch.equal(a.blocks_LNG16, b.blocks_LNG16) and torch.equal(a.scales_LNG, b.scales_LNG)
        assert torch.equal(back.gate_up_bias_LN, biases[0]) and torch.equal(back.down_bias_LH, biases[1])


# ---- bits ----------------------------------------------------------------------------------------------------------

BITS = Case("bits", tokens=37, hidden=96, intermediate=64, experts=5, top_k=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_follow_the_placement(backend: str) -> None:
    """A slot's row has the same bits whichever other experts live on the rank."""
    case = Case("placement", tokens=6, hidden=96, experts=4) if backend == "triton" else BITS
    on_cpu(backend, run_placements, case, "cpu", torch.float32)


def run_placements(backend: str | type[Experts], case: Case, device: str, dtype: torch.dtype) -> None:
    weights = random_weights(case, "mxfp4", dtype, device)
    x_TH, logits_TE = random_input(case, dtype, device)
    pack = class_of(backend).pack
    whole_TKH = pack(of_experts(weights, case.ids), case.activation).forward(x_TH, dispatched(case, logits_TE))
    for ranks in ([(e,) for e in case.ids], [case.ids[:2], case.ids[2:]], [case.ids[0::2], case.ids[1::2]]):
        parts = [
            pack(of_experts(weights, ids), case.activation).forward(x_TH, dispatched(case, logits_TE, ids))
            for ids in ranks
        ]
        for ids, part_TKH in zip(ranks, parts, strict=True):
            mine_TK = torch.isin(dispatched(case, logits_TE).expert_TK, torch.tensor(ids, device=device))
            assert torch.equal(part_TKH[mine_TK], whole_TKH[mine_TK]) and not part_TKH[~mine_TK].any()


def run_batches(
    backend: str | type[Experts], case: Case, device: str, dtype: torch.dtype, counts: Sequence[int]
) -> None:
    """A token alone, in the whole batch, at other places of a shuffled batch, and in the first so many tokens."""
    weights = random_weights(case, "mxfp4", dtype, device)
    x_TH, logits_TE = random_input(case, dtype, device)
    experts = class_of(backend).pack(of_experts(weights, case.ids), case.activation)
    whole_TKH = experts.forward(x_TH, dispatched(case, logits_TE))
    for t in range(0, case.tokens, 1 + case.tokens // 16):
        alone_1KH = experts.forward(x_TH[t : t + 1], dispatched(case, logits_TE[t : t + 1]))
        assert torch.equal(alone_1KH[0], whole_TKH[t]), f"token {t} alone"
    for seed in range(3):
        order_T = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(seed)).to(device)
        shuffled_TKH = experts.forward(x_TH[order_T], dispatched(case, logits_TE[order_T]))
        assert torch.equal(shuffled_TKH, whole_TKH[order_T])
    for count in counts:
        some_TKH = experts.forward(x_TH[:count], dispatched(case, logits_TE[:count]))
        assert torch.equal(some_TKH, whole_TKH[:count]), f"the first {count} tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "intermediate"), [(96, 64), (160, 32), (288, 416)])
def test_bits_do_not_follow_the_batch(hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    """The reference's rows keep their bits alone, in any batch and at any place of a tile (one thread, as at run time).

    Fails without the fixed tiles: a library picks another summation for 1 row than for 37.
    """
    assert torch.get_num_threads() == 1
    case = Case("batch", tokens=37, hidden=hidden, intermediate=intermediate, experts=5, top_k=3)
    run_batches("reference", case, "cpu", dtype, (18, 2))


# ---- codes and scales ----------------------------------------------------------------------------------------------


@triton.jit
def decode_kernel(word_ptr, scale_ptr, value_ptr, WIDE: tl.constexpr, PTX: tl.constexpr):
    """Program (run, strip): a run of 256 columns of 64 rows, 64 words and 2 scale words each → 4 runs of 64 values."""
    run, runs, strip = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    n_N, i_64 = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    word = tl.load(word_ptr + ((strip * runs + run) * 64 + n_N) * 64 + i_64)
    # As in the products: a scale word for 32 words, so that the two of a register share it.
    scale_N2 = tl.load(scale_ptr + ((strip * runs + run) * 2 + tl.arange(0, 2)[None, :]) * 64 + n_N)
    scale = tl.reshape(tl.broadcast_to(scale_N2[:, :, None], (64, 2, 32)), (64, 64))
    for j in tl.static_range(4):
        values = words_to_values(word, scale, j, WIDE, PTX)
        tl.store(value_ptr + ((strip * 64 + n_N) * runs + run) * 256 + 64 * j + i_64, values)


def run_decode(device: str, wide: bool, ptx: bool) -> None:
    """Every byte under every scale byte (without `wide`, those up to 128), compared bit by bit with quant.mxfp4."""
    scales = 256 if wide else 129
    scale_NG = (torch.arange(256)[:, None] + 37 * torch.arange(16)).remainder(scales).to(torch.uint8)
    block_NG16 = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    matrix = WordMatrix.pack(Mxfp4Matrix(block_NG16[None].to(device), scale_NG[None].to(device)))
    assert matrix.wide == wide
    value_NC = torch.empty(256, 512, dtype=torch.bfloat16, device=device)
    decode_kernel[(2, 4)](matrix.word_LZX, matrix.scale_LZVB, value_NC, WIDE=wide, PTX=ptx)
    wanted_NC = decode(block_NG16, scale_NG, torch.bfloat16).to(device)
    nan_NC = wanted_NC.isnan()
    assert torch.equal(value_NC.isnan(), nan_NC)
    assert torch.equal(value_NC.view(torch.int16)[~nan_NC], wanted_NC.view(torch.int16)[~nan_NC])


@pytest.mark.parametrize("wide", [False, True])
def test_integer_decoding(wide: bool) -> None:
    """All 256 bytes × all scale bytes: ±0, subnormals, overflow to infinity, NaN."""
    interpreted(run_decode, "cpu", wide, False)


def test_nan_scales_reach_the_output() -> None:
    """A NaN weight is seen in the rows of its expert: minima and clamps must not swallow it."""
    interpreted(run_nan, "cpu")


def run_nan(device: str) -> None:
    case = CASES[1]
    for backend in BACKENDS:
        for column, name in ((0, "gate"), (1, "up")):
            weights = random_weights(case, "mxfp4", torch.float32, device)
            assert isinstance(weights.gate_up, Mxfp4Matrix)
            weights.gate_up.scales_LNG[:, column] = 255
            x_TH, logits_TE = random_input(case, torch.float32, device)
            experts = class_of(backend).pack(weights, case.activation)
            assert experts.forward(x_TH, dispatched(case, logits_TE)).isnan().all(), f"{backend} {name}"
