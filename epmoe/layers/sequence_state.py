"""What surrounds the model in a decode step: each row's last token out of the state, its new one into it.

Letters: B rows of a step · S handles of the cache · V vocabulary.
"""

import torch

from epmoe.batch import SequenceState


def take(
    sequence_B: torch.Tensor, token_S: torch.Tensor, position_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last token of each row's sequence, its position and the position after it: int64 [B] each."""
    position_B = position_S[sequence_B]
    return token_S[sequence_B], position_B, position_B + 1


def advance(
    id_B: torch.Tensor, sequence_B: torch.Tensor, position_B: torch.Tensor, state: SequenceState, vocab: int
) -> None:
    """Make the ids, at `position_B`, their sequences' last tokens; V counts as V-1.

    The spare sequence, the last of the state, stays at token 0 and position 0, and counts nothing.
    """
    token_B = id_B.clamp(max=vocab - 1)
    if state.seen_SV is not None:
        state.seen_SV[sequence_B, token_B] = True
    real_B = sequence_B != len(state.token_S) - 1
    if state.count_SV is not None:
        state.count_SV.index_put_((sequence_B, token_B), real_B.int(), accumulate=True)
    state.token_S[sequence_B] = torch.where(real_B, token_B, 0)
    state.position_S[sequence_B] = torch.where(real_B, position_B, 0)
