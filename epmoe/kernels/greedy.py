"""The largest logit of each row in Triton: what greedy.py computes, in two launches for all rows.

Letters: B rows · V ids of the part · S runs of RUN ids.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

# Ids of one program: 25 programs a row for 201,088, all of a program's loads under way at once.
RUN = 8192
WARPS = 8

_NOT_FINITE, _LOW = tl.constexpr(0x7FFFFFFF), tl.constexpr(0xFFFFFFFF)  # as in epmoe/layers/greedy.py
_NOTHING = tl.constexpr(-(1 << 63))  # below every key


def serves(logits_BV: torch.Tensor) -> bool:
    """Any rows."""
    return True


def largest(logits_BV: torch.Tensor, first: int) -> torch.Tensor:
    """As `greedy.largest`, one key for every RUN ids; one launch."""
    (rows, ids), device = logits_BV.shape, logits_BV.device
    assert logits_BV.dtype == torch.float32 and ids > 0 and logits_BV.stride(1) == 1
    key_SB = torch.empty((triton.cdiv(ids, RUN), rows), dtype=torch.int64, device=device)
    if rows:
        largest_kernel[key_SB.shape](logits_BV, key_SB, logits_BV.stride(0), ids, first, rows, N=RUN, num_warps=WARPS)
    return key_SB


def join_largest(key_SB: torch.Tensor, vocab: int) -> torch.Tensor:
    """As `greedy.join_largest`; one launch."""
    parts, rows = key_SB.shape
    assert key_SB.is_contiguous() and key_SB.dtype == torch.int64
    id_B = torch.empty(rows, dtype=torch.int64, device=key_SB.device)
    if rows:
        join_kernel[(rows,)](key_SB, id_B, parts, rows, vocab, SP=triton.next_power_of_2(parts), num_warps=1)
    return id_B


@triton.jit(do_not_specialize=["ids", "first", "rows"])
def largest_kernel(
    logits_ptr,  # float32 [B, V], rows `stride` apart
    key_ptr,  # out int64 [S, B]
    stride,
    ids,
    first,
    rows,
    N: tl.constexpr,
):
    """Program (s, b): the key of ids s·N … of row b."""
    s, b = tl.program_id(0), tl.program_id(1)
    id_N = s * N + tl.arange(0, N)
    real_N = id_N < ids
    value_N = tl.load(logits_ptr + b.to(tl.int64) * stride + id_N, real_N, other=0)
    value_N = tl.where(value_N == 0, 0.0, value_N)  # -0 becomes 0
    bits_N = value_N.to(tl.int32, bitcast=True)
    ordered_N = tl.where(bits_N < 0, bits_N ^ 0x7FFFFFFF, bits_N)
    ordered_N = tl.where(tl.abs(value_N) < float("inf"), ordered_N, _NOT_FINITE)  # NaN compares as false
    key_N = (ordered_N.to(tl.int64) << 32) | (_LOW - (first + id_N).to(tl.int64))
    tl.store(key_ptr + s * rows + b, tl.max(tl.where(real_N, key_N, _NOTHING), 0))


@triton.jit(do_not_specialize=["parts", "rows", "vocab"])
def join_kernel(
    key_ptr,  # int64 [S, B]
    id_ptr,  # out int64 [B]
    parts,
    rows,
    vocab,
    SP: tl.constexpr,  # S rounded up to a power of two
):
    """Program b: the id of the largest key."""
    b = tl.program_id(0)
    s_S = tl.arange(0, SP)
    key = tl.max(tl.load(key_ptr + s_S * rows + b, s_S < parts, other=_NOTHING), 0)
    found = _LOW - (key & _LOW)
    tl.store(id_ptr + b, tl.where(key >> 32 == _NOT_FINITE, vocab.to(tl.int64), found))
