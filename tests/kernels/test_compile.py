"""The experts' and the router's kernels, compiled without a GPU for three generations: no spills on sm_90.

sm_80 is Ampere, sm_90 Hopper, sm_100 Blackwell. The tiles were chosen on Hopper, so spills elsewhere are only told: the
table at the end of the test run has every kernel's registers, spills and shared memory.
"""

from typing import Any

import pytest
import torch
import triton.language as tl
from compile_sm90 import MOST_SHARED, MOST_TENSOR, compile_kernel

from epmoe.moe.experts.triton import hopper_kernels
from epmoe.moe.experts.triton.hopper import sizes
from epmoe.moe.experts.triton.hopper_product import BLOCK, RUN, WORDS
from epmoe.moe.experts.triton.kernels import down_kernel, gate_up_kernel, gather_kernel
from epmoe.moe.experts.triton.tiles import TILES, ExpertTile, table
from epmoe.moe.experts.triton.words import STRIP
from epmoe.moe.router.triton import launch as router
from tests.moe.experts.test_experts import decode_kernel

DTYPES = {torch.bfloat16: ("*bf16", tl.bfloat16), torch.float32: ("*fp32", tl.float32)}
ON_HOPPER = list(dict.fromkeys((dtype, tile) for dtype in TILES for _, tile in table(dtype, 9)))
SHIPPED = [(dtype, tile) for dtype, tile in ON_HOPPER if tile.kernel == "triton"]
HOPPER = [tile for _, tile in ON_HOPPER if tile.kernel == "hopper"]
# generation → its tiles in bf16
OTHERS = {arch: [tile for _, tile in table(torch.bfloat16, arch // 10)] for arch in MOST_SHARED if arch != 90}


def compiled(
    kernel: Any,
    dtype: torch.dtype,
    tile: ExpertTile,
    *,
    local: int = 32,
    wide: bool = False,
    ptx: bool = True,
    arch: int = 90,
    columns: int = 2880,
) -> dict[str, int]:
    pointer, dot = DTYPES[dtype]
    types = {
        **dict.fromkeys(("x_ptr", "h_ptr", "y_ptr", "bias_ptr"), pointer),
        "word_ptr": "*i16",
        "scale_ptr": "*i32",
        **dict.fromkeys(("offset_ptr", "slot_ptr"), "*i32"),
        **dict.fromkeys(("alpha", "limit", "up_offset"), "fp32"),
        "weight_ptr": "*fp32",
    }
    constants = {"COLUMNS": columns, "LOCAL": local, "B": tile.weight_rows, "M": tile.tokens, "Q": tile.words}
    constants |= {"WIDE": wide, "PTX": ptx, "DOT": dot} | ({"PDL": arch >= 90} if kernel is gate_up_kernel else {})
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    sizes = ("hidden", "intermediate", "rows")  # multiples of 32, as MXFP4 demands
    cost = compile_kernel(kernel, signature, constants, tile.warps, tile.stages, arch, divisible=sizes)
    assert cost["shared"] <= MOST_SHARED[arch], "more shared memory than a block may have"
    # Blackwell's own. Of a kernel that needs more Triton leaves one instruction, a trap, and refuses to launch it.
    assert cost["tensor"] <= MOST_TENSOR, "more columns of tensor memory than a multiprocessor has"
    assert (cost["factors"] > 0) == ptx and cost["unlike"] == 0, "a register's two words have two scales"
    return cost


@pytest.mark.parametrize("kernel", [gate_up_kernel, down_kernel], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize(("dtype", "tile"), SHIPPED, ids=str)
def test_no_spills(kernel: Any, dtype: torch.dtype, tile: ExpertTile) -> None:
    """A spill in the inner loop is a silent loss of speed."""
    cost = compiled(kernel, dtype, tile)
    assert cost["spills"] == 0
    assert (cost["waits"], cost["early"]) == (kernel is gate_up_kernel, 0)
    # With 8 tokens Triton takes an older instruction; test_experts_gpu.py holds it to the same bits.
    assert (cost["wgmma"] > 0) == (dtype == torch.bfloat16 and tile.tokens > 8)
    if dtype == torch.bfloat16:
        assert compiled(kernel, dtype, tile, local=128, wide=True)["spills"] == 0


@pytest.mark.parametrize("kernel", [gate_up_kernel, down_kernel], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("arch", OTHERS)
def test_other_generations(kernel: Any, arch: int) -> None:
    """Each with its own table of tiles."""
    for tile in OTHERS[arch]:
        compiled(kernel, torch.bfloat16, tile, arch=arch)


@pytest.mark.parametrize("arch", MOST_SHARED)
def test_one_scale_a_register(arch: int) -> None:
    """In runs of 4, 2 and 1 pairs: `compiled` looks."""
    for dtype, tile in SHIPPED if arch == 90 else [(torch.bfloat16, tile) for tile in OTHERS[arch]]:
        compiled(down_kernel, dtype, tile, arch=arch, columns=448)


@pytest.mark.parametrize("kernel", [hopper_kernels.gate_up_kernel, hopper_kernels.down_kernel], ids=["gate_up", "down"])
@pytest.mark.parametrize(
    ("tile", "wide"),
    # Scales of any size: with each tile where there is time.
    [
        *((tile, False) for tile in HOPPER),
        (HOPPER[0], True),
        *(pytest.param(tile, True, marks=pytest.mark.slow) for tile in HOPPER[1:]),
    ],
    ids=str,
)
def test_hopper_kernels(tile: ExpertTile, kernel: Any, wide: bool) -> None:
    """Nothing spills, and the assembler lets the products run beside the conversions (it warns when it does not)."""

    def block(dtype: str, layout: Any, *shape: int) -> str:
        return f"tensordesc<{dtype}{list(shape)},{layout.value!r}>"

    found = sizes(tile)
    tokens, columns = found["M"], RUN // found["PIECES"]
    types = {
        **dict.fromkeys(("x_desc", "h_desc"), block("bf16", BLOCK, 1, 1, tokens, columns)),
        **dict.fromkeys(("x_half_desc", "h_half_desc"), block("bf16", BLOCK, 1, 1, tokens // 2, columns)),
        "word_desc": block("i16", WORDS, tile.weight_rows // STRIP, STRIP, 64),
        "word_half_desc": block("i16", WORDS, tile.weight_rows // STRIP // 2, STRIP, 64),
        **dict.fromkeys(("x_ptr", "h_ptr", "y_ptr", "bias_ptr"), "*bf16"),
        "word_ptr": "*i16",
        **dict.fromkeys(("scale_ptr", "offset_ptr", "slot_ptr"), "*i32"),
        **dict.fromkeys(("alpha", "limit", "up_offset"), "fp32"),
        "weight_ptr": "*fp32",
    }
    constants = {"COLUMNS": 2880, "LOCAL": 32, "B": tile.weight_rows, **found, "WIDE": wide, "PDL": True}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    cost = compile_kernel(kernel, signature, constants, tile.warps, divisible=("rows",))
    assert cost["spills"] == cost["serialized"] == cost["unlike"] == 0 and cost["wgmma"] > 0 < cost["factors"]
    assert cost["shared"] <= MOST_SHARED[90]
    # A wait for each way through the kernel. The words are on their way before it, and x is not.
    assert (cost["waits"], cost["early"], cost["copies"]) == (5 if found["MORE"] else 4, 0, 0)


def test_gather() -> None:
    """All that it reads comes from the kernel before it."""
    types = {
        **dict.fromkeys(("x_ptr", "out_ptr"), "*bf16"),
        **dict.fromkeys(("offset_ptr", "slot_ptr"), "*i32"),
        **dict.fromkeys(("num_local", "top_k"), "i32"),
    }
    cost = compile_kernel(gather_kernel, types, {"COLUMNS": 2880, "M": 4, "C": 1024, "PDL": True})
    assert (cost["spills"], cost["waits"], cost["early"], cost["loads"]) == (0, 1, 0, 0)


@pytest.mark.parametrize("wide", [False, True])
def test_the_kernel_that_compares_the_twins_pairs_words_as_the_products_do(wide: bool) -> None:
    """On all bytes and scale bytes (test_experts_gpu.py), which means something only where a register's words agree."""
    types = {"word_ptr": "*i16", "scale_ptr": "*i32", "value_ptr": "*bf16"}
    cost = compile_kernel(decode_kernel, types, {"WIDE": wide, "PTX": True})
    assert cost["factors"] > 0 and cost["unlike"] == 0


@pytest.mark.parametrize("arch", MOST_SHARED)
def test_a_half_of_two_factors_costs_nothing(arch: int) -> None:
    """A product reads it as it is: no instruction brings it to both halves of a register first (words.py)."""
    types = {"word_ptr": "*i16", "scale_ptr": "*i32", "value_ptr": "*bf16"}
    cost = compile_kernel(decode_kernel, types, {"WIDE": False, "PTX": True}, arch=arch, disassemble=True)
    assert cost["halves"] == cost["factors"] > 0


def test_compiles_without_ptx() -> None:
    """The integer twin of the inline PTX compiles too (what other devices run), and so does a rank's single expert."""
    for kernel in (gate_up_kernel, down_kernel):
        compiled(kernel, *SHIPPED[0], local=1, wide=True, ptx=False)


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize(("experts", "top_k"), [(32, 4), (128, 4)], ids=["20b", "120b"])
def test_router_on_other_generations(experts: int, top_k: int, arch: int) -> None:
    """test_router.py has Hopper."""
    types = {
        **dict.fromkeys(("expert_ptr", "local_ptr", "count_ptr", "offset_ptr", "slot_ptr", "row_ptr"), "*i32"),
        **dict.fromkeys(("tokens", "blocks", "num_local"), "i32"),
        "logits_ptr": "*bf16",
        "weight_ptr": "*fp32",
    }
    few, many = router.few_options(64, experts), router.tile_options(experts)
    for kernel, tile in ((router._few, few), (router._top_experts, many), (router._index, many)):
        assert tile
        constants = {"E": experts, "K": top_k, **tile, "PDL": arch >= 90}
        warps = constants.pop("num_warps")
        signature = {name: types[name] for name in kernel.arg_names if name not in constants}
        assert compile_kernel(kernel, signature, constants, warps, arch=arch)["spills"] == 0
