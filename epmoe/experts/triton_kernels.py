"""Two grouped products straight from 4-bit weights, with everything around them fused: gate_up and down.

Letters: T tokens · H hidden · I intermediate · K experts per token · L experts on this rank · S = T·K slots · R = S
rows of this rank, sorted by expert · P pairs of 32-column groups (mxfp4_words.py) · in a program: B weight rows, M rows
of R (tokens), Q words.

A program owns B weight rows of one expert and M of its rows, and computes w_BC · x_CMᵀ: weights are the left operand,
because the tensor cores take that one from registers, where the 4-bit codes become numbers; a batch of few tokens then
wastes columns of 8, not rows of 64.

**Order.** The contraction runs from column 0 upwards, Q words at a time, the four codes of the words in order, in one
accumulator: never split, whatever the batch. So a row's bits follow from its token, its expert and the tile's Q alone;
and Q, like all of the tile, comes from dtype, T·K and E (triton.py), never from the rows, experts or ranks at hand.

**Schedule.** The grid is as large as S slots over L experts can ever need. Each program finds its tile in the
experts' offsets, on the device; those without one end at once, and an expert that nobody chose has no tile.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.experts.mxfp4_words import words_to_values


@triton.jit(do_not_specialize=["num_local", "top_k"])
def gate_up_kernel(
    x_ptr,  # [T, H]
    word_ptr,  # int16 [L, 2I, 16·P], rows interleaved: even gate, odd up
    scale_ptr,  # int16 [L, P, 2I]
    bias_ptr,  # [L, 2I]
    offset_ptr,  # int32 [L+1]
    slot_ptr,  # int32 [R]
    h_ptr,  # out [R, I], x's dtype
    rows,  # 2I
    num_local,
    top_k,
    alpha,
    limit,
    up_offset,
    COLUMNS: tl.constexpr,  # H
    LOCAL: tl.constexpr,  # the power of two from L upwards
    B: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
    WIDE: tl.constexpr,
    PTX: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the products
):
    """h[r] = activation(x[slot[r] // K] · gate_upᵀ + bias)."""
    tiles_n = tl.cdiv(rows, B)
    expert, row_M, stop = _find_tile(offset_ptr, tl.program_id(0) // tiles_n, num_local, LOCAL, M)
    if expert >= num_local:
        return
    n_B = tl.program_id(0) % tiles_n * B + tl.arange(0, B)
    token_M = tl.load(slot_ptr + row_M, row_M < stop, other=0) // top_k
    acc_BM = _product(x_ptr, token_M, row_M < stop, word_ptr, scale_ptr, expert, n_B, rows, COLUMNS, Q, WIDE, PTX, DOT)
    acc_BM += tl.load(bias_ptr + expert.to(tl.int64) * rows + n_B, n_B < rows, other=0).to(tl.float32)[:, None]

    gate_IM, up_IM = tl.permute(tl.reshape(acc_BM, (B // 2, 2, M)), (0, 2, 1)).split()
    # NaN must pass: hardware minima drop it unless told
    gate_IM = tl.minimum(gate_IM, limit, propagate_nan=tl.PropagateNan.ALL)
    up_IM = tl.clamp(up_IM, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    h_IM = gate_IM * tl.sigmoid(alpha * gate_IM) * (up_IM + up_offset)

    i_I = tl.program_id(0) % tiles_n * (B // 2) + tl.arange(0, B // 2)
    to_IM = h_ptr + row_M.to(tl.int64)[None, :] * (rows // 2) + i_I[:, None]
    tl.store(to_IM, h_IM.to(h_ptr.dtype.element_ty), (i_I < rows // 2)[:, None] & (row_M < stop)[None, :])


@triton.jit(do_not_specialize=["num_local"])
def down_kernel(
    h_ptr,  # [R, I]
    word_ptr,  # int16 [L, H, 16·P]
    scale_ptr,  # int16 [L, P, H]
    bias_ptr,  # [L, H]
    offset_ptr,  # int32 [L+1]
    slot_ptr,  # int32 [R]
    weight_ptr,  # float32 [S], the gate weights
    y_ptr,  # out [S, H], h's dtype; only slots of this rank are written
    rows,  # H
    num_local,
    COLUMNS: tl.constexpr,  # I
    LOCAL: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
    WIDE: tl.constexpr,
    PTX: tl.constexpr,
    DOT: tl.constexpr,
):
    """y[slot[r]] = weight[slot[r]] · (h[r] · downᵀ + bias)."""
    tiles_n = tl.cdiv(rows, B)
    expert, row_M, stop = _find_tile(offset_ptr, tl.program_id(0) // tiles_n, num_local, LOCAL, M)
    if expert >= num_local:
        return
    n_B = tl.program_id(0) % tiles_n * B + tl.arange(0, B)
    acc_BM = _product(h_ptr, row_M, row_M < stop, word_ptr, scale_ptr, expert, n_B, rows, COLUMNS, Q, WIDE, PTX, DOT)
    acc_BM += tl.load(bias_ptr + expert.to(tl.int64) * rows + n_B, n_B < rows, other=0).to(tl.float32)[:, None]

    slot_M = tl.load(slot_ptr + row_M, row_M < stop, other=0)
    acc_BM *= tl.load(weight_ptr + slot_M, row_M < stop, other=0)[None, :]
    to_BM = y_ptr + slot_M.to(tl.int64)[None, :] * rows + n_B[:, None]
    tl.store(to_BM, acc_BM.to(y_ptr.dtype.element_ty), (n_B < rows)[:, None] & (row_M < stop)[None, :])


@triton.jit
def _find_tile(offset_ptr, tile, num_local, LOCAL: tl.constexpr, M: tl.constexpr):
    """The tile-th run of M rows, counted expert by expert → (expert, its rows [M], the expert's last row + 1).

    The expert is num_local or more where there is no such tile.
    """
    l_L = tl.arange(0, LOCAL)
    start_L = tl.load(offset_ptr + l_L, l_L < num_local, other=0)
    stop_L = tl.load(offset_ptr + l_L + 1, l_L < num_local, other=0)
    tiles_L = (stop_L - start_L + M - 1) // M
    passed_L = tl.cumsum(tiles_L, 0) <= tile  # experts whose tiles all come before
    expert = tl.sum(passed_L.to(tl.int32), 0)
    inside = tile - tl.sum(tl.where(passed_L, tiles_L, 0), 0)
    known = tl.minimum(expert, num_local - 1)
    row_M = tl.load(offset_ptr + known) + inside * M + tl.arange(0, M)
    return expert, row_M, tl.load(offset_ptr + known + 1)


@triton.jit
def _product(
    x_ptr,
    x_row_M,
    used_M,
    word_ptr,
    scale_ptr,
    expert,
    n_B,
    rows,
    COLUMNS: tl.constexpr,
    Q: tl.constexpr,
    WIDE: tl.constexpr,
    PTX: tl.constexpr,
    DOT: tl.constexpr,
):
    """float32 [B, M]: rows n_B of the expert's matrix times rows x_row_M of x, over all columns, in one fixed order."""
    B: tl.constexpr = n_B.shape[0]
    M: tl.constexpr = x_row_M.shape[0]
    PAIRS: tl.constexpr = Q // 16
    pairs: tl.constexpr = (COLUMNS + 63) // 64
    q_Q = tl.arange(0, Q)
    p_P = tl.arange(0, PAIRS)
    column_Q = q_Q // 16 * 64 + q_Q % 16  # of code 0; codes 1 to 3 follow at 16, 32, 48
    expert_row_B = expert.to(tl.int64) * rows + n_B
    word_BQ = word_ptr + expert_row_B[:, None] * (pairs * 16) + q_Q[None, :]
    scale_BP = scale_ptr + (expert.to(tl.int64) * pairs + p_P)[None, :] * rows + n_B[:, None]
    x_QM = x_ptr + x_row_M.to(tl.int64)[None, :] * COLUMNS + column_Q[:, None]
    real_B = (n_B < rows)[:, None]

    acc_BM = tl.zeros((B, M), tl.float32)
    for pair in range(0, pairs, PAIRS):
        word = tl.load(word_BQ, real_B & (pair * 16 + q_Q < pairs * 16)[None, :], other=0)
        scale = tl.load(scale_BP, real_B & (pair + p_P < pairs)[None, :], other=0)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (B, PAIRS, 16)), (B, Q))
        for j in tl.static_range(4):
            values = words_to_values(word, scale, j, WIDE, PTX)
            inside_Q = pair * 64 + 16 * j + column_Q < COLUMNS
            x = tl.load(x_QM + 16 * j, inside_Q[:, None] & used_M[None, :], other=0)
            acc_BM = tl.dot(values.to(DOT), x.to(DOT), acc_BM, input_precision="ieee")
        word_BQ += Q
        scale_BP += PAIRS * rows
        x_QM += PAIRS * 64
    return acc_BM
