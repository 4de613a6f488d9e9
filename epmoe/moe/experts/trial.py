"""One token through packed experts, so that kernels that do not run on a device say so before a prompt comes.

Letters: L experts on this rank · N output rows · H hidden.
"""

from typing import Protocol

import torch

from epmoe.errors import UserError, first_line
from epmoe.moe.experts import Experts
from epmoe.moe.router import Dispatch


class Packed(Protocol):
    """The first matrix of a layer, in any layout: [L, N, H]."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def device(self) -> torch.device: ...


def tried(experts: Experts, gate_up: Packed, dtype: torch.dtype, what: str) -> None:
    """Run one token of one local expert; the kernels are compiled and launched, its rows are not looked at.

    Raises:
        UserError: whatever they raised, in one line that begins with `what` runs.
        torch.OutOfMemoryError: is none of their faults.
    """
    (local, _, hidden), device = gate_up.shape, gate_up.device
    row = torch.zeros(1, dtype=torch.int32, device=device)
    offset_L1 = torch.ones(local + 1, dtype=torch.int32, device=device)
    offset_L1[0] = 0
    x_1H = torch.zeros(1, hidden, dtype=dtype, device=device)
    try:
        experts.forward(x_1H, Dispatch(row[None], torch.ones(1, 1, device=device), offset_L1, row, row, local))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, a driver's, an assertion of the kernels'
        raise UserError(
            f"{what} does not run on {device} ({first_line(error)}): choose other experts=, reference runs everywhere"
        ) from error
