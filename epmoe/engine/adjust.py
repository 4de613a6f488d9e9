"""Adjustments: what requests do to their logits before a token is chosen, in this order.

    repetition     seen in prompt or answer: l / penalty, l · penalty where l < 0                (Keskar et al. 2019)
    frequency,     n times in the answer so far: l - (n · frequency + [n > 0] · presence)                 (OpenAI's API)
    presence
    listed         l + bias; -inf for what ends the answer, before min_tokens
    allowed        -inf for every id whose bit is not set

All of it in float32, each operation rounded. Log-probabilities stay those of the raw logits. A row that asks for
nothing keeps its numbers: l / 1, l - 0 and l + 0 are l.

What the device keeps for it stands by a sequence's handle (epmoe/engine/state.py), made when somebody first needs it.

Letters: B rows (sequences) · V vocabulary · K ids that a request lists, at most · W words of 32 bits, a bit an id.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from epmoe.engine.request import MOST_LISTED, SamplingParams
from epmoe.errors import UserError

ALWAYS = 2**62  # beyond any position


class Listed(NamedTuple):
    """Some ids and what is added to their logits at positions before `until_BK`; where a list is shorter, 0 to id 0."""

    id_BK: torch.Tensor  # int64
    value_BK: torch.Tensor  # float32
    until_BK: torch.Tensor  # int64


@dataclass(frozen=True)
class Adjustments:
    """Of B rows. What nobody has needed is None."""

    penalty_B3: torch.Tensor  # float32: repetition, frequency, presence
    seen_BV: torch.Tensor | None = None  # bool, the ids of prompt and answer
    count_BV: torch.Tensor | None = None  # int32, how often the answer has an id
    listed: Listed | None = None
    allowed_BW: torch.Tensor | None = None  # int32, id 32 · w + b is bit b of word w

    def __getitem__(self, rows: slice | torch.Tensor) -> "Adjustments":
        listed = None if self.listed is None else Listed(*(each[rows] for each in self.listed))
        others = (self.seen_BV, self.count_BV, self.allowed_BW)
        seen_BV, count_BV, allowed_BW = (None if each is None else each[rows] for each in others)
        return Adjustments(self.penalty_B3[rows], seen_BV, count_BV, listed, allowed_BW)


def adjust(logits_BV: torch.Tensor, adjustments: Adjustments, position_B: torch.Tensor) -> torch.Tensor:
    """The adjusted logits, float32 [B, V]; `logits_BV` stays as it is. Nothing waits for the device."""
    assert logits_BV.dtype == torch.float32
    repetition_B1, frequency_B1, presence_B1 = adjustments.penalty_B3.split(1, dim=1)
    listed = adjustments.listed
    if (seen_BV := adjustments.seen_BV) is not None:
        penalised_BV = torch.where(logits_BV < 0, logits_BV * repetition_B1, logits_BV / repetition_B1)
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    if (count_BV := adjustments.count_BV) is not None:
        logits_BV = logits_BV - (count_BV * frequency_B1 + (count_BV > 0) * presence_B1)
    if listed is not None:
        value_BK = torch.where(position_B[:, None] < listed.until_BK, listed.value_BK, 0.0)
        logits_BV = logits_BV.scatter_add(1, listed.id_BK, value_BK)
    if (allowed_BW := adjustments.allowed_BW) is not None:
        logits_BV = torch.where(unpacked(allowed_BW, logits_BV.shape[1]), logits_BV, -math.inf)
    return logits_BV


def unpacked(word_BW: torch.Tensor, vocab: int) -> torch.Tensor:
    """bool [B, V]: a bit an id, the lowest of a word first."""
    bit_32 = torch.arange(32, dtype=torch.int32, device=word_BW.device)
    return ((word_BW[:, :, None] >> bit_32) & 1).flatten(1)[:, :vocab].bool()


def words(vocab: int) -> int:
    """W, how many hold a bit for each id.

    >>> words(64), words(65)
    (2, 3)
    """
    return -(-vocab // 32)


def packed(ids: Iterable[int], vocab: int) -> "np.ndarray[Any, Any]":
    """int32 [W] with the bits of these ids."""
    bits = np.zeros(32 * words(vocab), dtype=bool)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


Entry = tuple[int, float, int]  # id, what is added, before which position


def entries(params: SamplingParams, begin: int, ends: Iterable[int]) -> list[Entry]:
    """What a request lists, one that fits `Listed`.

    Args:
        begin: the answer's first position.
        ends: ids that end it.
    """
    until = begin + params.min_tokens
    early = [(id, -math.inf, until) for id in sorted(ends)] if params.min_tokens else []
    return [*((id, value, ALWAYS) for id, value in params.logit_bias), *early]


def check_adjustments(params: SamplingParams, ends: Iterable[int], number: int) -> None:
    """Raises UserError where more ids are listed than fit, or nothing could be chosen before min_tokens; `number` is
    the prompt's."""
    ends = frozenset(ends)
    if (count := len(entries(params, 0, ends))) > MOST_LISTED:
        raise UserError(
            f"prompt {number}: logit_bias and min_tokens name {count} token ids, and a request may name {MOST_LISTED}: "
            "give fewer biases or stop_token_ids"
        )
    if params.min_tokens and params.allowed_token_ids is not None and ends.issuperset(params.allowed_token_ids):
        raise UserError(
            f"prompt {number}: min_tokens={params.min_tokens} leaves none of "
            f"allowed_token_ids={list(params.allowed_token_ids)}, which all end the answer: allow others, too"
        )
