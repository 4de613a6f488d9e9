"""What a request asks of its logits, as the device keeps it: words of allowed ids, entries of biases and early ends.

layers/adjust.py says what is done with them.

Letters: V vocabulary · W words of 32 bits, a bit an id.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from epmoe.engine.request import MOST_LISTED, SamplingParams
from epmoe.errors import UserError

ALWAYS = 2**62  # beyond any position


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
