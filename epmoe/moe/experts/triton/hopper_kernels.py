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
the last weight rows take half of B where that holds them, else the last of an expert's rows half of M, or of the large
tile three quarters: two products beside each other then, of M/2 and of M/4 rows, with the same weights.
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
_LARGE = gl.constexpr(128)  # rows of a tile that has three quarters, too
_RUN = gl.constexpr(256)  # columns of a run of 4 pairs
_STRIP = gl.constexpr(words.STRIP)


@gluon.jit(do_not_specialize=["num_local"])
def gate_up_kernel(
    x_desc,  # [R, H] bf16, the tokens' rows sorted by expert, in blocks [M, 256]
    x_half_desc,  # the same in blocks [M/2, 256]
    x_quarter_desc,  # the same in blocks [M/4, 256]
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
    tile = (expert, n, first, stop, rows)
    weights, to = (word_desc, word_ptr, scale_ptr), (bias_ptr, h_ptr, alpha, limit, up_offset)
    whole, half = (x_desc, x_quarter_desc, x_ptr), (x_half_desc, x_quarter_desc, x_ptr)
    if rows - n <= B // 2:
        _tile_of_h(whole, (word_half_desc, word_ptr, scale_ptr), to, tile, COLUMNS, B // 2, M, 0, WIDE, PDL)
    elif stop - first <= M // 2:
        _tile_of_h(half, weights, to, tile, COLUMNS, B, M // 2, 0, WIDE, PDL)
    elif M < _LARGE:
        _tile_of_h(whole, weights, to, tile, COLUMNS, B, M, 0, WIDE, PDL)
    elif stop - first <= M // 4 * 3:
        _tile_of_h(half, weights, to, tile, COLUMNS, B, M // 2, M // 4, WIDE, PDL)
    else:
        _tile_of_h(whole, weights, to, tile, COLUMNS, B, M, 0, WIDE, PDL)


@gluon.jit(do_not_specialize=["num_local"])
def down_kernel(
    h_desc,  # [R, I] bf16 in blocks [M, 256]
    h_half_desc,  # the same in blocks [M/2, 256]
    h_quarter_desc,  # the same in blocks [M/4, 256]
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
    tile = (expert, n, first, stop, rows)
    weights, to = (word_desc, word_ptr, scale_ptr), (bias_ptr, slot_ptr, weight_ptr, y_ptr)
    whole, half = (h_desc, h_quarter_desc, h_ptr), (h_half_desc, h_quarter_desc, h_ptr)
    if rows - n <= B // 2:
        _tile_of_y(whole, (word_half_desc, word_ptr, scale_ptr), to, tile, COLUMNS, B // 2, M, 0, WIDE, PDL)
    elif stop - first <= M // 2:
        _tile_of_y(half, weights, to, tile, COLUMNS, B, M // 2, 0, WIDE, PDL)
    elif M < _LARGE:
        _tile_of_y(whole, weights, to, tile, COLUMNS, B, M, 0, WIDE, PDL)
    elif stop - first <= M // 4 * 3:
        _tile_of_y(half, weights, to, tile, COLUMNS, B, M // 2, M // 4, WIDE, PDL)
    else:
        _tile_of_y(whole, weights, to, tile, COLUMNS, B, M, 0, WIDE, PDL)


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
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    expert, n, first, stop, rows = tile
    bias_ptr, h_ptr, alpha, limit, up_offset = to
    sums = _product(x, weights, expert, n, first, stop, rows, COLUMNS, B, M, MORE, WIDE, PDL)
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
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    expert, n, first, stop, rows = tile
    bias_ptr, slot_ptr, weight_ptr, y_ptr = to
    sums = _product(h, weights, expert, n, first, stop, rows, COLUMNS, B, M, MORE, WIDE, PDL)
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
    x,
    weights,
    expert,
    n,
    first,
    stop,
    rows,
    COLUMNS: gl.constexpr,
    B: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """float32 [B, M]: rows n … of the expert's matrix times rows first … of x, over all columns.

    Rows from `stop` on, and weight rows from `rows` on, may be another expert's: nothing of them is stored.

    Args:
        x: of blocks [M, 256], of blocks [MORE, 256], and where it begins.
        MORE: rows of x behind the M, whose product is the second result; 0: none.
    """
    x_desc, more_desc, x_ptr = x
    word_desc, word_ptr, scale_ptr = weights
    pairs: gl.constexpr = (COLUMNS + 63) // 64
    runs: gl.constexpr = pairs // 4
    scales: gl.constexpr = runs * 2 + pairs % 4  # V
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    x_s2MC = gl.allocate_shared_memory(gl.bfloat16, [2, M, _RUN], SHARED)
    more_s2MC = x_s2MC
    if MORE:
        more_s2MC = gl.allocate_shared_memory(gl.bfloat16, [2, MORE, _RUN], SHARED)
    word_s2ZBQ = gl.allocate_shared_memory(gl.int16, [2, B // _STRIP, _STRIP, _RUN // 4], WORDS)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
    _sync()
    strip = expert * gl.cdiv(rows, _STRIP) + n // _STRIP
    descs, buffers = (x_desc, more_desc, word_desc), (x_s2MC, more_s2MC, word_s2ZBQ, ready)
    _copy_run(descs, buffers, 0, first, strip, B, M, MORE, PDL)
    if pairs % 4:
        x_sMC, more_sMC, rest_sBQ = _copy_rest(x_ptr, word_ptr, strip, first, stop, rows - n, COLUMNS, B, M, MORE)

    b_B = gl.arange(0, B, layout=gl.SliceLayout(1, left))
    real_B = n + b_B < rows
    scale_B = scale_ptr + (strip.to(gl.int64) + b_B // _STRIP) * (scales * _STRIP) + b_B % _STRIP
    scale0_B = gl.load(scale_B, real_B, other=0)
    scale1_B = gl.load(scale_B + _STRIP, real_B, other=0)
    sums = _sums(B, M, MORE, mma)
    for run in range(0, runs):
        side = run % 2
        mbarrier.wait(ready.index(side), run // 2 % 2)
        # the next run's scales, or the rest's, a run ahead
        scale_B += 2 * _STRIP
        next0_B = gl.load(scale_B, real_B & (2 * run + 2 < scales), other=0)
        next1_B = gl.load(scale_B + _STRIP, real_B & (run + 1 < runs), other=0)
        x_MC, more_MC = x_s2MC.index(side), more_s2MC.index(side)
        word_sBQ = word_s2ZBQ.index(side).reshape([B, _RUN // 4])
        word0_BQ = word_sBQ.slice(0, 32, dim=1).load(left)
        word1_BQ = word_sBQ.slice(32, 32, dim=1).load(left)
        # Each product is waited for when the one after it has begun; until then its operand keeps its registers.
        even_BQ = _values(word0_BQ, scale0_B, 0, WIDE)
        sums = _multiply(even_BQ, x_MC, more_MC, 0, 32, sums)
        sums, even_BQ, _ = _wait(sums, even_BQ, even_BQ)
        # Now the run before is multiplied, so its buffers are free: in all threads, after _sync.
        if run + 1 < runs:
            _sync()
            _copy_run(descs, buffers, run + 1, first, strip, B, M, MORE, False)
        odd_BQ = _values(word1_BQ, scale1_B, 0, WIDE)
        sums = _multiply(odd_BQ, x_MC, more_MC, 32, 32, sums)
        sums, even_BQ, odd_BQ = _wait(sums, even_BQ, odd_BQ)
        for j in gl.static_range(1, 4):
            even_BQ = _values(word0_BQ, scale0_B, j, WIDE)
            sums = _multiply(even_BQ, x_MC, more_MC, 64 * j, 32, sums)
            sums, even_BQ, odd_BQ = _wait(sums, even_BQ, odd_BQ)
            odd_BQ = _values(word1_BQ, scale1_B, j, WIDE)
            sums = _multiply(odd_BQ, x_MC, more_MC, 64 * j + 32, 32, sums)
            sums, even_BQ, odd_BQ = _wait(sums, even_BQ, odd_BQ)
        scale0_B, scale1_B = next0_B, next1_B
    if pairs % 4:
        async_copy.wait_group(0)
        fence_async_shared()
        word_BQ = rest_sBQ.load(left)
        for j in gl.static_range(4):
            value_BQ = _values(word_BQ, scale0_B, j, WIDE)
            sums = _multiply(value_BQ, x_sMC, more_sMC, 16 * j, 16, sums)
            sums, value_BQ = _finish(sums, value_BQ)
    sums, _ = _finish(sums, scale0_B)
    for i in gl.static_range(2):
        mbarrier.invalidate(ready.index(i))
    return sums


@gluon.jit
def _sums(B: gl.constexpr, M: gl.constexpr, MORE: gl.constexpr, mma: gl.constexpr):
    """Of one product or of both."""
    acc_BM = gl.zeros([B, M], gl.float32, layout=mma)
    if MORE:
        other: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, MORE, 16])
        return acc_BM, gl.zeros([B, MORE], gl.float32, layout=other)
    else:
        return (acc_BM,)


@gluon.jit
def _multiply(value_BQ, x_MC, more_MC, AT: gl.constexpr, C: gl.constexpr, sums):
    """Begin the products with columns AT … AT + C - 1 of x."""
    acc_BM = warpgroup_mma(value_BQ, x_MC.slice(AT, C, dim=1).permute([1, 0]), sums[0], is_async=True)
    if len(sums) > 1:
        same: gl.constexpr = gl.DotOperandLayout(0, sums[1].type.layout, 2)
        value_BQ = gl.convert_layout(value_BQ, same, assert_trivial=True)
        more_BM = warpgroup_mma(value_BQ, more_MC.slice(AT, C, dim=1).permute([1, 0]), sums[1], is_async=True)
        return acc_BM, more_BM
    else:
        return (acc_BM,)


@gluon.jit
def _wait(sums, even_BQ, odd_BQ):
    """Until what was begun before the last `_multiply` has ended; till then its operand keeps its registers."""
    if len(sums) > 1:
        acc_BM, more_BM, even_BQ, odd_BQ = warpgroup_mma_wait(2, deps=[sums[0], sums[1], even_BQ, odd_BQ])
        return (acc_BM, more_BM), even_BQ, odd_BQ
    else:
        acc_BM, even_BQ, odd_BQ = warpgroup_mma_wait(1, deps=[sums[0], even_BQ, odd_BQ])
        return (acc_BM,), even_BQ, odd_BQ


@gluon.jit
def _finish(sums, value_BQ):
    """Until all has ended."""
    if len(sums) > 1:
        acc_BM, more_BM, value_BQ = warpgroup_mma_wait(0, deps=[sums[0], sums[1], value_BQ])
        return (acc_BM, more_BM), value_BQ
    else:
        acc_BM, value_BQ = warpgroup_mma_wait(0, deps=[sums[0], value_BQ])
        return (acc_BM,), value_BQ


@gluon.jit
def _copy_run(descs, buffers, run, row, strip, B: gl.constexpr, M: gl.constexpr, MORE: gl.constexpr, PDL: gl.constexpr):
    """Start copying a run's words [B, 64] and x [M, 256]; its side's barrier tells when they are there.

    With PDL the kernel in front, which makes x, may still run (gpu.py): the words are under way before it has ended.
    """
    x_desc, more_desc, word_desc = descs
    x_s2MC, more_s2MC, word_s2ZBQ, ready = buffers
    side = run % 2
    mbarrier.expect(ready.index(side), (M + MORE) * _RUN * 2 + B * _RUN // 2)
    tma.async_copy_global_to_shared(word_desc, [strip, run * _STRIP, 0], ready.index(side), word_s2ZBQ.index(side))
    after_previous(PDL)
    next_may_begin(PDL)
    tma.async_copy_global_to_shared(x_desc, [row, run * _RUN], ready.index(side), x_s2MC.index(side))
    if MORE:
        tma.async_copy_global_to_shared(more_desc, [row + M, run * _RUN], ready.index(side), more_s2MC.index(side))


@gluon.jit
def _copy_rest(
    x_ptr,
    word_ptr,
    strip,
    first,
    stop,
    real_rows,
    COLUMNS: gl.constexpr,
    B: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,
):
    """Start copying the run of one pair that ends a row: x [M, 64], and [MORE, 64], and words [B, 16]."""
    pairs: gl.constexpr = (COLUMNS + 63) // 64
    x_sMC = gl.allocate_shared_memory(gl.bfloat16, [M, 64], _SHARED_REST)
    _copy_end(x_ptr, x_sMC, first, stop, COLUMNS, M)
    more_sMC = x_sMC
    if MORE:
        more_sMC = gl.allocate_shared_memory(gl.bfloat16, [MORE, 64], _SHARED_REST)
        _copy_end(x_ptr, more_sMC, first + M, stop, COLUMNS, MORE)

    word_sBQ = gl.allocate_shared_memory(gl.int16, [B, 16], _SHARED_REST)
    by_word: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [gl.num_warps(), 1], [1, 0])
    b_B = gl.arange(0, B, layout=gl.SliceLayout(1, by_word))
    q_Q = gl.arange(0, 16, layout=gl.SliceLayout(0, by_word))
    of_B = (strip.to(gl.int64) + b_B // _STRIP) * (_STRIP * 16 * pairs) + (pairs - 1) * 16 * _STRIP + b_B % _STRIP * 16
    word_BQ = word_ptr + of_B[:, None] + q_Q[None, :]
    async_copy.async_copy_global_to_shared(word_sBQ, word_BQ, mask=(b_B < real_rows)[:, None])
    async_copy.commit_group()
    return x_sMC, more_sMC, word_sBQ


@gluon.jit
def _copy_end(x_ptr, x_sMC, first, stop, COLUMNS: gl.constexpr, M: gl.constexpr):
    pairs: gl.constexpr = (COLUMNS + 63) // 64
    by_x: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    m_M = gl.arange(0, M, layout=gl.SliceLayout(1, by_x))
    column_C = (pairs - 1) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, by_x))
    x_MC = x_ptr + first.to(gl.int64) * COLUMNS + (m_M[:, None] * COLUMNS + column_C[None, :])
    used_MC = (m_M < stop - first)[:, None] & (column_C < COLUMNS)[None, :]
    async_copy.async_copy_global_to_shared(x_sMC, x_MC, mask=used_MC)


@gluon.jit
def _values(word_BQ, scale_B, J: gl.constexpr, WIDE: gl.constexpr):
    """Words int16 [B, Q] and their scale words int32 [B] → the bf16 values of code J (words.py) [B, Q]."""
    return words_to_values(word_BQ, scale_B[:, None], J, WIDE, True)
