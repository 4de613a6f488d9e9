"""The largest logit of each row, found in parts of the vocabulary that several ranks or programs hold.

A part's finding is one number, so that the largest of all is a maximum, exact in any order:

    key = value's bits, in the order of integers · 2^32 + (2^32 - 1 - id)

A larger value has a larger key, and of equal values the lower id. -0 counts as 0. What is not finite is no logit: NaN
and both infinities stand above everything.

Letters: B rows (sequences) · V vocabulary · S parts.
"""

import torch

NOT_FINITE = 0x7FFFFFFF  # the upper half of a key
LOW = 0xFFFFFFFF


def largest(logits_BV: torch.Tensor, first: int) -> torch.Tensor:
    """int64 [S, B]: keys of the rows' largest values, of a part of the vocabulary that begins at id `first`.

    float32; rows may stand apart by any stride. How many parts S it makes of that part is a version's own matter: here
    one. torch.argmax promises the first of equal values.
    """
    assert logits_BV.dtype == torch.float32 and logits_BV.shape[1] > 0
    id_B1 = logits_BV.argmax(1, keepdim=True)
    value_B = logits_BV.gather(1, id_B1)[:, 0] + 0.0  # -0 becomes 0
    bits_B = value_B.view(torch.int32)
    # Negative floats grow towards zero as their lower 31 bits fall, so those are flipped.
    ordered_B = torch.where(bits_B < 0, bits_B ^ 0x7FFFFFFF, bits_B).masked_fill(~finite_rows(logits_BV), NOT_FINITE)
    return ((ordered_B.long() << 32) | (LOW - first - id_B1[:, 0]))[None]


def finite_rows(logits_BV: torch.Tensor) -> torch.Tensor:
    """Which rows hold neither NaN nor an infinity: bool [B]."""
    low_B, high_B = (
        logits_BV.amin(1),
        logits_BV.amax(1),
    )  # both NaN where the row has one; aminmax takes four times as long
    return low_B.isfinite() & high_B.isfinite()


def join_largest(key_SB: torch.Tensor, vocab: int) -> torch.Tensor:
    """The ids [B] that parts of the whole vocabulary found together, int64; V where a row is not finite."""
    key_B = key_SB.amax(0)
    return torch.where(key_B >> 32 == NOT_FINITE, vocab, LOW - (key_B & LOW))
