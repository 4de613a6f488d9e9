"""Adjustments: what requests do to their logits before a token is chosen, in this order.

    repetition     seen in prompt or answer: l / penalty, l · penalty where l < 0                (Keskar et al. 2019)
    frequency,     n times in the answer so far: l - (n · frequency + [n > 0] · presence)                 (OpenAI's API)
    presence
    listed         l + bias; -inf for what ends the answer, before min_tokens
    allowed        -inf for every id whose bit is not set

All of it in float32, each operation rounded. Log-probabilities stay those of the raw logits. A row that asks for
nothing keeps its numbers: l / 1, l - 0 and l + 0 are l.

What the device keeps for it stands by a sequence's handle (epmoe/engine/state.py), made when somebody first needs it.

Letters: B rows (sequences) · V vocabulary · W words of 32 bits, a bit an id.
"""

import math

import torch

from epmoe.batch import KINDS, Adjustments


def adjust(
    logits_BV: torch.Tensor, adjustments: Adjustments, kind_B: torch.Tensor, position_B: torch.Tensor
) -> torch.Tensor:
    """The adjusted logits, float32 [B, V]; `logits_BV` stays as it is.

    Args:
        adjustments: of the rows.
        kind_B: int32, the bits of those that a row needs.
    """
    assert logits_BV.dtype == torch.float32
    repetition_B1, frequency_B1, presence_B1 = adjustments.penalty_S3.split(1, dim=1)
    seen_B1, count_B1, listed_B1, allowed_B1 = (kind_B[:, None] >> bit & 1 != 0 for bit in range(len(KINDS)))
    listed = adjustments.listed
    if (seen_BV := adjustments.seen_SV) is not None:
        penalised_BV = torch.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
        logits_BV = torch.where(seen_BV & seen_B1, penalised_BV, logits_BV)
    if (count_BV := adjustments.count_SV) is not None:
        less_BV = count_BV * frequency_B1 + (count_BV > 0) * presence_B1
        logits_BV = torch.where(count_B1, logits_BV - less_BV, logits_BV)
    if listed is not None:
        active_BK = listed_B1 & (position_B[:, None] < listed.until_SK)
        logits_BV = logits_BV.scatter_add(1, listed.id_SK, torch.where(active_BK, listed.value_SK, 0.0))
    if (allowed_BW := adjustments.allowed_SW) is not None:
        allowed_BV = unpacked(allowed_BW, logits_BV.shape[1])
        logits_BV = torch.where(allowed_BV | ~allowed_B1, logits_BV, -math.inf)
    return logits_BV


def unpacked(word_BW: torch.Tensor, vocab: int) -> torch.Tensor:
    """bool [B, V]: a bit an id, the lowest of a word first."""
    bit_32 = torch.arange(32, dtype=torch.int32, device=word_BW.device)
    return ((word_BW[:, :, None] >> bit_32) & 1).flatten(1)[:, :vocab].bool()
