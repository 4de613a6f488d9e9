"""The expert kernels, compiled for sm_90 without a GPU at every tile that is shipped: no spills."""

import pytest
import torch
import triton.language as tl
from compile_sm90 import compile_kernel

from epmoe.experts.triton import TILES, Tile
from epmoe.experts.triton_kernels import down_kernel, gate_up_kernel

DTYPES = {torch.bfloat16: ("*bf16", tl.bfloat16), torch.float32: ("*fp32", tl.float32)}
SHIPPED = [(dtype, tile) for dtype, tiles in TILES.items() for _, tile in tiles]


def compiled(kernel, dtype: torch.dtype, tile: Tile, *, local: int, wide: bool, ptx: bool = True) -> dict[str, int]:
    pointer, dot = DTYPES[dtype]
    types = {
        **dict.fromkeys(("x_ptr", "h_ptr", "y_ptr", "bias_ptr"), pointer),
        **dict.fromkeys(("word_ptr", "scale_ptr"), "*i16"),
        **dict.fromkeys(("offset_ptr", "slot_ptr"), "*i32"),
        **dict.fromkeys(("alpha", "limit", "up_offset", "weight_ptr"), "fp32"),
        "weight_ptr": "*fp32",
    }
    constants = {"COLUMNS": 2880, "LOCAL": local, "B": tile.weight_rows, "M": tile.tokens, "Q": tile.words}
    constants |= {"WIDE": wide, "PTX": ptx, "DOT": dot}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    sizes = ("hidden", "intermediate", "rows")  # multiples of 32, as MXFP4 demands
    return compile_kernel(kernel, signature, constants, num_warps=tile.warps, num_stages=tile.stages, divisible=sizes)


@pytest.mark.parametrize("kernel", [gate_up_kernel, down_kernel], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize(("dtype", "tile"), SHIPPED, ids=str)
def test_no_spills(kernel, dtype: torch.dtype, tile: Tile) -> None:
    """A spill in the inner loop is a silent loss of speed; run with -s to see registers and shared memory."""
    for local, wide in ((32, False), (128, True)):
        cost = compiled(kernel, dtype, tile, local=local, wide=wide)
        print(f"{kernel.__name__} {dtype} {tile} L={local} wide={wide}: {cost}")
        assert cost["spills"] == 0
        assert cost["shared"] <= 227 << 10, "more shared memory than a Hopper block may have"
        # With 8 tokens or fewer weight rows Triton takes an older instruction, whose sums may round otherwise.
        assert (cost["wgmma"] > 0) == (dtype == torch.bfloat16)


def test_compiles_without_ptx() -> None:
    """The integer twin of the inline PTX compiles too (what other devices run), and so does a rank's single expert."""
    for kernel in (gate_up_kernel, down_kernel):
        compiled(kernel, *SHIPPED[0], local=1, wide=True, ptx=False)


def test_one_order_of_summation_for_a_dtype() -> None:
    """`words` is the order along the contraction: were it to differ, a decode step and a prefill would differ too."""
    for tiles in TILES.values():
        assert len({tile.words for _, tile in tiles}) == 1
        assert [limit for limit, _ in tiles] == sorted({limit for limit, _ in tiles})
        assert tiles[-1][0] == float("inf")
