"""Launches of hopper_kernels.py: the same two products as products.py's, for many rows an expert on a Hopper GPU.

Letters: T tokens · H hidden · I intermediate · K experts per token · R = T·K rows of this rank, sorted by expert.

The copy engine reads blocks of neighbouring rows, so gate_up's tokens are gathered first, [R, H] in x's dtype. That
memory is free again when `gate_up` returns, and serves for the result of `down` then.
"""

from collections.abc import Sequence

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.ragged_tma import create_ragged_descriptor

from epmoe.kernels.gpu import early
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.triton.hopper_kernels import down_kernel, gate_up_kernel
from epmoe.moe.experts.triton.hopper_product import BLOCK, RUN, WORDS
from epmoe.moe.experts.triton.kernels import gather_kernel
from epmoe.moe.experts.triton.tiles import ExpertTile, hopper_serves
from epmoe.moe.experts.triton.words import STRIP, WordMatrix
from epmoe.moe.router import Dispatch

_GATHERED = 4  # rows a program of the gather


def gate_up(
    x_TH: torch.Tensor,
    matrix: WordMatrix,
    bias_LN: torch.Tensor,
    dispatch: Dispatch,
    activation: GatedActivation,
    h_RI: torch.Tensor,
    tile: ExpertTile,
    grid: int,
) -> None:
    """As `products.gate_up`, into `h_RI`."""
    num_local, rows, columns = matrix.shape
    assert hopper_serves(columns), columns
    x_RH = x_TH.new_empty(len(h_RI), columns)
    gather_kernel[(triton.cdiv(len(h_RI), _GATHERED),)](
        x_TH,
        dispatch.offset_L1,
        dispatch.slot_R,
        x_RH,
        num_local,
        dispatch.expert_TK.shape[1],
        COLUMNS=columns,
        M=_GATHERED,
        C=1024,
        **early(x_TH.device),
    )
    gate_up_kernel[(grid,)](
        *_blocks(x_RH, matrix, tile),
        x_RH,
        matrix.word_LZX,
        matrix.scale_LZVB,
        bias_LN,
        dispatch.offset_L1,
        h_RI,
        rows,
        num_local,
        activation.alpha,
        activation.limit,
        activation.up_offset,
        **_constants(tile, matrix),
        **early(h_RI.device),
    )


def down(
    h_RI: torch.Tensor,
    matrix: WordMatrix,
    bias_LH: torch.Tensor,
    dispatch: Dispatch,
    y_TKH: torch.Tensor,
    tile: ExpertTile,
    grid: int,
) -> None:
    """As `products.down`, into the slots of this rank in `y_TKH`."""
    num_local, rows, columns = matrix.shape
    assert hopper_serves(columns), columns
    down_kernel[(grid,)](
        *_blocks(h_RI, matrix, tile),
        h_RI,
        matrix.word_LZX,
        matrix.scale_LZVB,
        bias_LH,
        dispatch.offset_L1,
        dispatch.slot_R,
        dispatch.weight_TK,
        y_TKH,
        rows,
        num_local,
        **_constants(tile, matrix),
        **early(h_RI.device),
    )


def _blocks(x_RC: torch.Tensor, matrix: WordMatrix, tile: ExpertTile) -> list[TensorDescriptor]:
    """What the copy engine needs to know of x and of the words: in blocks of a tile, and in blocks of half a tile."""
    describe = TensorDescriptor.from_tensor
    rows = sizes(tile)
    # All experts' strips one after the other; of each, the lines of 64 words: of a run of 4 pairs, one for each row.
    strip_line_word = matrix.word_LZX.flatten(0, 1).unflatten(1, (-1, 64))
    return [
        _ending(x_RC, [rows["M"], RUN // rows["PIECES"]]),
        _ending(x_RC, [rows["M"] // 2, RUN // rows["PIECES"]]),
        describe(strip_line_word, [tile.weight_rows // STRIP, STRIP, 64], WORDS.value),
        describe(strip_line_word, [tile.weight_rows // STRIP // 2, STRIP, 64], WORDS.value),
    ]


def _ending(x_RC: torch.Tensor, block: Sequence[int]) -> TensorDescriptor:
    """Blocks that end where an expert's rows do: zeros stand behind these, which no memory is read for.

    The copy engine knows where a tensor ends. Two dimensions in front of x's, by Triton's helper, let a block name its
    own end: its coordinates are `to_ragged_indices`, and a column.
    """
    ragged = create_ragged_descriptor(x_RC, block)
    return TensorDescriptor(x_RC, ragged.shape, ragged.strides, ragged.block_shape, BLOCK.value)


def sizes(tile: ExpertTile) -> dict[str, int]:
    """The kernels' constants for a tile's tokens: M of them, and where these are not all, M/2 MORE.

    Then a run of x comes in two pieces, three of which take less shared memory than two whole runs, so that two
    programs share a multiprocessor. Other tiles lose 2 to 4 % by that.
    """
    more = tile.tokens - tile.run
    return {"M": tile.run, "MORE": more, "PIECES": 2 if more else 1}


def _constants(tile: ExpertTile, matrix: WordMatrix) -> dict[str, object]:
    return {
        "COLUMNS": matrix.shape[2],
        "LOCAL": triton.next_power_of_2(matrix.shape[0]),
        "B": tile.weight_rows,
        **sizes(tile),
        "WIDE": matrix.wide,
        "num_warps": tile.warps,
    }
