"""Blocks of tokens as the copy engine brings them: an expert's rows, and zeros behind its last one."""

# mypy: disallow-untyped-defs=False

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.kernels.gpu import generation
from epmoe.moe.experts.triton.hopper import _blocks, sizes
from epmoe.moe.experts.triton.hopper_product import BLOCK, RUN, WORDS, _copy_piece, _sync
from epmoe.moe.experts.triton.tiles import ExpertTile
from epmoe.moe.experts.triton.words import STRIP, WordMatrix

TILE = ExpertTile.parse("hopper:128x96x64x4x2")


@gluon.jit
def copy_kernel(
    x_desc,
    half_desc,
    word_desc,
    x_ptr,  # out [M, W]
    more_ptr,  # out [MORE, W]
    first,
    stop,
    run,
    PIECE: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,
    W: gl.constexpr,
    B: gl.constexpr,
    STRIP: gl.constexpr,
    LINE: gl.constexpr,
):
    """Rows `first` … `stop` - 1 of a piece of a run, as a program of the products has them."""
    x_s = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, M, W], BLOCK)
    more_s = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, MORE, W], BLOCK)
    word_s = gl.allocate_shared_memory(gl.int16, [B // STRIP, STRIP, LINE], WORDS)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(1), count=1)
    _sync()
    buffers = (x_desc, half_desc, word_desc, x_s, more_s, word_s, ready)
    _copy_piece(buffers, run, PIECE, 1, first, stop, 0, B, M, MORE, 2, False)
    mbarrier.wait(ready.index(1), 0)
    _store(x_s.index(1).reshape([M, W]), x_ptr)
    _store(more_s.index(1).reshape([MORE, W]), more_ptr)
    mbarrier.invalidate(ready.index(1))


@gluon.jit
def _store(from_sMW, to_ptr):
    M: gl.constexpr = from_sMW.shape[0]
    W: gl.constexpr = from_sMW.shape[1]
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m_M = gl.arange(0, M, layout=gl.SliceLayout(1, lines))
    w_W = gl.arange(0, W, layout=gl.SliceLayout(0, lines))
    gl.store(to_ptr + m_M[:, None] * W + w_W[None, :], from_sMW.load(lines))


# 288 columns are one run (and a pair more, which is copied otherwise), 480 end within a piece, 512 are two runs.
@pytest.mark.gpu
@pytest.mark.parametrize("columns", [288, 480, 512])
@pytest.mark.parametrize(("first", "stop"), [(0, 96), (5, 101), (7, 8), (7, 71), (7, 70), (7, 72), (130, 160), (9, 9)])
def test_zeros_stand_behind_an_experts_last_row(first: int, stop: int, columns: int) -> None:
    """Though the next expert's rows, here NaN, are the neighbours in memory, or nothing is."""
    if generation(torch.device("cuda", 0)) != 9:
        pytest.fail("this GPU is no Hopper: it has no such kernels")
    x_RC = torch.randn(160, columns, device="cuda").bfloat16()
    wanted_RC = torch.zeros(first + 96, 512, device="cuda", dtype=torch.bfloat16)
    wanted_RC[first:stop, :columns] = x_RC[first:stop]
    x_RC[:first] = x_RC[stop:] = torch.nan
    codes = torch.zeros(1, TILE.weight_rows, columns // 32, 16, dtype=torch.uint8, device="cuda")
    matrix = WordMatrix.pack(Mxfp4Matrix(codes, codes[..., 0] + 127))
    rows = sizes(TILE)
    width = RUN // rows["PIECES"]
    constants = {"M": rows["M"], "MORE": rows["MORE"], "W": width, "B": TILE.weight_rows, "STRIP": STRIP, "LINE": 64}
    for column in range(0, (columns + 63) // 256 * 256, width):
        x_MW, more_MW = (x_RC.new_full((rows[name], width), torch.nan) for name in ("M", "MORE"))
        piece = {"run": column // RUN, "PIECE": column % RUN // width}
        x_desc, half_desc, word_desc, _ = _blocks(x_RC, matrix, TILE)
        copy_kernel[(1,)](x_desc, half_desc, word_desc, x_MW, more_MW, first, stop, **piece, **constants)
        assert torch.equal(torch.cat([x_MW, more_MW]), wanted_RC[first:, column : column + width])
