"""Expert backends: the two grouped products of an MoE layer, straight from the stored format.

Letters: T tokens · H hidden · I intermediate · K experts per token · L experts on this rank.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch

from epmoe.formats import ExpertWeights
from epmoe.moe.router import Dispatch

EXPERTS = {  # by preference: `experts=auto` is the first that serves the device and runs the formats
    "triton": "epmoe.moe.experts.triton:TritonExperts",
    "hub": "epmoe.moe.experts.hub:HubExperts",
    "reference": "epmoe.moe.experts.reference:ReferenceExperts",
}


@dataclass(frozen=True)
class GatedActivation:
    """out = gate · sigmoid(alpha · gate) · (up + up_offset), gate = min(gate, limit), up = clamp(up, ±limit).

    The defaults are gpt-oss's; another family is another record (alpha 1, limit inf, up_offset 0 is plain SwiGLU). A
    family without biases names none (`expert_names` in epmoe/models), and zeros take their place.
    """

    alpha: float = 1.702
    limit: float = 7.0
    up_offset: float = 1.0


class Experts(Protocol):
    """The packed experts of one layer on one rank. What the class says of itself is known without importing kernels.

    A class may also have `dtypes` and `configured` (CONTRIBUTING.md).
    """

    formats: ClassVar[frozenset[str]]  # names of FORMATS that `pack` takes
    waits: ClassVar[bool]  # no CUDA graph can capture a step with it, since it waits for the device

    @classmethod
    def serves(cls, device: torch.device) -> bool:
        """Whether it is meant for such a device."""
        ...

    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        """Numbers of tokens, up to `tokens`, at which it compiles anew; () where it compiles nothing."""
        ...

    @classmethod
    def pack(cls, weights: ExpertWeights, activation: GatedActivation) -> Self:
        """Bring weights into the layout that `forward` reads. May take over their memory.

        Raises:
            UserError: this backend does not run that format; the message names those it does.
        """
        ...

    def unpack(self) -> ExpertWeights:
        """The inverse of `pack`, exact."""
        ...

    @property
    def nbytes(self) -> int: ...

    def forward(self, x_TH: torch.Tensor, dispatch: Dispatch, y_TKH: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H] → slot rows [T, K, H] in x's dtype: gate weight × (expert output + down bias); zeros for other slots.

        They are written into `y_TKH`, zeros, where that is given.

        A row's value depends on its token and its expert only, not on the other rows: a fixed order along the
        contraction.
        """
        ...
