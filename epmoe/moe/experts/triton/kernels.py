"""Two grouped products straight from 4-bit weights, with everything around them fused: gate_up and down.

Letters: T tokens · H hidden · I intermediate · K experts per token · L experts on this rank · S = T·K slots · R = S
rows of this rank, sorted by expert · of the weights (words.py): P pairs of 32-column groups, Z strips of 64
rows, X words of a strip, V columns of scale words · in a program: B weight rows, M rows of R (tokens), Q words.

A program owns B weight rows of one expert and M of its rows, and computes w_BC · x_CMᵀ: weights are the left operand,
because the tensor cores take that one from registers, where the 4-bit codes become numbers; a batch of few tokens then
wastes columns of 8, not rows of 64.

**Order.** The contraction runs in one accumulator, never split, whatever the batch: run by run (words.py), in a
run Q words at a time, the four codes of those words in order. With Q = 64 that is simply column 0 upwards. So a row's
bits follow from its token, its expert and the tile's Q alone; and Q, like all of the tile, comes from dtype, T·K and E
(products.py), never from the rows, experts or ranks at hand.

**Schedule.** The grid is as large as S slots over L experts can ever need. Each program finds its tile in the
experts' offsets, on the device; those without one end at once, and an expert that nobody chose has no tile.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from epmoe.kernels.gpu import after_previous, next_may_begin
from epmoe.moe.experts.triton import words
from epmoe.moe.experts.triton.words import words_to_values

STRIP = tl.constexpr(words.STRIP)


@triton.jit(do_not_specialize=["num_local", "top_k"])
def gate_up_kernel(
    x_ptr,  # [T, H]
    word_ptr,  # int16 [L, Z, X], rows interleaved: even gate, odd up
    scale_ptr,  # int32 [L, Z, V, 64]
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
    PDL: tl.constexpr,
):
    """h[r] = activation(x[slot[r] // K] · gate_upᵀ + bias)."""
    after_previous(PDL)
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
    word_ptr,  # int16 [L, Z, X]
    scale_ptr,  # int32 [L, Z, V, 64]
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


@triton.jit(do_not_specialize=["num_local", "top_k"])
def gather_kernel(
    x_ptr,  # [T, H]
    offset_ptr,  # int32 [L+1]
    slot_ptr,  # int32 [R]
    out_ptr,  # out [R, H]; rows that this rank does not use are left as they are
    num_local,
    top_k,
    COLUMNS: tl.constexpr,  # H
    M: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[r] = x[slot[r] // K]: the rows of the tokens, sorted by expert, M at a time."""
    after_previous(PDL)
    next_may_begin(PDL)
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    used_M = row_M < tl.load(offset_ptr + num_local)
    token_M = tl.load(slot_ptr + row_M, used_M, other=0).to(tl.int64) // top_k
    c_C = tl.arange(0, C)
    for column in tl.static_range(0, COLUMNS, C):
        used_MC = used_M[:, None] & (column + c_C < COLUMNS)[None, :]
        x_MC = tl.load(x_ptr + token_M[:, None] * COLUMNS + (column + c_C)[None, :], used_MC, other=0)
        tl.store(out_ptr + row_M.to(tl.int64)[:, None] * COLUMNS + (column + c_C)[None, :], x_MC, used_MC)


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
    pairs: tl.constexpr = (COLUMNS + 63) // 64
    whole: tl.constexpr = pairs // 4 * 4
    scales: tl.constexpr = whole // 2 + pairs % 4 // 2 + pairs % 2
    real_B = n_B < rows
    x_M = x_ptr + x_row_M.to(tl.int64) * COLUMNS
    strip_B = expert.to(tl.int64) * tl.cdiv(rows, STRIP) + n_B // STRIP
    row_B = n_B % STRIP
    word_B = word_ptr + strip_B * (STRIP * 16 * pairs)  # each row's strip
    scale_B = scale_ptr + strip_B * (STRIP * scales) + row_B

    acc_BM = tl.zeros((n_B.shape[0], x_row_M.shape[0]), tl.float32)
    for word in range(0, whole * 16, Q):
        run = word // 64
        acc_BM = _words_product(
            acc_BM,
            x_M,
            used_M,
            word_B + run * (STRIP * 64) + row_B * 64,
            scale_B + word // 32 * STRIP,
            real_B,
            word - run * 64,
            run * 4,
            COLUMNS,
            4,
            Q,
            WIDE,
            PTX,
            DOT,
        )
    if pairs % 4 >= 2:
        some: tl.constexpr = Q if Q < 32 else 32
        of_B = word_B + whole * 16 * STRIP + row_B * 32
        to_B = scale_B + whole // 2 * STRIP
        for word in tl.static_range(0, 32, some):
            acc_BM = _words_product(
                acc_BM, x_M, used_M, of_B, to_B, real_B, word, whole, COLUMNS, 2, some, WIDE, PTX, DOT
            )
    if pairs % 2 == 1:
        last: tl.constexpr = pairs - 1
        of_B = word_B + last * 16 * STRIP + row_B * 16
        to_B = scale_B + (scales - 1) * STRIP
        acc_BM = _words_product(acc_BM, x_M, used_M, of_B, to_B, real_B, 0, last, COLUMNS, 1, 16, WIDE, PTX, DOT)
    return acc_BM


@triton.jit
def _words_product(
    acc_BM,
    x_M,
    used_M,
    word_B,  # each row's words of a run
    scale_B,  # the scales of the first of its Q words
    real_B,
    word,  # the first of Q words of the run
    pair,  # the first pair of the run
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,  # pairs of the run
    Q: tl.constexpr,
    WIDE: tl.constexpr,
    PTX: tl.constexpr,
    DOT: tl.constexpr,
):
    """acc + the product of Q words, all of one run: its four codes one after the other."""
    B: tl.constexpr = acc_BM.shape[0]
    VQ: tl.constexpr = (Q + 31) // 32
    i_Q = tl.arange(0, Q)
    word_BQ = tl.load(word_B[:, None] + (word + i_Q)[None, :], real_B[:, None], other=0)
    scale_BV = tl.load(scale_B[:, None] + (tl.arange(0, VQ) * STRIP)[None, :], real_B[:, None], other=0)
    scale_BQ = tl.reshape(tl.broadcast_to(scale_BV[:, :, None], (B, VQ, Q // VQ)), (B, Q))
    for j in tl.static_range(4):
        # code j of the run's word i is column 16 · SIZE · j + i of the run
        column_Q = pair * 64 + 16 * SIZE * j + word + i_Q
        used_QM = used_M[None, :]
        if COLUMNS % 64 != 0:
            used_QM = used_QM & (column_Q < COLUMNS)[:, None]
        x_QM = tl.load(x_M[None, :] + column_Q[:, None], used_QM, other=0)
        value_BQ = words_to_values(word_BQ, scale_BQ, j, WIDE, PTX)
        acc_BM = tl.dot(value_BQ.to(DOT), x_QM.to(DOT), acc_BM, input_precision="ieee")
    return acc_BM
