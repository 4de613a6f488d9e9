"""The experts' two products, gate_up and down: which kernel, which tile, one launch each; and the same in torch.

Products of few rows an expert run in kernels.py, those of many on a Hopper GPU in hopper_kernels.py (launched by
hopper.py), with the same bits; tiles.py says which.

Letters: T tokens · H hidden · I intermediate · E experts · K experts per token · L experts on this rank · S = T·K
slots · R = S rows of this rank, sorted by expert · N = 2I.
"""

from itertools import pairwise
from types import ModuleType

import torch
import triton
import triton.language as tl

from epmoe.kernels.gpu import early, generation
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.reference import gated
from epmoe.moe.experts.triton.kernels import down_kernel, gate_up_kernel
from epmoe.moe.experts.triton.tiles import TILES, ExpertTile, hopper_serves, tile_for
from epmoe.moe.experts.triton.words import WordMatrix
from epmoe.moe.router import Dispatch


def max_tiles(slots: int, num_local: int, tokens: int) -> int:
    """The most runs of at most `tokens` rows that `slots` rows over L experts can need: the grid's fixed bound."""
    started = min(slots, num_local)
    return started + (slots - started) // tokens


def gate_up(
    x_TH: torch.Tensor,
    matrix: WordMatrix,
    bias_LN: torch.Tensor,
    dispatch: Dispatch,
    activation: GatedActivation,
) -> torch.Tensor:
    """h[r] = activation(x[slot[r] // K] · gate_upᵀ + bias): [T, H] → [R, I]; unused rows hold anything."""
    (tokens, hidden), (num_local, rows, columns) = x_TH.shape, matrix.shape
    slots = dispatch.slot_R.numel()
    assert hidden == columns and slots == tokens * dispatch.expert_TK.shape[1]
    _check(x_TH, matrix, bias_LN, dispatch)
    h_RI = x_TH.new_empty(slots, rows // 2)
    tile = _tile(x_TH, matrix, dispatch)
    grid = max_tiles(slots, num_local, tile.run) * triton.cdiv(rows, tile.weight_rows)
    if grid and tile.kernel == "hopper":
        _hopper().gate_up(x_TH, matrix, bias_LN, dispatch, activation, h_RI, tile, grid)
    elif grid:
        gate_up_kernel[(grid,)](
            x_TH,
            matrix.word_LZX,
            matrix.scale_LZVB,
            bias_LN,
            dispatch.offset_L1,
            dispatch.slot_R,
            h_RI,
            rows,
            num_local,
            dispatch.expert_TK.shape[1],
            activation.alpha,
            activation.limit,
            activation.up_offset,
            **_constants(tile, matrix, x_TH),
            **early(x_TH.device),
        )
    return h_RI


def down(
    h_RI: torch.Tensor,
    matrix: WordMatrix,
    bias_LH: torch.Tensor,
    dispatch: Dispatch,
    y_TKH: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[slot[r]] = weight[slot[r]] · (h[r] · downᵀ + bias): [R, I] → [T, K, H], zeros in slots of other ranks.

    Written into `y_TKH`, zeros, where that is given.
    """
    (slots, intermediate), (num_local, hidden, columns) = h_RI.shape, matrix.shape
    assert intermediate == columns and slots == dispatch.slot_R.numel()
    assert dispatch.weight_TK.dtype == torch.float32 and dispatch.weight_TK.is_contiguous()
    _check(h_RI, matrix, bias_LH, dispatch)
    if y_TKH is None:
        # A rank that has all experts writes every slot.
        new = h_RI.new_empty if num_local == dispatch.num_experts else h_RI.new_zeros
        y_TKH = new(*dispatch.expert_TK.shape, hidden)
    assert y_TKH.shape == (*dispatch.expert_TK.shape, hidden) and y_TKH.is_contiguous() and y_TKH.dtype == h_RI.dtype
    tile = _tile(h_RI, matrix, dispatch)
    grid = max_tiles(slots, num_local, tile.run) * triton.cdiv(hidden, tile.weight_rows)
    if grid and tile.kernel == "hopper":
        _hopper().down(h_RI, matrix, bias_LH, dispatch, y_TKH, tile, grid)
    elif grid:
        down_kernel[(grid,)](
            h_RI,
            matrix.word_LZX,
            matrix.scale_LZVB,
            bias_LH,
            dispatch.offset_L1,
            dispatch.slot_R,
            dispatch.weight_TK,
            y_TKH,
            hidden,
            num_local,
            **_constants(tile, matrix, h_RI),
        )
    return y_TKH


def _tile(x: torch.Tensor, matrix: WordMatrix, dispatch: Dispatch) -> ExpertTile:
    """The table's tile for this step, or table 0's where the table's kernel does not know rows of that length."""
    step = (x.dtype, dispatch.slot_R.numel(), dispatch.num_experts)
    tile = tile_for(*step, generation(x.device))
    known = tile.kernel != "hopper" or hopper_serves(matrix.shape[2])
    return tile if known else tile_for(*step, 0)


def _hopper() -> ModuleType:
    from epmoe.moe.experts.triton import hopper  # only here: other GPUs need no Gluon

    return hopper


def gate_up_torch(
    x_TH: torch.Tensor,
    matrix: WordMatrix,
    bias_LN: torch.Tensor,
    dispatch: Dispatch,
    activation: GatedActivation,
) -> torch.Tensor:
    """What `gate_up` computes, in torch; unused rows are zero. Waits for the device."""
    value_LNH = matrix.unpack().dequantize(torch.float32)
    h_RI = x_TH.new_zeros(dispatch.slot_R.numel(), matrix.shape[1] // 2)
    for expert, rows in enumerate(_expert_rows(dispatch)):
        x_MH = x_TH[dispatch.slot_R[rows].long() // dispatch.expert_TK.shape[1]].float()
        h_RI[rows] = gated(x_MH @ value_LNH[expert].T + bias_LN[expert].float(), activation).to(x_TH.dtype)
    return h_RI


def down_torch(
    h_RI: torch.Tensor,
    matrix: WordMatrix,
    bias_LH: torch.Tensor,
    dispatch: Dispatch,
    y_TKH: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `down` computes, in torch. Waits for the device."""
    value_LHI = matrix.unpack().dequantize(torch.float32)
    if y_TKH is None:
        y_TKH = h_RI.new_zeros(*dispatch.expert_TK.shape, matrix.shape[1])
    y_SH = y_TKH.view(-1, matrix.shape[1])
    for expert, rows in enumerate(_expert_rows(dispatch)):
        slot_M = dispatch.slot_R[rows].long()
        y_MH = h_RI[rows].float() @ value_LHI[expert].T + bias_LH[expert].float()
        y_SH[slot_M] = (y_MH * dispatch.weight_TK.flatten()[slot_M, None]).to(h_RI.dtype)
    return y_TKH


def _expert_rows(dispatch: Dispatch) -> list[slice]:
    offsets = dispatch.offset_L1.tolist()
    return [slice(start, stop) for start, stop in pairwise(offsets)]


def _check(x: torch.Tensor, matrix: WordMatrix, bias_LN: torch.Tensor, dispatch: Dispatch) -> None:
    """What the kernels take for granted of the tensors of either product."""
    assert x.dtype in TILES, f"experts=triton computes in bfloat16 or float32, not {x.dtype}"
    assert bias_LN.shape == matrix.shape[:2] and dispatch.offset_L1.shape == (matrix.shape[0] + 1,)
    assert dispatch.offset_L1.dtype == dispatch.slot_R.dtype == torch.int32
    tensors = (x, matrix.word_LZX, matrix.scale_LZVB, bias_LN, dispatch.offset_L1, dispatch.slot_R)
    assert all(tensor.is_contiguous() and tensor.device == x.device for tensor in tensors)


def _constants(tile: ExpertTile, matrix: WordMatrix, x: torch.Tensor) -> dict[str, object]:
    """Compile-time arguments that both kernels share."""
    on_gpu = x.device.type != "cpu"
    return {
        "COLUMNS": matrix.shape[2],
        "LOCAL": triton.next_power_of_2(matrix.shape[0]),
        "B": tile.weight_rows,
        "M": tile.tokens,
        "Q": tile.words,
        "WIDE": matrix.wide,
        "PTX": generation(x.device) >= 8,
        # The interpreter multiplies the bit patterns of bf16, so there it computes in float32.
        "DOT": tl.bfloat16 if on_gpu and x.dtype == torch.bfloat16 else tl.float32,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
