"""The router in Triton: logits → experts and weights, and → gather and scatter index.

Letters: T tokens · E experts · L experts on this rank · K experts per token · S = T·K slots (numbered t·K + k) · R = S
rows · B blocks of BLOCK_T tokens. Inside a kernel T means the tokens of one block, and E and K are padded to powers of
two.

Few tokens are one launch of one program, many tokens two launches of a program a block. A token chooses K different
experts, so within a block "how many earlier tokens chose expert e" is a column of a running sum over [T, E], and a
row's place is

    row = rows of lower local experts  +  e's rows in earlier blocks  +  e's rows of earlier tokens in this block
          from the counts of all blocks   from the counts of all blocks  from the running sum

The sums are integers and no atomics are used, so the index does not depend on the order in which blocks run. A token's
weights depend on its logits alone: its K exponentials are added in the order k = 0..K-1, whatever the tile and kernel.

The tile follows E, and T in two steps at powers of two, so a model compiles few kernels: those that the engine meets
when it warms up.
"""

# mypy: disallow-untyped-defs=False
# (a kernel's arguments get their types at the launch)

import torch
import triton
import triton.language as tl

from epmoe.errors import UserError
from epmoe.kernels.gpu import after_previous, early, next_may_begin
from epmoe.moe.router import Dispatch
from epmoe.trace import named

# A tile [BLOCK_T, E] has at most 8192 elements, 16 to a thread: compiled for sm_90 that spills nothing (32 to a thread
# does). Larger blocks make fewer counts to sum: 128 blocks for 8192 tokens of 128 experts.
_TILE = 8192
_MOST_TOKENS = 64
_THREAD = 16
# What one program of 32 warps, the most there are, holds of a token's logits. An id would have room for 65,536.
MOST_EXPERTS = 32 * 32 * _THREAD
# Tokens of the one program that does everything, if its tile is no larger than that.
ONE_PROGRAM = (16, 64)


def route(
    logits_TE: torch.Tensor,
    top_k: int,
    local_E: torch.Tensor,
    num_local: int,
    *,
    one_program: tuple[int, ...] = ONE_PROGRAM,
) -> Dispatch:
    """As `epmoe.moe.router.reference.route`, with the same ids and index; weights differ by the rounding of exp.

    One launch for few tokens, else two; nothing waits for the device.

    Args:
        logits_TE: float32, bfloat16 or float16 [T, E], contiguous; T may be 0.
        top_k: K, at most E.
        local_E: int32 [E], index of each expert on this rank or -1, ascending, as `Placement.local_E` gives it.
        num_local: L.
        one_program: tokens that one program can have, ascending; the bits do not follow from it.

    Raises:
        UserError: a device that Triton cannot compile for.
    """
    tokens, experts = logits_TE.shape
    device = logits_TE.device
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise UserError("router=triton needs a GPU and this rank runs on the CPU: choose router=reference")
    assert 1 <= top_k <= experts, f"top_k={top_k} of {experts} experts"
    assert experts <= MOST_EXPERTS, f"{experts} experts, and a program has room for {MOST_EXPERTS}"
    assert logits_TE.is_contiguous() and logits_TE.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert local_E.shape == (experts,) and local_E.dtype == torch.int32 and local_E.is_contiguous()
    assert local_E.device == device

    expert_TK = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    weight_TK = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    offset_L1 = torch.empty(num_local + 1, dtype=torch.int32, device=device)
    slot_R = torch.empty(tokens * top_k, dtype=torch.int32, device=device)
    row_S = torch.empty(tokens * top_k, dtype=torch.int32, device=device)
    chosen, index = (expert_TK, weight_TK), (offset_L1, slot_R, row_S)
    sizes = {"E": experts, "K": top_k}

    if few := few_options(tokens, experts, one_program):
        options = {**sizes, **few, **early(device)}
        _few[(1,)](logits_TE, local_E, *chosen, *index, tokens, num_local, **options)
    else:
        tile = tile_options(experts)
        blocks = triton.cdiv(tokens, tile["BLOCK_T"])
        count_BE = torch.empty((blocks, experts), dtype=torch.int32, device=device)
        options = {**sizes, **tile, **early(device)}
        _top_experts[(blocks,)](logits_TE, *chosen, count_BE, tokens, **options)
        with named("dispatch"):
            _index[(blocks,)](expert_TK, local_E, count_BE, *index, tokens, blocks, num_local, **options)
    return Dispatch(*chosen, *index, num_experts=experts)


def few_options(tokens: int, experts: int, sizes: tuple[int, ...] = ONE_PROGRAM) -> dict[str, int] | None:
    """Tile and warps of the one program that does everything; None: too many tokens for one."""
    padded = _padded(experts)
    for size in sizes:
        if tokens <= size and size * padded <= _TILE:
            return {"BLOCK_T": size, "BLOCK_E": padded, "num_warps": max(8, size * padded // (32 * _THREAD))}
    return None


def tile_options(experts: int) -> dict[str, int]:
    """Tile and warps of the two kernels for many tokens."""
    padded = _padded(experts)
    tokens = max(1, min(_MOST_TOKENS, _TILE // padded))
    return {"BLOCK_T": tokens, "BLOCK_E": padded, "num_warps": max(4, tokens * padded // (32 * _THREAD))}


def _padded(experts: int) -> int:
    return max(16, triton.next_power_of_2(experts))


# Below the key of every logit: -inf has the lowest, 0x807fffff as int32.
_TAKEN = tl.constexpr(-(1 << 31))
# The half of a key that orders bf16 numbers, and the one in which the lower of equal numbers' ids is the larger.
_UPPER, _LOWER = tl.constexpr(-(1 << 16)), tl.constexpr((1 << 16) - 1)


@triton.jit(do_not_specialize=["tokens", "num_local"])
def _few(
    logits_ptr,  # [T, E]
    local_ptr,  # int32 [E]
    expert_ptr,  # int32 [T, K]
    weight_ptr,  # float32 [T, K]
    offset_ptr,  # int32 [L+1]
    slot_ptr,  # int32 [R]
    row_ptr,  # int32 [S]
    tokens,
    num_local,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """All T tokens in one program."""
    token_T = tl.arange(0, BLOCK_T)
    id_E = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, triton.next_power_of_2(K))
    real_T = token_T < tokens
    local_E = tl.load(local_ptr + id_E, mask=id_E < E, other=-1)  # needed late: asked for before the logits
    after_previous(PDL)
    next_may_begin(PDL)
    id_TK, weight_TK, chosen_TE = _top(logits_ptr, token_T, real_T, E, K, BLOCK_T, BLOCK_E)
    real_TK = real_T[:, None] & (k_K < K)[None, :]
    to_TK = token_T[:, None] * K + k_K[None, :]
    tl.store(expert_ptr + to_TK, id_TK, mask=real_TK)
    tl.store(weight_ptr + to_TK, weight_TK, mask=real_TK)

    mine_E = local_E >= 0
    chosen_TE = (chosen_TE & mine_E[None, :]).to(tl.int32)
    count_E = tl.sum(chosen_TE, axis=0)
    offset_E = tl.cumsum(count_E, 0) - count_E
    used = tl.sum(count_E, axis=0)
    tl.store(offset_ptr + local_E, offset_E, mask=mine_E)
    tl.store(offset_ptr + num_local, used)
    # How many earlier tokens chose e, as a product with a triangle of ones: exact in float32, and a third of a scan's
    # instructions, which would pass through all warps one after the other.
    earlier_TT = (token_T[None, :] < token_T[:, None]).to(tl.float16)
    earlier_TE = tl.dot(earlier_TT, chosen_TE.to(tl.float16)).to(tl.int32)
    row_TE = tl.where(mine_E[None, :], offset_E[None, :] + earlier_TE, -1)
    for k in tl.static_range(K):
        id_T = tl.sum(tl.where((k_K == k)[None, :], id_TK, 0), axis=1)
        row_T = tl.max(tl.where(id_T[:, None] == id_E[None, :], row_TE, -2), axis=1)
        slot_T = token_T * K + k
        tl.store(row_ptr + slot_T, row_T, mask=real_T)
        tl.store(slot_ptr + row_T, slot_T, mask=real_T & (row_T >= 0))
        tl.store(slot_ptr + slot_T, tokens * K, mask=real_T & (slot_T >= used))


@triton.jit(do_not_specialize=["tokens"])
def _top_experts(
    logits_ptr,  # [T, E]
    expert_ptr,  # int32 [T, K]
    weight_ptr,  # float32 [T, K]
    count_ptr,  # int32 [B, E]: this block's tokens that chose e
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Experts, weights and counts of one block."""
    after_previous(PDL)
    next_may_begin(PDL)
    block = tl.program_id(0)
    token_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    id_E = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, triton.next_power_of_2(K))
    real_T = token_T < tokens
    id_TK, weight_TK, chosen_TE = _top(logits_ptr, token_T, real_T, E, K, BLOCK_T, BLOCK_E)
    real_TK = real_T[:, None] & (k_K < K)[None, :]
    to_TK = token_T[:, None] * K + k_K[None, :]
    tl.store(expert_ptr + to_TK, id_TK, mask=real_TK)
    tl.store(weight_ptr + to_TK, weight_TK, mask=real_TK)
    tl.store(count_ptr + block * E + id_E, tl.sum(chosen_TE.to(tl.int32), axis=0), mask=id_E < E)


@triton.jit
def _top(
    logits_ptr,
    token_T,
    real_T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(ids [T, K], weights [T, K], chosen [T, E]); K rounds of "take the largest, the leftmost of equals".

    Integer keys leave room for a mark below -inf: taken.
    """
    id_E = tl.arange(0, BLOCK_E)
    real_TE = real_T[:, None] & (id_E < E)[None, :]
    logit_TE = tl.load(logits_ptr + token_T[:, None] * E + id_E[None, :], mask=real_TE, other=0.0)
    # A bf16 logit leaves room in its key for the id, so that a round is one maximum, not one with its place.
    PACKED: tl.constexpr = logit_TE.dtype == tl.bfloat16
    key_TE = _ordered(logit_TE.to(tl.float32))
    if PACKED:
        key_TE = (key_TE & _UPPER) | (id_E ^ _LOWER)[None, :]
    key_TE = tl.where((id_E < E)[None, :], key_TE, _TAKEN)

    # The exponentials of later rounds need the first round's logit, and the weights need their sum: the K values of a
    # token wait in registers, addressed by comparison since a tile cannot be indexed.
    BLOCK_K: tl.constexpr = triton.next_power_of_2(K)
    k_K = tl.arange(0, BLOCK_K)
    id_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    exp_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    first_T = tl.zeros([BLOCK_T], tl.float32)
    sum_T = tl.zeros([BLOCK_T], tl.float32)
    for k in tl.static_range(K):
        if PACKED:
            best_T = tl.max(key_TE, axis=1)
            id_T = (best_T & _LOWER) ^ _LOWER
            # Of a negative number the lower bits of the key are ones.
            best_T = tl.where(best_T < 0, best_T | _LOWER, best_T & _UPPER)
        else:
            best_T, id_T = tl.max(key_TE, axis=1, return_indices=True, return_indices_tie_break_left=True)
        logit_T = _unordered(best_T)
        if k == 0:
            first_T = logit_T
        exp_T = tl.exp(logit_T - first_T)
        sum_T += exp_T
        id_TK = tl.where((k_K == k)[None, :], id_T[:, None], id_TK)
        exp_TK = tl.where((k_K == k)[None, :], exp_T[:, None], exp_TK)
        key_TE = tl.where(id_E[None, :] == id_T[:, None], _TAKEN, key_TE)
    return id_TK, exp_TK / sum_T[:, None], real_TE & (key_TE == _TAKEN)


@triton.jit
def _ordered(x):
    """float32 → int32 in the same order; -0 becomes 0, and what is not finite +inf."""
    x = tl.where(x == 0.0, 0.0, x)
    x = tl.where(tl.abs(x) < float("inf"), x, float("inf"))  # NaN compares as false
    bits = x.to(tl.int32, bitcast=True)
    # Negative floats grow towards zero as their lower 31 bits fall, so those are flipped.
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unordered(key):
    """The inverse of `_ordered`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "blocks", "num_local"])
def _index(
    expert_ptr,  # int32 [T, K]
    local_ptr,  # int32 [E]
    count_ptr,  # int32 [B, E]
    offset_ptr,  # int32 [L+1]
    slot_ptr,  # int32 [R]
    row_ptr,  # int32 [S]
    tokens,
    blocks,
    num_local,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each block sums all blocks' counts itself (B·E integers from the L2 cache), which saves a launch in between."""
    block = tl.program_id(0)
    id_E = tl.arange(0, BLOCK_E)
    local_E = tl.load(local_ptr + id_E, mask=id_E < E, other=-1)
    mine_E = local_E >= 0
    after_previous(PDL)
    next_may_begin(PDL)

    all_E = tl.zeros([BLOCK_E], tl.int32)
    earlier_E = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, blocks, BLOCK_T):
        block_B = first + tl.arange(0, BLOCK_T)
        real_BE = (block_B < blocks)[:, None] & mine_E[None, :]
        count_BE = tl.load(count_ptr + block_B[:, None] * E + id_E[None, :], mask=real_BE, other=0)
        all_E += tl.sum(count_BE, axis=0)
        earlier_E += tl.sum(tl.where((block_B < block)[:, None], count_BE, 0), axis=0)
    # Local indices ascend with the ids, so a running sum over the ids in which other ranks' are 0 gives the offsets.
    offset_E = tl.cumsum(all_E, 0) - all_E
    used = tl.sum(all_E, axis=0)
    if block == 0:
        tl.store(offset_ptr + local_E, offset_E, mask=mine_E)
        tl.store(offset_ptr + num_local, used)

    token_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    real_T = token_T < tokens
    chosen_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for k in tl.static_range(K):
        id_T = tl.load(expert_ptr + token_T * K + k, mask=real_T, other=-1)
        chosen_TE += (id_T[:, None] == id_E[None, :]).to(tl.int32)
    row_TE = (offset_E + earlier_E)[None, :] + tl.cumsum(chosen_TE, 0) - chosen_TE
    row_TE = tl.where(mine_E[None, :], row_TE, -1)
    for k in tl.static_range(K):
        id_T = tl.load(expert_ptr + token_T * K + k, mask=real_T, other=-1)
        # One column of each row differs from -2: its maximum is the look-up row_TE[t, id].
        row_T = tl.max(tl.where(id_T[:, None] == id_E[None, :], row_TE, -2), axis=1)
        slot_T = token_T * K + k
        tl.store(row_ptr + slot_T, row_T, mask=real_T)
        tl.store(slot_ptr + row_T, slot_T, mask=real_T & (row_T >= 0))
        # Rows from `used` on hold S. No slot is written there, so blocks may run in any order.
        tl.store(slot_ptr + slot_T, tokens * K, mask=real_T & (slot_T >= used))
