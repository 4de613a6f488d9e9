"""Cases for the expert backends, random weights, and the products in float64 that the backends are compared with.

For scripts/bench/experts.py, which judges any backend, and for the tests, which hold those of the table to them.

Letters: T tokens · H hidden · I intermediate · E experts · L experts on this rank · K experts per token.
"""

from dataclasses import dataclass, field

import torch

from epmoe.formats import FORMATS, ExpertWeights
from epmoe.moe.experts import GatedActivation
from epmoe.moe.router import Dispatch
from epmoe.moe.router.reference import route
from epmoe.tables import lookup

# Relative error of all rows together. float32: sums of at most 320 products; measured 1e-7. bfloat16: the result is
# rounded to 8 bits (at most 2^-9 each, about 2^-9/√3 in the mean) and so is h; measured 2e-3.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    hidden: int = 64
    intermediate: int = 32
    experts: int = 4
    top_k: int = 2
    local: tuple[int, ...] | None = None  # ids on this rank; None: all of them
    favourite: int | None = None  # an expert that every token chooses first
    unused: tuple[int, ...] = ()  # experts that no token chooses
    activation: GatedActivation = field(default_factory=GatedActivation)

    def __str__(self) -> str:
        return self.name

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(range(self.experts)) if self.local is None else self.local


CASES = (
    Case("no tokens", tokens=0),
    Case("one token", tokens=1),
    Case("one token, one expert", tokens=1, experts=1, top_k=1),
    Case("a row more than a tile of 16", tokens=17, experts=3, top_k=1, favourite=1),
    Case("all tokens on one expert", tokens=20, top_k=1, favourite=3),
    Case("no row on this rank", tokens=5, top_k=1, favourite=0, local=(2, 3)),
    Case("experts without rows", tokens=6, experts=6, unused=(0, 3, 5)),
    Case("uneven experts of another rank too", tokens=9, experts=5, local=(0, 4)),
    Case("odd groups, sizes no multiple of a tile", tokens=3, hidden=96, intermediate=160),
    Case("more than one step of the contraction", tokens=2, hidden=288, intermediate=320, experts=2),
    Case("whole runs, and both kinds of rest", tokens=3, hidden=672, intermediate=352, experts=1, top_k=1),
    Case("top 1", tokens=3, top_k=1),
    Case("all experts of a token", tokens=2, experts=3, top_k=3),
    Case("plain SwiGLU", tokens=4, activation=GatedActivation(alpha=1.0, limit=float("inf"), up_offset=0.0)),
    Case("small limit", tokens=4, activation=GatedActivation(limit=0.25)),
)


def random_weights(case: Case, format: str, dtype: torch.dtype, device: str) -> ExpertWeights:
    """Weights of all E experts; the bytes of an expert depend on its id only."""
    generator = torch.Generator().manual_seed(1)
    matrix = lookup("quant", FORMATS, format)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    hidden, inter, experts = case.hidden, case.intermediate, case.experts
    return ExpertWeights(
        matrix.quantize(normal(experts, 2 * inter, hidden, scale=hidden**-0.5).to(device)),
        normal(experts, 2 * inter).to(device, dtype),
        matrix.quantize(normal(experts, hidden, inter, scale=inter**-0.5).to(device)),
        normal(experts, hidden).to(device, dtype),
    )


def of_experts(weights: ExpertWeights, ids: tuple[int, ...]) -> ExpertWeights:
    """A rank's share; own memory, since `pack` may take it over."""

    def pick(matrix):
        return type(matrix).cat([matrix.select(slice(i, i + 1)) for i in ids])

    rows = list(ids)
    return ExpertWeights(
        pick(weights.gate_up), weights.gate_up_bias_LN[rows], pick(weights.down), weights.down_bias_LH[rows]
    )


def random_input(case: Case, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] and router logits [T, E]."""
    generator = torch.Generator().manual_seed(2)
    x_TH = torch.randn(case.tokens, case.hidden, generator=generator)
    logits_TE = torch.randn(case.tokens, case.experts, generator=generator)
    if case.favourite is not None:
        logits_TE[:, case.favourite] = 100
    logits_TE[:, list(case.unused)] = -100
    return x_TH.to(device, dtype), logits_TE.to(device, dtype)


def local_E(case: Case, ids: tuple[int, ...], device: str) -> torch.Tensor:
    index = torch.full((case.experts,), -1, dtype=torch.int32)
    index[list(ids)] = torch.arange(len(ids), dtype=torch.int32)
    return index.to(device)


def dispatched(case: Case, logits_TE: torch.Tensor, ids: tuple[int, ...] | None = None) -> Dispatch:
    ids = case.ids if ids is None else ids
    return route(logits_TE, case.top_k, local_E(case, ids, str(logits_TE.device)), len(ids))


def expected(
    x_TH: torch.Tensor,
    weights: ExpertWeights,
    dispatch: Dispatch,
    ids: tuple[int, ...],
    activation: GatedActivation,
) -> torch.Tensor:
    """[T, K, H] in float64, written down slot by slot from the equations; `weights` are of all experts."""
    gate_up_ENH = weights.gate_up.dequantize(torch.float32).double()
    down_EHI = weights.down.dequantize(torch.float32).double()
    y_TKH = torch.zeros(*dispatch.expert_TK.shape, x_TH.shape[1], dtype=torch.float64, device=x_TH.device)
    for t, experts_K in enumerate(dispatch.expert_TK.tolist()):
        for k, e in enumerate(experts_K):
            if e not in ids:
                continue
            both_N = gate_up_ENH[e] @ x_TH[t].double() + weights.gate_up_bias_LN[e].double()
            gate_I = both_N[0::2].clamp(max=activation.limit)
            up_I = both_N[1::2].clamp(-activation.limit, activation.limit)
            h_I = gate_I / (1 + torch.exp(-activation.alpha * gate_I)) * (up_I + activation.up_offset)
            y_H = down_EHI[e] @ h_I + weights.down_bias_LH[e].double()
            y_TKH[t, k] = dispatch.weight_TK[t, k].double() * y_H
    return y_TKH


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖actual − wanted‖ / ‖wanted‖, 0 where both are all zeros."""
    difference = (actual.double() - wanted.double()).norm().item()
    return difference and difference / wanted.double().norm().item()
