"""The two grouped products for many rows an expert, on Hopper: what kernels.py computes, bit for bit, in Gluon.

Letters: T tokens · H hidden · I intermediate · K experts per token · L experts on this rank · S = T·K slots · R = S
rows of this rank, sorted by expert · of the weights (words.py): P pairs of 32-column groups, Z strips of 64
rows, V columns of scale words · in a program: B weight rows (in arrays of words: a strip's), M rows of R (tokens), C
columns.

With many rows arithmetic is the limit, and in plain Triton each product waits for the one before it, since its left
operand is made in registers. Gluon lets a program say what runs beside what: hopper_product.py.

A program's tile is B × M; the last weight rows take half of B where that holds them, else the last of an expert's rows
half of M. With MORE = M/2 they may be M + MORE, as two products with the same weights: what is converted once serves
them all, where a tile of its own for the last few would convert it again.
"""

# mypy: disallow-untyped-defs=False

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from epmoe.kernels.gpu import after_previous
from epmoe.moe.experts.triton.hopper_product import product


@gluon.jit(do_not_specialize=["num_local"])
def gate_up_kernel(
    x_desc,  # [R, H] bf16, the tokens' rows sorted by expert, in blocks [1, 1, M, 256 / PIECES] (hopper.py)
    x_half_desc,  # the same in blocks of M/2 rows
    word_desc,  # int16 [L·Z, 16·P, 64], in blocks [B/64, 64, 64]: a run of B rows; even gate, odd up
    word_half_desc,  # the same in blocks [B/128, 64, 64]
    x_ptr,
    word_ptr,
    scale_ptr,  # int32 [L, Z, V, 64]
    bias_ptr,  # [L, 2I]
    offset_ptr,  # int32 [L+1]
    h_ptr,  # out [R, I]
    rows,  # 2I
    num_local,
    alpha,
    limit,
    up_offset,
    COLUMNS: gl.constexpr,  # H
    LOCAL: gl.constexpr,  # the power of two from L upwards
    B: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,  # rows of a second product beside the M: 0 or M/2
    PIECES: gl.constexpr,  # of a run of x
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """h[r] = activation(x[r] · gate_upᵀ + bias)."""
    tiles_n = gl.cdiv(rows, B)
    expert, first, stop = _find_tile(offset_ptr, gl.program_id(0) // tiles_n, num_local, LOCAL, M, MORE)
    if expert >= num_local:
        after_previous(PDL)
        return
    n = gl.program_id(0) % tiles_n * B
    tile, weights = (expert, n, first, stop, rows), (word_desc, word_ptr, scale_ptr)
    whole, half = (x_desc, x_half_desc, x_ptr), (x_half_desc, x_half_desc, x_ptr)
    to = (bias_ptr, h_ptr, alpha, limit, up_offset)
    if rows - n <= B // 2:
        _tile_of_h(whole, (word_half_desc, word_ptr, scale_ptr), to, tile, COLUMNS, B // 2, M, MORE, PIECES, WIDE, PDL)
    elif stop - first <= M // 2:
        _tile_of_h(half, weights, to, tile, COLUMNS, B, M // 2, 0, PIECES, WIDE, PDL)
    elif stop - first <= M or MORE == 0:
        _tile_of_h(whole, weights, to, tile, COLUMNS, B, M, 0, PIECES, WIDE, PDL)
    else:
        _tile_of_h(whole, weights, to, tile, COLUMNS, B, M, MORE, PIECES, WIDE, PDL)


@gluon.jit(do_not_specialize=["num_local"])
def down_kernel(
    h_desc,  # [R, I] bf16 in blocks [1, 1, M, 256 / PIECES] (hopper.py)
    h_half_desc,  # the same in blocks of M/2 rows
    word_desc,  # int16 [L·Z, 16·P, 64], in blocks [B/64, 64, 64]: a run of B rows
    word_half_desc,  # the same in blocks [B/128, 64, 64]
    h_ptr,
    word_ptr,
    scale_ptr,  # int32 [L, Z, V, 64]
    bias_ptr,  # [L, H]
    offset_ptr,  # int32 [L+1]
    slot_ptr,  # int32 [R]
    weight_ptr,  # float32 [S], the gate weights
    y_ptr,  # out [S, H]; only slots of this rank are written
    rows,  # H
    num_local,
    COLUMNS: gl.constexpr,  # I
    LOCAL: gl.constexpr,
    B: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,
    PIECES: gl.constexpr,
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """y[slot[r]] = weight[slot[r]] · (h[r] · downᵀ + bias)."""
    tiles_n = gl.cdiv(rows, B)
    expert, first, stop = _find_tile(offset_ptr, gl.program_id(0) // tiles_n, num_local, LOCAL, M, MORE)
    if expert >= num_local:
        after_previous(PDL)
        return
    n = gl.program_id(0) % tiles_n * B
    tile, weights = (expert, n, first, stop, rows), (word_desc, word_ptr, scale_ptr)
    whole, half = (h_desc, h_half_desc, h_ptr), (h_half_desc, h_half_desc, h_ptr)
    to = (bias_ptr, slot_ptr, weight_ptr, y_ptr)
    if rows - n <= B // 2:
        _tile_of_y(whole, (word_half_desc, word_ptr, scale_ptr), to, tile, COLUMNS, B // 2, M, MORE, PIECES, WIDE, PDL)
    elif stop - first <= M // 2:
        _tile_of_y(half, weights, to, tile, COLUMNS, B, M // 2, 0, PIECES, WIDE, PDL)
    elif stop - first <= M or MORE == 0:
        _tile_of_y(whole, weights, to, tile, COLUMNS, B, M, 0, PIECES, WIDE, PDL)
    else:
        _tile_of_y(whole, weights, to, tile, COLUMNS, B, M, MORE, PIECES, WIDE, PDL)


@gluon.jit
def _tile_of_h(
    x,
    weights,
    to,
    tile,
    COLUMNS: gl.constexpr,
    B: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,
    PIECES: gl.constexpr,
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    expert, n, first, stop, rows = tile
    bias_ptr, h_ptr, alpha, limit, up_offset = to
    sums = product(x, weights, expert, n, first, stop, rows, COLUMNS, B, M, MORE, PIECES, WIDE, PDL)
    _store_h(sums[0], bias_ptr, h_ptr, expert, n, first, stop, rows, alpha, limit, up_offset)
    if MORE:
        _store_h(sums[1], bias_ptr, h_ptr, expert, n, first + M, stop, rows, alpha, limit, up_offset)


@gluon.jit
def _tile_of_y(
    h,
    weights,
    to,
    tile,
    COLUMNS: gl.constexpr,
    B: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,
    PIECES: gl.constexpr,
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    expert, n, first, stop, rows = tile
    bias_ptr, slot_ptr, weight_ptr, y_ptr = to
    sums = product(h, weights, expert, n, first, stop, rows, COLUMNS, B, M, MORE, PIECES, WIDE, PDL)
    _store_y(sums[0], bias_ptr, slot_ptr, weight_ptr, y_ptr, expert, n, first, stop, rows)
    if MORE:
        _store_y(sums[1], bias_ptr, slot_ptr, weight_ptr, y_ptr, expert, n, first + M, stop, rows)


@gluon.jit
def _store_h(acc_BM, bias_ptr, h_ptr, expert, n, first, stop, rows, alpha, limit, up_offset):
    B: gl.constexpr = acc_BM.shape[0]
    M: gl.constexpr = acc_BM.shape[1]
    # A gate and its up, neighbours in B, come to one thread.
    pairs: gl.constexpr = gl.BlockedLayout([16, 1], [4, 8], [gl.num_warps() // 4, 4], [0, 1])
    acc_BM = gl.convert_layout(acc_BM, pairs)
    n_B = n + gl.arange(0, B, layout=gl.SliceLayout(1, pairs))
    acc_BM += gl.load(bias_ptr + expert.to(gl.int64) * rows + n_B, n_B < rows, other=0).to(gl.float32)[:, None]
    gate_IM, up_IM = acc_BM.reshape([B // 2, 2, M]).permute([0, 2, 1]).split()
    # comparisons that are false for NaN: it must pass
    gate_IM = gl.where(gate_IM > limit, limit, gate_IM)
    up_IM = gl.where(up_IM > limit, limit, gl.where(up_IM < -limit, -limit, up_IM))
    h_IM = gate_IM * (1 / (1 + gl.exp(-(alpha * gate_IM)))) * (up_IM + up_offset)

    halves: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [gl.num_warps() // 4, 4], [0, 1])
    i_I = n // 2 + gl.arange(0, B // 2, layout=gl.SliceLayout(1, halves))
    row_M = first + gl.arange(0, M, layout=gl.SliceLayout(0, halves))
    to_IM = h_ptr + row_M.to(gl.int64)[None, :] * (rows // 2) + i_I[:, None]
    h_IM = gl.convert_layout(h_IM, halves).to(h_ptr.dtype.element_ty)
    gl.store(to_IM, h_IM, (i_I < rows // 2)[:, None] & (row_M < stop)[None, :])


@gluon.jit
def _store_y(acc_BM, bias_ptr, slot_ptr, weight_ptr, y_ptr, expert, n, first, stop, rows):
    B: gl.constexpr = acc_BM.shape[0]
    M: gl.constexpr = acc_BM.shape[1]
    mma: gl.constexpr = acc_BM.type.layout
    n_B = n + gl.arange(0, B, layout=gl.SliceLayout(1, mma))
    acc_BM += gl.load(bias_ptr + expert.to(gl.int64) * rows + n_B, n_B < rows, other=0).to(gl.float32)[:, None]
    row_M = first + gl.arange(0, M, layout=gl.SliceLayout(0, mma))
    slot_M = gl.load(slot_ptr + row_M, row_M < stop, other=0)
    acc_BM *= gl.load(weight_ptr + slot_M, row_M < stop, other=0)[None, :]

    along: gl.constexpr = gl.BlockedLayout([8, 1], [4, 8], [gl.num_warps() // 4, 4], [0, 1])
    n_B = n + gl.arange(0, B, layout=gl.SliceLayout(1, along))
    row_M = first + gl.arange(0, M, layout=gl.SliceLayout(0, along))
    slot_M = gl.load(slot_ptr + row_M, row_M < stop, other=0)
    to_BM = y_ptr + slot_M.to(gl.int64)[None, :] * rows + n_B[:, None]
    y_BM = gl.convert_layout(acc_BM.to(y_ptr.dtype.element_ty), along)
    gl.store(to_BM, y_BM, (n_B < rows)[:, None] & (row_M < stop)[None, :])


@gluon.jit
def _find_tile(offset_ptr, tile, num_local, LOCAL: gl.constexpr, M: gl.constexpr, MORE: gl.constexpr):
    """The tile-th run of M rows, counted expert by expert → (expert, its first row, its last row + 1).

    An expert's last run has up to MORE rows in addition. The expert is num_local or more where there is no such tile.
    """
    l_L = gl.arange(0, LOCAL, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    start_L = gl.load(offset_ptr + l_L, l_L < num_local, other=0)
    rows_L = gl.load(offset_ptr + l_L + 1, l_L < num_local, other=0) - start_L
    tiles_L = gl.where(rows_L > 0, gl.maximum((rows_L - MORE + M - 1) // M, 1), 0)
    passed_L = gl.associative_scan(tiles_L, 0, _add) <= tile  # experts whose tiles all come before
    expert = gl.sum(passed_L.to(gl.int32), 0)
    inside = tile - gl.sum(gl.where(passed_L, tiles_L, 0), 0)
    known = gl.minimum(expert, num_local - 1)
    first, stop = gl.load(offset_ptr + known) + inside * M, gl.load(offset_ptr + known + 1)
    return expert, first, gl.where(stop - first > M + MORE, first + M, stop)


@gluon.jit
def _add(a, b):
    return a + b
