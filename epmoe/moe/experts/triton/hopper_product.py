"""The product of one tile of hopper_kernels.py: weights out of their words, tokens, and copies, one beside the other.

Letters: as there. D pieces of x in shared memory; 1, a dimension of one.

    tensor cores        product of run r, code j     code j+1           code j+2 …       (asynchronous, in order)
    the other units     codes j+1 → bf16             codes j+2 → bf16   …
    copy engine (TMA)   words of run r+1, the next pieces of x …                         (a barrier each)

Words are in registers as soon as a run begins, so one place in shared memory is enough for them. x has a ring of D
places for pieces of a run: of two, if a piece is a whole run, or of three, if a run has two pieces. When the product of
a piece has ended, the one that is a run ahead takes its place.

The sum runs over the columns upwards in steps of 16 in one accumulator, as in kernels.py: same bits.
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
from triton.tools.ragged_tma import to_ragged_indices

from epmoe.kernels.gpu import after_previous, next_may_begin
from epmoe.moe.experts.triton import words
from epmoe.moe.experts.triton.words import words_to_values

_sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7

# Shared memory as the tensor cores read it, in lines of 128 bytes as the L2 cache has them: with 64 the copy engine
# brings half as much at a time, and a layer takes 2 to 5 % longer. Two dimensions in front are the copy engine's, which
# knows by them where an expert's rows end (hopper.py).
BLOCK = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
# Lines of 16 columns for the run of one pair at the end of a row.
_SHARED_REST = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2))
# The words of a run, whole strips.
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
RUN = 256  # columns of a run of 4 pairs
_RUN = gl.constexpr(RUN)
_STRIP = gl.constexpr(words.STRIP)


@gluon.jit
def product(
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
    PIECES: gl.constexpr,
    WIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """float32 [B, M]: rows n … of the expert's matrix times rows first … of x, over all columns; and, if MORE is not 0,
    [B, MORE], the same with the rows of x behind these. A tuple of one or two.

    Rows from `stop` on are zeros, which take neither copies nor much power; weight rows from `rows` on may be another
    expert's. Nothing of either is to be stored.

    Args:
        x: in blocks of M rows, in blocks of MORE, both of a piece's columns (hopper.py), and where it begins.
        PIECES: of a run of x, 1 or 2.
    """
    x_desc, more_desc, x_ptr = x
    word_desc, word_ptr, scale_ptr = weights
    pairs: gl.constexpr = (COLUMNS + 63) // 64
    runs: gl.constexpr = pairs // 4
    scales: gl.constexpr = runs * 2 + pairs % 4  # V
    WIDTH: gl.constexpr = _RUN // PIECES
    RING: gl.constexpr = PIECES + 1  # that are in shared memory
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    x_sD11MC = gl.allocate_shared_memory(gl.bfloat16, [RING, 1, 1, M, WIDTH], BLOCK)
    more_sD11MC = x_sD11MC
    if MORE:
        more_sD11MC = gl.allocate_shared_memory(gl.bfloat16, [RING, 1, 1, MORE, WIDTH], BLOCK)
    word_sZBQ = gl.allocate_shared_memory(gl.int16, [B // _STRIP, _STRIP, _RUN // 4], WORDS)
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(ready.index(i), count=1)
    _sync()
    strip = expert * gl.cdiv(rows, _STRIP) + n // _STRIP
    buffers = (x_desc, more_desc, word_desc, x_sD11MC, more_sD11MC, word_sZBQ, ready)
    for piece in gl.static_range(PIECES):
        _copy_piece(buffers, 0, piece, piece, first, stop, strip, B, M, MORE, PIECES, PDL and piece == 0)
    if pairs % 4:
        x_sMC, more_sMC, rest_sBQ = _copy_rest(x_ptr, word_ptr, strip, first, stop, rows - n, COLUMNS, B, M, MORE)

    b_B = gl.arange(0, B, layout=gl.SliceLayout(1, left))
    real_B = n + b_B < rows
    scale_B = scale_ptr + (strip.to(gl.int64) + b_B // _STRIP) * (scales * _STRIP) + b_B % _STRIP
    scale0_B = gl.load(scale_B, real_B, other=0)
    scale1_B = gl.load(scale_B + _STRIP, real_B, other=0)
    sums = _sums(B, M, MORE, mma)
    slot, free, turn = 0, PIECES, 0  # the places of this piece and of one to come, the phase of this one's barrier
    odd_BQ = gl.zeros([B, 32], gl.bfloat16, layout=left)
    for run in range(0, runs):
        mbarrier.wait(ready.index(slot), turn)
        # the next run's scales, or the rest's, a run ahead
        scale_B += 2 * _STRIP
        next0_B = gl.load(scale_B, real_B & (2 * run + 2 < scales), other=0)
        next1_B = gl.load(scale_B + _STRIP, real_B & (run + 1 < runs), other=0)
        word_sBQ = word_sZBQ.reshape([B, _RUN // 4])
        word0_BQ = word_sBQ.slice(0, 32, dim=1).load(left)
        word1_BQ = word_sBQ.slice(32, 32, dim=1).load(left)
        for piece in gl.static_range(PIECES):
            if piece > 0:
                mbarrier.wait(ready.index(slot), turn)
            x_MC = x_sD11MC.index(slot).reshape([M, WIDTH])
            more_MC = x_MC
            if MORE:
                more_MC = more_sD11MC.index(slot).reshape([MORE, WIDTH])
            for j in gl.static_range(4 // PIECES):
                # A product is waited for when the one after it has begun; until then its operand keeps its registers.
                even_BQ = _values(word0_BQ, scale0_B, piece * (4 // PIECES) + j, WIDE)
                sums = _multiply(even_BQ, x_MC, more_MC, 64 * j, 32, sums)
                sums, even_BQ, odd_BQ = _wait(sums, even_BQ, odd_BQ)
                if j == 0:
                    # Now the piece before is multiplied, so its place is free, and that of the words, which are in
                    # registers: in all threads, after _sync.
                    _sync()
                    _copy_next(buffers, run + 1, runs, piece, free, first, stop, strip, B, M, MORE, PIECES)
                odd_BQ = _values(word1_BQ, scale1_B, piece * (4 // PIECES) + j, WIDE)
                sums = _multiply(odd_BQ, x_MC, more_MC, 64 * j + 32, 32, sums)
                sums, even_BQ, odd_BQ = _wait(sums, even_BQ, odd_BQ)
            free = slot
            slot += 1
            if slot == RING:
                slot = 0
                turn ^= 1
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
    for i in gl.static_range(RING):
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
def _copy_piece(
    buffers,
    run,
    PIECE: gl.constexpr,
    slot,
    first,
    stop,
    strip,
    B: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,
    PIECES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Start copying a piece of a run's x, [M, 256 / PIECES] and [MORE, 256 / PIECES], and with the first one the run's
    words [B, 64]; its place's barrier tells when all is there.

    With PDL the kernel in front, which makes x, may still run (gpu.py): the words are under way before it has ended.
    """
    x_desc, more_desc, word_desc, x_sD11MC, more_sD11MC, word_sZBQ, ready = buffers
    WIDTH: gl.constexpr = _RUN // PIECES
    column = run * _RUN + PIECE * WIDTH
    if PIECE == 0:
        mbarrier.expect(ready.index(slot), (M + MORE) * WIDTH * 2 + B * _RUN // 2)
        tma.async_copy_global_to_shared(word_desc, [strip, run * _STRIP, 0], ready.index(slot), word_sZBQ)
    else:
        mbarrier.expect(ready.index(slot), (M + MORE) * WIDTH * 2)
    after_previous(PDL)
    next_may_begin(PDL)
    tma.async_copy_global_to_shared(x_desc, _block(first, stop, 0, column), ready.index(slot), x_sD11MC.index(slot))
    if MORE:
        more_at = _block(first, stop, M, column)
        tma.async_copy_global_to_shared(more_desc, more_at, ready.index(slot), more_sD11MC.index(slot))


@gluon.jit
def _block(first, stop, row, column):
    """Coordinates of the block that begins `row` rows behind `first` and has nothing from `stop` on."""
    anywhere, end, begin = to_ragged_indices(first, stop - first, row)
    return [anywhere, end, begin, column]


@gluon.jit
def _copy_next(
    buffers,
    run,
    runs,
    PIECE: gl.constexpr,
    slot,
    first,
    stop,
    strip,
    B: gl.constexpr,
    M: gl.constexpr,
    MORE: gl.constexpr,
    PIECES: gl.constexpr,
):
    """If there is such a run."""
    if run < runs:
        _copy_piece(buffers, run, PIECE, slot, first, stop, strip, B, M, MORE, PIECES, False)


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
    """Start copying the run of one pair that ends a row: x [M, 64], [MORE, 64] and words [B, 16]."""
    pairs: gl.constexpr = (COLUMNS + 63) // 64
    x_sMC = _copy_rest_of_x(x_ptr, first, stop, COLUMNS, M)
    more_sMC = x_sMC
    if MORE:
        more_sMC = _copy_rest_of_x(x_ptr, first + M, stop, COLUMNS, MORE)

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
def _copy_rest_of_x(x_ptr, first, stop, COLUMNS: gl.constexpr, M: gl.constexpr):
    x_sMC = gl.allocate_shared_memory(gl.bfloat16, [M, 64], _SHARED_REST)
    by_x: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    m_M = gl.arange(0, M, layout=gl.SliceLayout(1, by_x))
    column_C = (COLUMNS - 1) // 64 * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, by_x))
    x_MC = x_ptr + first.to(gl.int64) * COLUMNS + (m_M[:, None] * COLUMNS + column_C[None, :])
    used_MC = (m_M < stop - first)[:, None] & (column_C < COLUMNS)[None, :]
    async_copy.async_copy_global_to_shared(x_sMC, x_MC, mask=used_MC)
    return x_sMC


@gluon.jit
def _values(word_BQ, scale_B, J: gl.constexpr, WIDE: gl.constexpr):
    """Words int16 [B, Q] and their scale words int32 [B] → the bf16 values of code J (words.py) [B, Q]."""
    return words_to_values(word_BQ, scale_B[:, None], J, WIDE, True)
