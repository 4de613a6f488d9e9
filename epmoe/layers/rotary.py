"""Rotary positions with YaRN (arXiv 2309.00071).

Letters: T tokens · H heads · D head dimension · F = D/2 frequencies.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch

from epmoe.layers.twin import twin


@dataclass(frozen=True)
class Rope:
    """Rotary positions with YaRN (arXiv 2309.00071); every number comes from the checkpoint's config.json.

    Dimension pairs that turn more than `beta_fast` times within the original context keep their frequency, those that
    turn less than `beta_slow` times are slowed down by `factor`, and a linear ramp lies between. With `truncate` the
    ends of the ramp are rounded outwards to whole dimensions. `concentration` scales both cos and sin.
    """

    head_dim: int
    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position: int
    truncate: bool
    concentration: float

    @classmethod
    def plain(cls, head_dim: int, theta: float) -> Self:
        """Without YaRN: each pair keeps its frequency, bit for bit, since the ramp of so short a context is empty."""
        return cls(head_dim, theta, 1.0, 32.0, 1.0, 1, truncate=True, concentration=1.0)

    def ramp_ends(self) -> tuple[float, float]:
        """The ramp's ends as frequency indices: up to the first, frequencies stay; from the second, they are slow."""

        def index(turns: float) -> float:  # of the dimension pair that turns so often within the original context
            return (
                self.head_dim
                * math.log(self.original_max_position / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        return low, high if high != low else high + 0.001

    def frequency_F(self) -> torch.Tensor:
        """Radians a position, [D/2] float32 on the CPU.

        In float32 like every public implementation: far out, the rounding of a frequency is visible in the angle.
        """
        index_F = torch.arange(self.head_dim // 2, dtype=torch.float32, device="cpu")
        wavelength_F = self.theta ** (2 * index_F / self.head_dim)
        low, high = self.ramp_ends()
        keep_F = 1 - ((index_F - low) / (high - low)).clamp(0, 1)
        return (1 - keep_F) / (self.factor * wavelength_F) + keep_F / wavelength_F


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Rotary positions as Llama 3.1 stretches them: `Rope` with a ramp that is linear in how often a pair turns.

    Pairs that turn more than `beta_fast` times within the original context (config.json: high_freq_factor) keep their
    frequency, those that turn less than `beta_slow` times (low_freq_factor) are slowed down by `factor`.
    """

    def frequency_F(self) -> torch.Tensor:
        """Radians a position, [D/2] float32 on the CPU."""
        index_F = torch.arange(self.head_dim // 2, dtype=torch.float32, device="cpu")
        frequency_F = 1 / self.theta ** (2 * index_F / self.head_dim)
        turns_F = self.original_max_position * frequency_F / (2 * math.pi)
        keep_F = ((turns_F - self.beta_slow) / (self.beta_fast - self.beta_slow)).clamp(0, 1)
        return (1 - keep_F) * frequency_F / self.factor + keep_F * frequency_F


class Rotary:
    """cos and sin for a step's positions. Not a module: it has no parameters, and nothing for the loader to assign."""

    def __init__(self, rope: Rope) -> None:
        self.concentration = rope.concentration
        self.frequency_F = rope.frequency_F()

    def __call__(self, position_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos_TF and sin_TF, float32, times the concentration."""
        self.frequency_F = self.frequency_F.to(position_T.device)  # moves once
        found: tuple[torch.Tensor, torch.Tensor]
        found = twin("rotary", position_T).cos_sin(position_T, self.frequency_F, self.concentration)
        return found


def cos_sin(
    position_T: torch.Tensor, frequency_F: torch.Tensor, concentration: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos_TF and sin_TF, float32, of position · frequency, times the concentration."""
    angle_TF = position_T[:, None].float() * frequency_F
    return angle_TF.cos() * concentration, angle_TF.sin() * concentration


def rotate(x_THD: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of each head; in float32, rounded once to x's dtype."""
    first, second = x_THD.float().chunk(2, dim=-1)
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THD.dtype)
