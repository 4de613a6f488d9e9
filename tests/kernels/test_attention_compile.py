"""Attention's kernels, compiled for sm_90 without a GPU at gpt-oss's shapes: no spills, products that overlap."""

from typing import Any

import pytest
import torch
from compile_sm90 import MOST_SHARED, compile_kernel

from epmoe.kernels.attention import decode as attention_decode
from epmoe.kernels.attention import prefill as attention_prefill
from epmoe.kernels.attention.launch import (
    AHEAD,
    BESIDE,
    DECODE,
    PLACED,
    PLACED_ROWS,
    PREFILL,
    SPLIT,
    AttentionTile,
    _bucket,
    combine_options,
)

DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# gpt-oss: 64 query and 8 key/value heads of 64; a window of 128
SIZES = {"J": 8, "D": 64, "DP": 64}
FULL, WINDOW = {"PAGE": 16, "WINDOW": 0}, {"PAGE": 16, "WINDOW": 128}
INTEGERS = ("most", "spans", "table_stride", "q_stride", "k_stride", "v_stride", "cache_rows")
REGISTERS, SHARED, RESERVED = 65536, 228 << 10, 1 << 10  # of Hopper's multiprocessors; bytes that each program takes
POINTERS = ("q", "k", "v", "key", "value", "sink", "out")


def compiled(
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    arch: int = 90,
    registers: int | None = None,
) -> dict[str, int]:
    types = {
        **{f"{name}_ptr": DTYPES[dtype] for name in POINTERS},
        **dict.fromkeys(("cos_ptr", "sin_ptr", "part_ptr", "top_ptr", "sum_ptr"), "*fp32"),
        **dict.fromkeys(("position_ptr", "sequence_ptr"), "*i64"),
        **dict.fromkeys(("table_ptr", "span_ptr", "run_ptr", "rows_ptr"), "*i32"),
        **dict.fromkeys(INTEGERS, "i32"),
        "scale": "fp32",
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    strides = [name for name in ("q_stride", "k_stride", "v_stride", "cache_rows") if name in signature]
    cost = compile_kernel(kernel, signature, constants, warps, stages, arch, strides, registers, fusion=False)
    print(f"{kernel.__name__} sm_{arch} {dtype} {constants}: {cost}")
    assert arch != 90 or cost["spills"] == 0
    assert cost["shared"] <= MOST_SHARED[arch], "more shared memory than a block may have"
    return cost


def compiled_decode(dtype: torch.dtype, layout: dict[str, int], rows: int, *, placed: bool) -> dict[str, int]:
    """The decode kernel as it is launched, for so many rows."""
    tile = DECODE[dtype]
    constants = {**SIZES, **layout, "G": 8, "ROWS": rows, "SPLIT": SPLIT, "M": tile.queries, "N": tile.positions}
    constants |= {"PDL": True, "PLACED": placed}
    return compiled(attention_decode.decode_kernel, dtype, constants, tile.warps, tile.stages)


@pytest.mark.parametrize(("rows", "placed"), [(_bucket(1), False), (_bucket(64), False), (_bucket(256), True)])
@pytest.mark.parametrize("layout", [FULL, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(dtype: torch.dtype, layout: dict[str, int], rows: int, placed: bool) -> None:
    """All programs of a launch are on the machine at once: one that waits for a place costs half of the time again.

    Rows with drafts, which are in place already, are compiled for the most rows only; to write needs more.
    """
    tile, cost = DECODE[dtype], compiled_decode(dtype, layout, rows, placed=placed)
    assert tile.programs * tile.warps * 32 * cost["registers"] <= REGISTERS
    assert tile.programs * (cost["shared"] + RESERVED) <= SHARED
    if dtype == torch.bfloat16:  # keys and values of two blocks ahead are under way: the page table must not stall them
        assert cost["shared"] >= 2 * 2 * tile.positions * 64 * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype: torch.dtype) -> None:
    constants = {**SIZES, "G": 8, "ROWS": 32, "WINDOW": 0, "SPLIT": SPLIT, "AHEAD": AHEAD, "PDL": True}
    options = combine_options(8, SIZES["D"])
    compiled(attention_decode.combine_kernel, dtype, constants | {"GP": options["GP"]}, options["num_warps"], 3)


def prefill_constants(layout: dict[str, int], dtype: torch.dtype) -> tuple[dict[str, int], AttentionTile]:
    """Constants and tile of the prefill kernel as it is launched."""
    tile = PREFILL[dtype]
    constants = {**SIZES, **layout, "G": 8, "GP": 8, "SPLIT": SPLIT, "M": tile.queries, "N": tile.positions}
    return constants | {"PDL": True}, tile


@pytest.mark.parametrize("layout", [FULL, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill(dtype: torch.dtype, layout: dict[str, int]) -> None:
    """bf16 runs on Hopper's tensor cores, both products, and ptxas need not make them wait for each other.

    It warns when it does; the queries' way through memory in prefill_kernel avoids it.
    """
    constants, tile = prefill_constants(layout, dtype)
    cost = compiled(attention_prefill.prefill_kernel, dtype, constants, tile.warps, tile.stages, 90, tile.registers)
    assert cost["serialized"] == 0 and (cost["wgmma"] > 0) == (dtype == torch.bfloat16)
    assert cost["waits"] == 2  # of a program that finds nothing to do, and of one that does
    if dtype == torch.bfloat16:  # one program's softmax runs beside another's product
        assert 4 * tile.warps * 32 * cost["registers"] <= REGISTERS and 4 * (cost["shared"] + RESERVED) <= SHARED
        beside, warps = compiled_decode(dtype, layout, _bucket(256), placed=False), DECODE[dtype].warps
        assert 32 * (BESIDE * warps * beside["registers"] + tile.warps * cost["registers"]) <= REGISTERS
        assert BESIDE * (beside["shared"] + RESERVED) + cost["shared"] + RESERVED <= SHARED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_place(dtype: torch.dtype) -> None:
    cost = compiled(attention_prefill.place_kernel, dtype, {**SIZES, **FULL, "M": PLACED, "PDL": True}, 4, 3)
    # It lets nobody in before it has waited: the prefill, which reads queries and runs before it waits, relies on that.
    assert (cost["waits"], cost["early"]) == (1, 0)
    compiled(attention_decode.place_rows_kernel, dtype, {**SIZES, **FULL, "M": PLACED_ROWS}, 4, 3)
    compiled(attention_prefill.find_runs_kernel, dtype, {"PLACING": PLACED, "ATTENDING": 8}, 1, 3)


@pytest.mark.parametrize("layout", [FULL, WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("arch", [80, 100])
def test_other_generations(arch: int, layout: dict[str, int]) -> None:
    """Ampere and Blackwell compile the same kernels; their tiles were not chosen for them, so spills are theirs."""
    tile = DECODE[torch.bfloat16]
    constants = {**SIZES, **layout, "G": 8, "ROWS": 32, "SPLIT": SPLIT, "M": tile.queries, "N": tile.positions}
    constants |= {"PDL": arch >= 90, "PLACED": False}
    compiled(attention_decode.decode_kernel, torch.bfloat16, constants, tile.warps, tile.stages, arch)
    constants, tile = prefill_constants(layout, torch.bfloat16)
    constants["PDL"] = arch >= 90
    compiled(attention_prefill.prefill_kernel, torch.bfloat16, constants, tile.warps, tile.stages, arch)
