"""The two grouped products for many rows an expert, on Hopper: what kernels.py computes, bit for bit, in Gluon.

Letters: T tokens · H hidden · I intermediate · K experts per token · L experts on this rank · S = T·K slots · R = S
rows of this rank, sorted by expert · of the weights (words.py): P pairs of 32-column groups, Z strips of 64
rows, V columns of scale words · in a program: B weight rows (in arrays of words: a strip's), M rows of R (tokens), C
columns.

With many rows arithmetic is the limit, and in plain Triton each product waits for the one before it, since its left
operand is made in registers. Gluon lets a program say what runs beside what:

    tensor cores        product of run r, code j     code j+1           code j+2 …       (asynchronous, in order)
    the other units     codes j+1 → bf16             codes j+2 → bf16   …
    copy engine (TMA)   x and words of run r+1 …                                         (two buffers, a barrier each)

The sum runs over the columns upwards in steps of 16 in one accumulator, as there: same bits. A program's tile is B × M;
the last weight rows take half of B where that holds them, else the last of an expert's rows half of M.
"""

# mypy: disallow-untyped-defs=False

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from epmoe.kernels.gpu import after_previous, next_may_begin
from epmoe.moe.experts.triton import words
from epmoe.moe.experts.triton.words import words_to_values

_sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7

# Shared memory as the tensor cores read it: rows of 32 columns, since a step's codes are scaled in groups of 32 …
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
# … and of 16 for the run of one pair at the end of a row.
_SHARED_REST = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2))
# The words of a run, whole strips.
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=3))
_RUN = gl.constexpr(256)  # columns of a run of 4 pairs
_STRIP = gl.constexpr(words.STRIP)


@gluon.jit(do_not_specialize=["num_local"])
def gate_up_kernel(
    x_desc,  # [R, H] bf16, the tokens' rows sorted by expert, in blocks [M, 256]
    x_half_desc,  # the same in blocks [M/2, 256]
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
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """h[r] = activation(x[r] · gate_upᵀ + bias)."""
    tiles_n = gl.cdiv(rows, B)
    expert, first, stop = _find_tile(offset_ptr, gl.program_id(0) // tiles_n, num_local, LOCAL, M)
    if expert >= num_local:
        after_previous(PDL)
        return
    n = gl.program_id(0) % tiles_n * B
    weights = (word_desc, word_ptr, scale_ptr)
    if rows - n <= B // 2:
        of_half = (word_half_desc, word_ptr, scale_ptr)
        last_BM = _product(x_desc, x_ptr, of_half, expert, n, first, stop, rows, COLUMNS, B // 2, M, WIDE, PDL)
        _store_h(last_BM, bias_ptr, h_ptr, expert, n, first, stop, rows, alpha, limit, up_offset)
    elif stop - first <= M // 2:
        half_BM = _product(x_half_desc, x_ptr, weights, expert, n, first, stop, rows, COLUMNS, B, M // 2, WIDE, PDL)
        _store_h(half_BM, bias_ptr, h_ptr, expert, n, first, stop, rows, alpha, limit, up_offset)
    else:
        acc_BM = _product(x_desc, x_ptr, weights, expert, n, first, stop, rows, COLUMNS, B, M, WIDE, PDL)
        _store_h(acc_BM, bias_ptr, h_ptr, expert, n, first, stop, rows, alpha, limit, up_offset)


@gluon.jit(do_not_specialize=["num_local"])
def down_kernel(
    h_desc,  # [R, I] bf16 in blocks [M, 256]
    h_half_desc,  # the same in blocks [M/2, 256]
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
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """y[slot[r]] = weight[slot[r]] · (h[r] · downᵀ + bias)."""
    tiles_n = gl.cdiv(rows, B)
    expert, first, stop = _find_tile(offset_ptr, gl.program_id(0) // tiles_n, num_local, LOCAL, M)
    if expert >= num_local:
        after_previous(PDL)
        return
    n = gl.program_id(0) % tiles_n * B
    weights = (word_desc, word_ptr, scale_ptr)
    if rows - n <= B // 2:
        of_half = (word_half_desc, word_ptr, scale_ptr)
        last_BM = _product(h_desc, h_ptr, of_half, expert, n, first, stop, rows, COLUMNS, B // 2, M, WIDE, PDL)
        _store_y(last_BM, bias_ptr, slot_ptr, weight_ptr, y_ptr, expert, n, first, stop, rows)
    elif stop - first <= M // 2:
        half_BM = _product(h_half_desc, h_ptr, weights, expert, n, first, stop, rows, COLUMNS, B, M // 2, WIDE, PDL)
        _store_y(half_BM, bias_ptr, slot_ptr, weight_ptr, y_ptr, expert, n, first, stop, rows)
    else:
        acc_BM = _product(h_desc, h_ptr, weights, expert, n, first, stop, rows, COLUMNS, B, M, WIDE, PDL)
        _store_y(acc_BM, bias_ptr, slot_ptr, weight_ptr, y_ptr, expert, n, first, stop, rows)


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
def _find_tile(offset_ptr, tile, num_local, LOCAL: gl.constexpr, M: gl.constexpr):
    """The tile-th run of M rows, counted expert by expert → (expert, its first row, the expert's last row + 1).

    The expert is num_local or more where there is no such tile.
    """
    l_L = gl.arange(0, LOCAL, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    start_L = gl.load(offset_ptr + l_L, l_L < num_local, other=0)
    stop_L = gl.load(offset_ptr + l_L + 1, l_L < num_local, other=0)
    tiles_L = (stop_L - start_L + M - 1) // M
    passed_L = gl.associative_scan(tiles_L, 0, _add) <= tile  # experts whose tiles all come before
    expert = gl.sum(passed_L.to(gl.int32), 0)
    inside = tile - gl.sum(gl.where(passed_L, tiles_L, 0), 0)
    known = gl.minimum(expert, num_local - 1)
    return expert, gl.load(offset_ptr + known) + inside * M, gl.load(offset_ptr + known + 1)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _product(
    x_desc,
    x_ptr,
    weights,
    expert,
    n,
    first,
    stop,
    rows,
    COLUMNS: gl.constexpr,
    B: gl.constexpr,
    M: gl.constexpr,
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """float32 [B, M]: rows n … of the expert's matrix times rows first … of x, over all columns.

    Rows from `stop` on, and weight rows from `rows` on, may be another expert's: nothing of them is stored.
    """
    word_desc, word_ptr, scale_ptr = weights
    pairs: gl.constexpr = (COLUMNS + 63) // 64
    runs: gl.constexpr = pairs // 4
    scales: gl.constexpr = runs * 2 + pairs % 4  # V
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    x_s2MC = gl.allocate_shared_memory(gl.bfloat16, [2, M, _RUN], SHARED)
    word_s2ZBQ = gl.allocate_shared_memory(gl.int16, [2, B // _STRIP, _STRIP, _RUN // 4], WORDS)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    _sync()
    strip = expert * gl.cdiv(rows, _STRIP) + n // _STRIP
    buffers = (x_s2MC, word_s2ZBQ, ready)
    _copy_run(x_desc, word_desc, buffers, 0, first, strip, B, M, PDL)
    if pairs % 4:
        x_sMC, rest_sBQ = _copy_rest(x_ptr, word_ptr, strip, first, stop, rows - n, COLUMNS, B, M)

    b_B = gl.arange(0, B, layout=gl.SliceLayout(1, left))
    real_B = n + b_B < rows
    scale_B = scale_ptr + (strip.to(gl.int64) + b_B // _STRIP) * (scales * _STRIP) + b_B % _STRIP
    scale0_B = gl.load(scale_B, real_B, other=0)
    scale1_B = gl.load(scale_B + _STRIP, real_B, other=0)
    acc_BM = gl.zeros([B, M], gl.float32, layout=mma)
    for run in range(0, runs):
        side = run % 2
        mbarrier.wait(ready.index(side), run // 2 % 2)
        # the next run's scales, or the rest's, a run ahead
        scale_B += 2 * _STRIP
        next0_B = gl.load(scale_B, real_B & (2 * run + 2 < scales), other=0)
        next1_B = gl.load(scale_B + _STRIP, real_B & (run + 1 < runs), other=0)
        x_MC = x_s2MC.index(side)
        word_sBQ = word_s2ZBQ.index(side).reshape([B, _RUN // 4])
        word0_BQ = word_sBQ.slice(0, 32, dim=1).load(left)
        word1_BQ = word_sBQ.slice(32, 32, dim=1).load(left)
        # Each product is waited for when the one after it has begun; until then its operand keeps its registers.
        even_BQ = _values(word0_BQ, scale0_B, 0, WIDE)
        acc_BM = warpgroup_mma(even_BQ, x_MC.slice(0, 32, dim=1).permute([1, 0]), acc_BM, is_async=True)
        acc_BM, even_BQ = warpgroup_mma_wait(1, deps=[acc_BM, even_BQ])
        # Now the run before is multiplied, so its buffers are free: in all threads, after _sync.
        if run + 1 < runs:
            _sync()
            _copy_run(x_desc, word_desc, buffers, run + 1, first, strip, B, M, False)
        odd_BQ = _values(word1_BQ, scale1_B, 0, WIDE)
        acc_BM = warpgroup_mma(odd_BQ, x_MC.slice(32, 32, dim=1).permute([1, 0]), acc_BM, is_async=True)
        acc_BM, even_BQ, odd_BQ = warpgroup_mma_wait(1, deps=[acc_BM, even_BQ, odd_BQ])
        for j in gl.static_range(1, 4):
            even_BQ = _values(word0_BQ, scale0_B, j, WIDE)
            acc_BM = warpgroup_mma(even_BQ, x_MC.slice(64 * j, 32, dim=1).permute([1, 0]), acc_BM, is_async=True)
            acc_BM, even_BQ, odd_BQ = warpgroup_mma_wait(1, deps=[acc_BM, even_BQ, odd_BQ])
            odd_BQ = _values(word1_BQ, scale1_B, j, WIDE)
            acc_BM = warpgroup_mma(odd_BQ, x_MC.slice(64 * j + 32, 32, dim=1).permute([1, 0]), acc_BM, is_async=True)
            acc_BM, even_BQ, odd_BQ = warpgroup_mma_wait(1, deps=[acc_BM, even_BQ, odd_BQ])
        scale0_B, scale1_B = next0_B, next1_B
    if pairs % 4:
        async_copy.wait_group(0)
        fence_async_shared()
        word_BQ = rest_sBQ.load(left)
        for j in gl.static_range(4):
            value_BQ = _values(word_BQ, scale0_B, j, WIDE)
            acc_BM = warpgroup_mma(value_BQ, x_sMC.slice(16 * j, 16, dim=1).permute([1, 0]), acc_BM, is_async=True)
            acc_BM, value_BQ = warpgroup_mma_wait(0, deps=[acc_BM, value_BQ])
    acc_BM = warpgroup_mma_wait(0, deps=[acc_BM])
    for i in gl.static_range(2):
        mbarrier.invalidate(ready.index(i))
    return acc_BM


@gluon.jit
def _copy_run(x_desc, word_desc, buffers, run, row, strip, B: gl.constexpr, M: gl.constexpr, PDL: gl.constexpr):
    """Start copying a run's words [B, 64] and x [M, 256]; its side's barrier tells when they are there.

    With PDL the kernel in front, which makes x, may still run (gpu.py): the words are under way before it has ended.
    """
    x_s2MC, word_s2ZBQ, ready = buffers
    side = run % 2
    mbarrier.expect(ready.index(side), M * _RUN * 2 + B * _RUN // 2)
    tma.async_copy_global_to_shared(word_desc, [strip, run * _STRIP, 0], ready.index(side), word_s2ZBQ.index(side))
    after_previous(PDL)
    next_may_begin(PDL)
    tma.async_copy_global_to_shared(x_desc, [row, run * _RUN], ready.index(side), x_s2MC.index(side))


@gluon.jit
def _copy_rest(x_ptr, word_ptr, strip, first, stop, real_rows, COLUMNS: gl.constexpr, B: gl.constexpr, M: gl.constexpr):
    """Start copying the run of one pair that ends a row: x [M, 64] and words [B, 16]."""
    pairs: gl.constexpr = (COLUMNS + 63) // 64
    x_sMC = gl.allocate_shared_memory(gl.bfloat16, [M, 64], _SHARED_REST)
    by_x: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    m_M = gl.arange(0, M, layout=gl.SliceLayout(1, by_x))
    column_C = (pairs - 1) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, by_x))
    x_MC = x_ptr + first.to(gl.int64) * COLUMNS + (m_M[:, None] * COLUMNS + column_C[None, :])
    used_MC = (m_M < stop - first)[:, None] & (column_C < COLUMNS)[None, :]
    async_copy.async_copy_global_to_shared(x_sMC, x_MC, mask=used_MC)

    word_sBQ = gl.allocate_shared_memory(gl.int16, [B, 16], _SHARED_REST)
    by_word: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [gl.num_warps(), 1], [1, 0])
    b_B = gl.arange(0, B, layout=gl.SliceLayout(1, by_word))
    q_Q = gl.arange(0, 16, layout=gl.SliceLayout(0, by_word))
    of_B = (strip.to(gl.int64) + b_B // _STRIP) * (_STRIP * 16 * pairs) + (pairs - 1) * 16 * _STRIP + b_B % _STRIP * 16
    word_BQ = word_ptr + of_B[:, None] + q_Q[None, :]
    async_copy.async_copy_global_to_shared(word_sBQ, word_BQ, mask=(b_B < real_rows)[:, None])
    async_copy.commit_group()
    return x_sMC, word_sBQ


@gluon.jit
def _values(word_BQ, scale_B, J: gl.constexpr, WIDE: gl.constexpr):
    """Words int16 [B, Q] and their scale words int32 [B] → the bf16 values of code J (words.py) [B, Q]."""
    return words_to_values(word_BQ, scale_B[:, None], J, WIDE, True)
