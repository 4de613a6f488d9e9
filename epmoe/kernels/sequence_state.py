"""What surrounds the model in a step, in Triton, a launch for each function of layers/sequence_state.py.

Letters: T tokens of a step · B its rows · S handles of the cache · V vocabulary.
"""

# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl

from epmoe.batch import Drafted, SequenceState

# Rows, or tokens, of one program.
ROWS = 64


def serves(token_S: torch.Tensor) -> bool:
    """Any state."""
    return True


def take(
    sequence_B: torch.Tensor, token_S: torch.Tensor, position_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `layers.sequence_state.take`."""
    token_B, position_B, next_B = (torch.empty_like(sequence_B) for _ in range(3))
    grid = (triton.cdiv(len(sequence_B), ROWS),)
    take_kernel[grid](sequence_B, token_S, position_S, token_B, position_B, next_B, len(sequence_B), B=ROWS)
    return token_B, position_B, next_B


def look_up(given_T: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
    """As `layers.sequence_state.look_up`."""
    token_T = torch.empty_like(given_T)
    look_up_kernel[(triton.cdiv(len(given_T), ROWS),)](given_T, token_S, token_T, len(given_T), B=ROWS)
    return token_T


def advance(
    id_B: torch.Tensor,
    sequence_B: torch.Tensor,
    position_B: torch.Tensor,
    state: SequenceState,
    vocab: int,
    drafted: Drafted | None = None,
) -> torch.Tensor:
    """As `layers.sequence_state.advance`; the spare sequence is the last one."""
    spare = len(state.token_S) - 1
    seen = None if state.seen_SV is None else state.seen_SV.view(torch.uint8)
    states = (state.token_S, state.position_S, seen, state.count_SV)
    found_B = id_B if drafted is None else torch.empty_like(id_B)
    told = (None, None, None) if drafted is None else (*drafted, found_B)
    grid = (triton.cdiv(len(id_B), ROWS),)
    advance_kernel[grid](id_B, sequence_B, position_B, *states, *told, len(id_B), spare, vocab, B=ROWS)
    return found_B


@triton.jit(do_not_specialize=["rows"])
def take_kernel(
    sequence_ptr,  # int64 [B]
    token_S_ptr,  # int64 [S]
    position_S_ptr,  # int64 [S]
    token_ptr,  # out int64 [B]
    position_ptr,  # out int64 [B]
    next_ptr,  # out int64 [B]
    rows,
    B: tl.constexpr,
):
    b_B = tl.program_id(0) * B + tl.arange(0, B)
    real_B = b_B < rows
    sequence_B = tl.load(sequence_ptr + b_B, real_B, other=0)
    position_B = tl.load(position_S_ptr + sequence_B, real_B, other=0)
    tl.store(token_ptr + b_B, tl.load(token_S_ptr + sequence_B, real_B, other=0), real_B)
    tl.store(position_ptr + b_B, position_B, real_B)
    tl.store(next_ptr + b_B, position_B + 1, real_B)


@triton.jit(do_not_specialize=["tokens"])
def look_up_kernel(
    given_ptr,  # int64 [T]
    token_S_ptr,  # int64 [S]
    token_ptr,  # out int64 [T]
    tokens,
    B: tl.constexpr,
):
    t_B = tl.program_id(0) * B + tl.arange(0, B)
    given_B = tl.load(given_ptr + t_B, t_B < tokens, other=0)
    last_B = tl.load(token_S_ptr - 1 - given_B, given_B < 0, other=0)
    tl.store(token_ptr + t_B, tl.where(given_B < 0, last_B, given_B), t_B < tokens)


@triton.jit(do_not_specialize=["rows", "spare", "vocab"])
def advance_kernel(
    id_ptr,  # int64 [B], V for none
    sequence_ptr,  # int64 [B]
    position_ptr,  # int64 [B]
    token_S_ptr,  # out int64 [S]
    position_S_ptr,  # out int64 [S]
    seen_ptr,  # out uint8 [S, V], or None
    count_ptr,  # out int32 [S, V], or None
    ahead_ptr,  # int64 [B], or None: no row belongs to a draft
    wanted_ptr,  # int64 [B], or None
    found_ptr,  # out int64 [B], or None
    rows,
    spare,
    vocab,
    B: tl.constexpr,
):
    """Rows of the spare sequence, which may be several, all write the same."""
    b_B = tl.program_id(0) * B + tl.arange(0, B)
    real_B = b_B < rows
    sequence_B = tl.load(sequence_ptr + b_B, real_B, other=0)
    id_B = tl.load(id_ptr + b_B, real_B, other=0)
    token_B = tl.minimum(id_B, vocab - 1)
    used_B = sequence_B != spare
    last_B = real_B
    if ahead_ptr is not None:
        ahead_B = tl.load(ahead_ptr + b_B, real_B, other=0)
        for back in range(1, tl.max(ahead_B, 0).to(tl.int32) + 1):
            before_B = real_B & (ahead_B >= back)
            chosen_B = tl.load(id_ptr + b_B - back, before_B, other=0)
            used_B = used_B & (chosen_B == tl.load(wanted_ptr + b_B - back, before_B, other=0))
        counts_B = used_B | (sequence_B == spare)
        tl.store(found_ptr + b_B, tl.where(counts_B, id_B, -1), real_B)
        last_B = real_B & counts_B & (id_B != tl.load(wanted_ptr + b_B, real_B, other=-1))
        real_B = real_B & counts_B
    if seen_ptr is not None:
        tl.store(seen_ptr + sequence_B * vocab + token_B, tl.full([B], 1, tl.uint8), real_B)
    if count_ptr is not None:  # of a row's own sequence: nobody else writes there, but its draft's rows
        tl.atomic_add(count_ptr + sequence_B * vocab + token_B, 1, real_B & used_B, sem="relaxed")
    tl.store(token_S_ptr + sequence_B, tl.where(used_B, token_B, 0), last_B)
    tl.store(position_S_ptr + sequence_B, tl.where(used_B, tl.load(position_ptr + b_B, real_B, other=0), 0), last_B)
