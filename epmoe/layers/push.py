"""A rank's slot rows into the memory of every rank, and the wait for those of the others: no collective, no barrier.

    push      this rank's own slots → their rows on every rank; this rank's mark → every rank (experts may do so
              themselves: epmoe/moe/experts/triton/kernels.py)
    arrive    until all slots' rows and all ranks' marks are here

The place (`Place`, epmoe/kernels/symmetric.py) is POISON until rows are written: who waits looks at each value, since
the parts of a row may come in any order. Who has read the rows leaves POISON again (norm.py), before its rank's next
push. So whoever has seen all marks of an exchange knows that every rank has read the one before, and may write there
again: two places in turn are enough, if no two exchanges in a row have the same one.

Letters: T tokens · K experts per token · H hidden · S = T·K slots · N ranks.
"""

import time

import torch

from epmoe.kernels.symmetric import MARKS, POISON, Place

LIMIT_S = 300.0  # this version's; a GPU's wait ends with the run (epmoe/ranks/watch.py)


def push(y_TKH: torch.Tensor, row_S: torch.Tensor, place: Place) -> None:
    """Write the rows of the slots with row_S ≥ 0 to all ranks, then this rank's mark.

    Args:
        y_TKH: in memory of its own; what other slots hold does not matter. A NaN of all ones becomes another NaN.
        row_S: `Dispatch.row_S`.
    """
    own_S = row_S >= 0
    y_SH = y_TKH.flatten(0, 1)
    own_MH = y_SH[own_S]
    own_MH[bits(own_MH) == POISON] = torch.nan
    for rank, byte_X in enumerate(place.byte_N):
        place.rows(y_SH.shape, y_SH.dtype, rank)[own_S] = own_MH
        byte_X[:MARKS].view(torch.int32)[place.rank] = 1


def arrive(rows_TKH: torch.Tensor, place: Place) -> None:
    """Return, or let the device's stream go on, when all rows and marks of the place are there."""
    begin = time.monotonic()
    while bool((place.mark_N == POISON).any()) or bool((bits(rows_TKH) == POISON).any()):
        assert time.monotonic() - begin < LIMIT_S, "rows of another rank have not come"
        time.sleep(0)


def leave(rows_TKH: torch.Tensor, place: Place) -> None:
    """They are read: POISON again."""
    bits(rows_TKH).fill_(POISON)
    place.mark_N.fill_(POISON)


def bits(rows: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    return rows.view({2: torch.int16, 4: torch.int32}[rows.dtype.itemsize])
