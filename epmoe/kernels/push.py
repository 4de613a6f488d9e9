"""A rank's slot rows into its peers' memory, in Triton: push.py's functions. Reading them is the norm's (norm.py).

A program a slot; its rank's stores go out over NVLink while it has ended already, and nothing waits for them here.
Kernels know a place by its addresses alone, this rank's own included: Triton asks the driver about each tensor that it
is given, and of memory that several GPUs map some drivers say nothing.

Letters: T tokens · K experts per token · H hidden · S = T·K slots · N ranks.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from epmoe.kernels import symmetric
from epmoe.kernels.gpu import after_previous, early, next_may_begin
from epmoe.kernels.symmetric import Place

TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_ALIGNED = tl.constexpr(symmetric.ALIGNED)
_MARKS = tl.constexpr(symmetric.MARKS)
_POISON = tl.constexpr(symmetric.POISON)


def serves(x_TH: torch.Tensor) -> bool:
    """Any rows."""
    return True


def push(y_TKH: torch.Tensor, row_S: torch.Tensor, place: Place) -> None:
    """As `push.push`."""
    slots, hidden = row_S.numel(), y_TKH.shape[2]
    assert y_TKH.is_contiguous() and y_TKH.numel() == slots * hidden
    if slots:
        push_kernel[(slots,)](
            y_TKH,
            row_S,
            place.address_N,
            place.rank,
            H=hidden,
            HP=triton.next_power_of_2(hidden),
            N=len(place.byte_N),
            num_warps=8,
            **early(y_TKH.device),
        )


def arrive(rows_TKH: torch.Tensor, place: Place) -> None:
    """As `push.arrive`: what comes next on the stream finds the rows. They and the marks stay."""
    tokens, top_k, hidden = rows_TKH.shape
    arrive_kernel[(tokens,)](
        place.address_N,
        place.rank,
        DTYPE=TYPES[rows_TKH.dtype],
        H=hidden,
        K=top_k,
        HP=triton.next_power_of_2(hidden),
        N=len(place.byte_N),
        num_warps=8,
    )


@triton.jit(do_not_specialize=["rank"])
def push_kernel(
    y_ptr,  # [S, H]
    row_ptr,  # int32 [S], -1: not this rank's
    address_ptr,  # int64 [N], the place on each rank
    rank,
    H: tl.constexpr,
    HP: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program s: slot s, if it is this rank's; the first one the mark, too."""
    after_previous(PDL)
    next_may_begin(PDL)
    s = tl.program_id(0).to(tl.int64)
    if s == 0:
        put_marks(address_ptr, rank, N)
    if tl.load(row_ptr + s) >= 0:
        h_H = tl.arange(0, HP)
        y_H = tl.load(y_ptr + s * H + h_H, h_H < H, other=0)
        bits_H = y_H.to(_integer(y_H.dtype), bitcast=True)
        y_H = tl.where(bits_H == _POISON, _nan(y_H.dtype), bits_H).to(y_H.dtype, bitcast=True)
        for peer in tl.static_range(N):
            tl.store(rows_of(address_ptr, peer, y_ptr.dtype) + s * H + h_H, y_H, h_H < H)


@triton.jit(do_not_specialize=["rank"])
def arrive_kernel(
    address_ptr,  # int64 [N], the place on each rank
    rank,
    DTYPE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HP: tl.constexpr,
    N: tl.constexpr,
):
    """Program t: until token t's rows are here, the first one for the marks, too."""
    t = tl.program_id(0).to(tl.int64)
    if t == 0:
        wait_marks(address_ptr, rank, N)
    h_H = tl.arange(0, HP)
    sum_arrived(rows_of(address_ptr, rank, tl.pointer_type(DTYPE)), t, h_H, h_H < H, H, K, HP)


@triton.jit
def rows_of(address_ptr, rank, type):
    """Where the rows of the place on a rank begin: a pointer of that type."""
    return tl.multiple_of((tl.load(address_ptr + rank) + _MARKS).to(type), _ALIGNED)


@triton.jit
def put_marks(address_ptr, rank, N: tl.constexpr):
    """This rank's mark, on all ranks."""
    for peer in tl.static_range(N):
        tl.store(tl.load(address_ptr + peer).to(tl.pointer_type(tl.int32)) + rank, 1)


@triton.jit
def wait_marks(address_ptr, rank, N: tl.constexpr):
    """Until all ranks' marks are here, and each thread has seen them: what comes next may be `leave_marks`.

    There are fewer marks than threads, so every warp looks at them by itself, and one that looked again after another
    had left POISON would look for ever.
    """
    mark_ptr = tl.load(address_ptr + rank).to(tl.pointer_type(tl.int32))
    n_N = tl.arange(0, _lanes(N))
    missing = 1
    while missing > 0:
        mark_N = tl.load(mark_ptr + n_N, n_N < N, other=0, volatile=True)
        missing = tl.sum((mark_N == _POISON).to(tl.int32), 0)
    tl.debug_barrier()


@triton.jit
def sum_arrived(rows_ptr, t, h_H, real_H, H: tl.constexpr, K: tl.constexpr, HP: tl.constexpr):
    """float32 [HP]: token t's K rows, added upwards from +0, once all their values are here."""
    add_H = tl.zeros([HP], tl.float32)
    missing = 1
    while missing > 0:
        add_H = tl.zeros([HP], tl.float32)
        poison_H = tl.zeros([HP], tl.int32)
        for k in tl.static_range(K):
            row_H = tl.load(rows_ptr + (t * K + k) * H + h_H, real_H, other=0, volatile=True)
            poison_H += (row_H.to(_integer(row_H.dtype), bitcast=True) == _POISON).to(tl.int32)
            add_H += row_H.to(tl.float32)
        missing = tl.max(poison_H, 0)
    return add_H


@triton.jit
def leave_rows(rows_ptr, t, h_H, real_H, H: tl.constexpr, K: tl.constexpr, HP: tl.constexpr):
    """Token t's rows are read: POISON."""
    type: tl.constexpr = rows_ptr.dtype.element_ty
    poison_H = tl.full([HP], _POISON, _integer(type)).to(type, bitcast=True)
    for k in tl.static_range(K):
        tl.store(rows_ptr + (t * K + k) * H + h_H, poison_H, real_H)


@triton.jit
def leave_marks(address_ptr, rank, N: tl.constexpr):
    """The marks are seen: POISON."""
    mark_ptr = tl.load(address_ptr + rank).to(tl.pointer_type(tl.int32))
    n_N = tl.arange(0, _lanes(N))
    tl.store(mark_ptr + n_N, tl.full([_lanes(N)], _POISON, tl.int32), n_N < N)


@triton.constexpr_function
def _lanes(ranks):
    """N rounded up: no two lanes of a warp look at one mark, so all of them come to one sum."""
    return max(32, 1 << (ranks - 1).bit_length())


@triton.constexpr_function
def _nan(type):
    return (1 << type.primitive_bitwidth - 1) - 1


@triton.constexpr_function
def _integer(type):
    return {16: tl.int16, 32: tl.int32}[type.primitive_bitwidth]
