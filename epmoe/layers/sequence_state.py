"""What surrounds the model in a step: each row's last token out of the state, its new one into it.

Letters: T tokens of a step · B its rows · S handles of the cache · V vocabulary.
"""

import torch

from epmoe.batch import Drafted, SequenceState


def take(
    sequence_B: torch.Tensor, token_S: torch.Tensor, position_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last token of each row's sequence, its position and the position after it: int64 [B] each."""
    position_B = position_S[sequence_B]
    return token_S[sequence_B], position_B, position_B + 1


def look_up(given_T: torch.Tensor, token_S: torch.Tensor) -> torch.Tensor:
    """int64 [T]: the given tokens, and where -1 - handle is given, that sequence's last one."""
    handle_T = (-1 - given_T).clamp(min=0)
    return torch.where(given_T < 0, token_S[handle_T], given_T)


def advance(
    id_B: torch.Tensor,
    sequence_B: torch.Tensor,
    position_B: torch.Tensor,
    state: SequenceState,
    vocab: int,
    drafted: Drafted | None = None,
) -> torch.Tensor:
    """Make the ids, at `position_B`, their sequences' last tokens; V counts as V-1. Returns the ids that count.

    The spare sequence, the last of the state, stays at token 0 and position 0, and counts nothing.

    Args:
        drafted: where a sequence has several rows, which stand together in order of position. Its last row that counts
            has its last token; ids of those that do not are -1.
    """
    spare = len(state.token_S) - 1
    token_B, real_B, counts_B, last_B = id_B.clamp(max=vocab - 1), sequence_B != spare, None, sequence_B != spare
    if drafted is not None:
        ahead_B, wanted_B = drafted
        right_B = id_B == wanted_B  # then the next one counts, if this one does
        wrong_B = (ahead_B > 0) & ~right_B.roll(1)
        wrongs_B = wrong_B.cumsum(0)
        counts_B = wrongs_B == wrongs_B[torch.arange(len(id_B), device=id_B.device) - ahead_B]
        real_B, last_B = real_B & counts_B, real_B & counts_B & ~right_B
    if state.seen_SV is not None:
        state.seen_SV[torch.where(real_B, sequence_B, spare), token_B] = True
    if state.count_SV is not None:
        state.count_SV.index_put_((sequence_B, token_B), real_B.int(), accumulate=True)
    to_B = torch.where(last_B, sequence_B, spare)
    state.token_S[to_B] = torch.where(last_B, token_B, 0)
    state.position_S[to_B] = torch.where(last_B, position_B, 0)
    return id_B if counts_B is None else torch.where(counts_B, id_B, -1)
