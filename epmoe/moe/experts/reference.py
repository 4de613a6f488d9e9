"""Experts in plain torch: any device, any weight format; what every other backend is compared with.

Letters: T tokens · H hidden · I intermediate · K experts per token · L experts on this rank · S = T·K slots · M rows of
one tile.
"""

from itertools import pairwise
from typing import ClassVar, Self

import torch

from epmoe.formats import FORMATS, ExpertMatrix, ExpertWeights
from epmoe.moe.experts import GatedActivation
from epmoe.moe.router import Dispatch
from epmoe.trace import named

# Rows of every matrix product. A library picks its order of summation by the product's shape, so all products of one
# matrix have one shape and a row's bits follow neither from the batch nor from the placement.
TILE = 16
# Decoding an expert costs more than multiplying a few rows with it. A layer whose float32 values fit here (a demo
# model, never gpt-oss-20b) keeps them; a larger one decodes each expert whenever it is used.
HELD_BYTES = 64 << 20


def gated(gate_up_MN: torch.Tensor, activation: GatedActivation) -> torch.Tensor:
    """gate · sigmoid(alpha · gate) · (up + up_offset) with clamped gate and up: [M, 2I] → [M, I], rows interleaved."""
    gate_MI = gate_up_MN[:, 0::2].clamp(max=activation.limit)
    up_MI = gate_up_MN[:, 1::2].clamp(-activation.limit, activation.limit)
    return gate_MI * torch.sigmoid(activation.alpha * gate_MI) * (up_MI + activation.up_offset)


class ReferenceExperts:
    """All arithmetic in float32; a slot's row is rounded once, to x's dtype. Reads `offset_L1` on the host.

    The same bits for a row hold for one device, one library and one thread count.

    Args:
        held_bytes: a layer whose values take no more than that keeps them; the bits do not follow from it.
    """

    formats: ClassVar[frozenset[str]] = frozenset(FORMATS)
    waits: ClassVar[bool] = True

    def __init__(self, weights: ExpertWeights, activation: GatedActivation, held_bytes: int = HELD_BYTES) -> None:
        self.weights, self.activation = weights, activation
        matrices = (weights.gate_up, weights.down)
        values = sum(matrix.shape[0] * matrix.shape[1] * matrix.shape[2] for matrix in matrices)
        self._held = tuple(m.dequantize(torch.float32) for m in matrices) if 4 * values <= held_bytes else None

    @classmethod
    def serves(cls, device: torch.device) -> bool:
        return True

    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        return ()

    @classmethod
    def pack(cls, weights: ExpertWeights, activation: GatedActivation) -> Self:
        """Keeps the weights as they are; every format of FORMATS."""
        return cls(weights, activation)

    def unpack(self) -> ExpertWeights:
        return self.weights

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights, and of their values where those are kept."""
        weights = self.weights
        biases = weights.gate_up_bias_LN.nbytes + weights.down_bias_LH.nbytes
        return weights.gate_up.nbytes + weights.down.nbytes + biases + sum(value.nbytes for value in self._held or ())

    def forward(self, x_TH: torch.Tensor, dispatch: Dispatch, y_TKH: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H] → this rank's slot rows [T, K, H] in x's dtype, others zero; no work for experts without rows."""
        (tokens, hidden), top_k = x_TH.shape, dispatch.expert_TK.shape[1]
        if y_TKH is None:
            y_TKH = x_TH.new_zeros(tokens, top_k, hidden)
        y_SH = y_TKH.view(tokens * top_k, hidden)
        weight_S = dispatch.weight_TK.flatten()
        offsets = dispatch.offset_L1.tolist()
        for expert, (start, stop) in enumerate(pairwise(offsets)):
            if start == stop:
                continue
            gate_up_NH, down_HI = self._values(expert)
            for slot_M in dispatch.slot_R[start:stop].long().split(TILE):
                x_MH = _padded(x_TH[slot_M // top_k].float())
                with named("gate_up"):
                    gate_up_MN = x_MH @ gate_up_NH.T + self.weights.gate_up_bias_LN[expert].float()
                    h_MI = gated(gate_up_MN, self.activation)
                with named("down"):
                    y_MH = (h_MI @ down_HI.T + self.weights.down_bias_LH[expert].float())[: len(slot_M)]
                    y_SH[slot_M] = (y_MH * weight_S[slot_M, None]).to(x_TH.dtype)
        return y_TKH

    def _values(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 gate_up [2I, H] and down [H, I] of one expert; float32 holds the values of every format exactly."""
        if self._held is not None:
            return self._held[0][expert], self._held[1][expert]
        return _decoded(self.weights.gate_up, expert), _decoded(self.weights.down, expert)


def _decoded(matrix: ExpertMatrix, expert: int) -> torch.Tensor:
    return matrix.select(slice(expert, expert + 1)).dequantize(torch.float32)[0]


def _padded(x_MH: torch.Tensor) -> torch.Tensor:
    """Rows of zeros below, up to TILE of them."""
    return torch.nn.functional.pad(x_MH, (0, 0, 0, TILE - len(x_MH)))
