"""The router in Triton. This file imports no triton, so that any machine can ask what it serves.

launch.py    the kernels, and what launches them
"""

from typing import ClassVar

import torch

from epmoe.kernels import distinct, run_on
from epmoe.moe.router import Dispatch


class TritonRouter:
    """One launch for few tokens, else two; nothing waits for the device."""

    waits: ClassVar[bool] = False

    def __init__(self) -> None:
        from epmoe.moe.router.triton.launch import route  # only here: a CPU machine need not have triton

        self._route = route

    @classmethod
    def serves(cls, device: torch.device) -> bool:
        return run_on(device)

    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        """The tile follows the tokens in steps at powers of two."""
        return tuple(sorted(distinct(tokens)))

    def route(self, logits_TE: torch.Tensor, top_k: int, local_E: torch.Tensor, num_local: int) -> Dispatch:
        """As `launch.route`.

        Raises:
            UserError: a device that Triton cannot compile for.
        """
        return self._route(logits_TE, top_k, local_E, num_local)
