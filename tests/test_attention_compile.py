"""Attention's kernels, compiled for sm_90 without a GPU at gpt-oss's shapes: no spills."""

from typing import Any

import pytest
import torch
from compile_sm90 import compile_kernel

from epmoe import attention_kernels as kernels
from epmoe.attention_triton import DECODE, PREFILL, SPLIT, SPLITS

DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# gpt-oss: 64 query and 8 key/value heads of 64; pages of 16, rings of 144 rows for the window of 128
SIZES = {"J": 8, "D": 64, "DP": 64}
FULL, RING = {"PAGE": 16, "WINDOW": 0}, {"PAGE": 144, "WINDOW": 128}
INTEGERS = ("rows", "spans", "tokens", "table_stride", "q_stride", "k_stride", "v_stride", "cache_rows")


def compiled(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], warps: int, stages: int, arch: int = 90
) -> dict[str, int]:
    types = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "key_ptr", "value_ptr", "sink_ptr", "out_ptr"), DTYPES[dtype]),
        **dict.fromkeys(("cos_ptr", "sin_ptr", "part_ptr", "top_ptr", "sum_ptr"), "*fp32"),
        **dict.fromkeys(("token_ptr", "position_ptr", "sequence_ptr"), "*i64"),
        **dict.fromkeys(("table_ptr", "span_ptr"), "*i32"),
        **dict.fromkeys(INTEGERS, "i32"),
        "scale": "fp32",
    }
    if constants.get("PAGE") == RING["PAGE"]:
        constants = {**constants, "table_ptr": None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    strides = [name for name in ("q_stride", "k_stride", "v_stride", "cache_rows") if name in signature]
    cost = compile_kernel(kernel, signature, constants, warps, stages, arch, divisible=strides)
    print(f"{kernel.__name__} sm_{arch} {dtype} {constants}: {cost}")
    assert arch != 90 or cost["spills"] == 0
    assert cost["shared"] <= {80: 163, 90: 227, 100: 227}[arch] << 10, "more shared memory than a block may have"
    return cost


@pytest.mark.parametrize("layout", [FULL, RING], ids=["pages", "ring"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(dtype: torch.dtype, layout: dict[str, int]) -> None:
    """A spill in the inner loop is a silent loss of speed; run with -s to see registers and shared memory."""
    tile = DECODE[dtype]
    constants = {**SIZES, **layout, "G": 8, "ROWS": 64, "SPLIT": SPLIT, "M": tile.queries, "N": tile.positions}
    cost = compiled(kernels.decode_kernel, dtype, constants, tile.warps, tile.stages)
    # at least three programs run on a multiprocessor at a time, so that one's loads hide another's arithmetic
    assert 3 * tile.warps * 32 * cost["registers"] <= 65536
    assert 3 * (cost["shared"] + 1024) <= 227 << 10
    if dtype == torch.bfloat16:  # keys and values of two blocks ahead are under way: the page table must not stall them
        assert cost["shared"] >= 2 * 2 * tile.positions * 64 * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype: torch.dtype) -> None:
    constants = {**SIZES, "E": 64, "ROWS": 64, "WINDOW": 0, "SPLIT": SPLIT, "S": SPLITS}
    compiled(kernels.combine_kernel, dtype, constants, 2, 3)


@pytest.mark.parametrize("layout", [FULL, RING], ids=["pages", "ring"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill(dtype: torch.dtype, layout: dict[str, int]) -> None:
    """bf16 runs on Hopper's tensor cores, both products."""
    tile = PREFILL[dtype]
    constants = {**SIZES, **layout, "G": 8, "GP": 8, "SPANS": 64, "M": tile.queries, "N": tile.positions}
    cost = compiled(kernels.prefill_kernel, dtype, constants, tile.warps, tile.stages)
    assert (cost["wgmma"] > 0) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes(dtype: torch.dtype) -> None:
    compiled(kernels.rotate_kernel, dtype, {**SIZES, "M": 64}, 4, 3)
    for layout in (FULL, RING):
        compiled(kernels.store_kernel, dtype, {**SIZES, **layout, "SPANS": 64, "M": 64}, 4, 3)


@pytest.mark.parametrize("arch", [80, 100])
def test_other_generations(arch: int) -> None:
    """Ampere and Blackwell compile the same kernels; their tiles were not chosen for them, so spills are theirs."""
    tile, sizes = DECODE[torch.bfloat16], {**SIZES, **FULL, "G": 8}
    constants = {**sizes, "ROWS": 64, "SPLIT": SPLIT, "M": tile.queries, "N": tile.positions}
    compiled(kernels.decode_kernel, torch.bfloat16, constants, tile.warps, tile.stages, arch)
    tile = PREFILL[torch.bfloat16]
    constants = {**sizes, "GP": 8, "SPANS": 64, "M": tile.queries, "N": tile.positions}
    compiled(kernels.prefill_kernel, torch.bfloat16, constants, tile.warps, tile.stages, arch)
