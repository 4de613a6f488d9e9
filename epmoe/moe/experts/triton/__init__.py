"""Experts in Triton: both products run straight from the packed MXFP4 weights; nothing is dequantised to memory.

This file imports no triton, so that any machine can ask what it serves.

    words.py             the layout of the weights, and how a program turns it into numbers
    products.py          the two products: checks, tile, launch; their twins in torch
    kernels.py           the kernels of few rows an expert, on every GPU
    hopper.py            launches of those of many rows, on Hopper
    hopper_kernels.py    these kernels, with the same bits
    hopper_product.py    the product of one of their tiles
    tiles.py             which tile and which kernel, by the table in tiles.json

Memory in `forward` beyond the packed weights: h [T·K, I] and the result [T, K, H], both in x's dtype; and on a Hopper
GPU with many rows an expert the rows of x gathered in their order, [T·K, H], until the result takes their place
(hopper.py).

Letters: T tokens · H hidden · I intermediate · K experts per token · L experts on this rank · N = 2I.
"""

from typing import TYPE_CHECKING, ClassVar, Self

import torch

from epmoe.errors import UserError
from epmoe.formats import ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.kernels import distinct, run_on
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.trial import tried
from epmoe.moe.router import Dispatch
from epmoe.trace import named

if TYPE_CHECKING:
    from epmoe.moe.experts.triton.words import WordMatrix


# NVIDIA's generations that the kernels are made for. On older ones, and on AMD's devices, a token is tried first.
LEAST_GENERATION = 8


class TritonExperts:
    """MXFP4 experts on a GPU; for tests also in Triton's interpreter. Never waits for the device; fits a CUDA graph."""

    formats: ClassVar[frozenset[str]] = frozenset({"mxfp4"})
    waits: ClassVar[bool] = False

    def __init__(
        self,
        gate_up: "WordMatrix",
        gate_up_bias_LN: torch.Tensor,
        down: "WordMatrix",
        down_bias_LH: torch.Tensor,
        activation: GatedActivation,
    ) -> None:
        self.gate_up, self.gate_up_bias_LN = gate_up, gate_up_bias_LN.contiguous()
        self.down, self.down_bias_LH = down, down_bias_LH.contiguous()
        self.activation = activation
        from epmoe.moe.experts.triton import products  # only here and in `pack`: a CPU machine need not have triton

        self._products = products

    @classmethod
    def serves(cls, device: torch.device) -> bool:
        return run_on(device)

    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        """Tiles change at most once between two powers of two of a step's tokens (tiles.py)."""
        return tuple(sorted(distinct(tokens)))

    @classmethod
    def pack(cls, weights: ExpertWeights, activation: GatedActivation) -> Self:
        """Regroups codes and scales (words.py): the same size where rows are whole strips of 64 and groups even.

        Raises:
            UserError: another format than mxfp4, or a device that Triton cannot compile for.
        """
        gate_up, down = weights.gate_up, weights.down
        if not isinstance(gate_up, Mxfp4Matrix) or not isinstance(down, Mxfp4Matrix):
            raise UserError(
                f"experts=triton runs quant={'|'.join(sorted(cls.formats))}, not quant={gate_up.format}: "
                "choose that, or experts=reference"
            )
        device = gate_up.device
        if device.type != "cpu" and not run_on(device):
            raise UserError(
                f"experts=triton has no kernels for {device}, which is neither NVIDIA's nor AMD's: choose experts=hub "
                "or experts=reference"
            )
        import triton

        from epmoe.kernels.gpu import generation
        from epmoe.moe.experts.triton.words import WordMatrix

        if device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise UserError("experts=triton needs a GPU and these experts are on the CPU: choose experts=reference")
        made = cls(
            WordMatrix.pack(gate_up),
            weights.gate_up_bias_LN,
            WordMatrix.pack(down),
            weights.down_bias_LH,
            activation,
        )
        if device.type != "cpu" and generation(device) < LEAST_GENERATION:
            tried(made, gate_up, weights.gate_up_bias_LN.dtype, "experts=triton")
        return made

    def unpack(self) -> ExpertWeights:
        return ExpertWeights(self.gate_up.unpack(), self.gate_up_bias_LN, self.down.unpack(), self.down_bias_LH)

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes + self.gate_up_bias_LN.nbytes + self.down_bias_LH.nbytes

    def forward(self, x_TH: torch.Tensor, dispatch: Dispatch, y_TKH: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H] → this rank's slot rows [T, K, H] in x's dtype (bfloat16 or float32), others zero."""
        with named("gate_up"):
            h_RI = self._products.gate_up(x_TH, self.gate_up, self.gate_up_bias_LN, dispatch, self.activation)
        with named("down"):
            return self._products.down(h_RI, self.down, self.down_bias_LH, dispatch, y_TKH)
