"""The reference experts against loops over Python floats, straight from the stored bytes and the published formulas.

Other backends are compared with the reference; a mistake in the reference would pass all those tests. This one shares
with it neither the decoding, nor the routing, nor the order of rows.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from epmoe.formats import ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.placement import contiguous
from epmoe.moe.router.reference import route

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
GPT_OSS = GatedActivation()


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int = 3
    hidden: int = 32
    intermediate: int = 32
    experts: int = 4
    top_k: int = 2
    ranks: int = 1
    scale: int = 122  # around this byte; larger ones drive gate and up beyond their limits
    activation: GatedActivation = GPT_OSS

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("gpt_oss"),
    Case("two_ranks", ranks=2),
    Case("three_experts_on_two_ranks", experts=3, top_k=3, ranks=2),
    Case("clamped", scale=126),
    Case("two_groups", hidden=64, intermediate=32, tokens=1),
    Case("narrow_in_wide_out", hidden=32, intermediate=64, tokens=2),
    Case("plain_swiglu", scale=126, activation=GatedActivation(alpha=1.0, limit=math.inf, up_offset=0.0)),
)


@dataclass(frozen=True)
class Layer:
    """One layer as a checkpoint stores it, and one batch."""

    tensors: dict[str, torch.Tensor]
    x_TH: torch.Tensor
    logits_TE: torch.Tensor


def layer(case: Case) -> Layer:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def matrix(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        shape = (case.experts, rows, columns // 32)
        return {
            f"{name}_blocks": torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8),
            f"{name}_scales": torch.randint(
                case.scale - 1, case.scale + 2, shape, generator=generator, dtype=torch.uint8
            ),
            f"{name}_bias": normal(case.experts, rows),
        }

    tensors = {
        **matrix("gate_up", 2 * case.intermediate, case.hidden),
        **matrix("down", case.hidden, case.intermediate),
    }
    return Layer(tensors, normal(case.tokens, case.hidden), normal(case.tokens, case.experts))


def row_values(tensors: dict[str, torch.Tensor], name: str, expert: int, row: int) -> list[float]:
    values = []
    for block, scale in zip(
        tensors[f"{name}_blocks"][expert, row].tolist(), tensors[f"{name}_scales"][expert, row].tolist(), strict=True
    ):
        for byte in block:
            for nibble in (byte % 16, byte // 16):
                values.append((-1 if nibble >= 8 else 1) * E2M1[nibble % 8] * 2.0 ** (scale - 127))
    return values


def product(tensors: dict[str, torch.Tensor], name: str, expert: int, x: list[float]) -> list[float]:
    """W·x + b."""
    bias = tensors[f"{name}_bias"][expert].tolist()
    return [
        sum(w * v for w, v in zip(row_values(tensors, name, expert, row), x, strict=True)) + b
        for row, b in enumerate(bias)
    ]


def expert_output(case: Case, tensors: dict[str, torch.Tensor], expert: int, x: list[float]) -> list[float]:
    act, gate_up = case.activation, product(tensors, "gate_up", expert, x)
    hidden = []
    for gate, up in zip(gate_up[::2], gate_up[1::2], strict=True):
        gate, up = min(gate, act.limit), max(-act.limit, min(up, act.limit))
        hidden.append(gate / (1 + math.exp(-act.alpha * gate)) * (up + act.up_offset))
    return product(tensors, "down", expert, hidden)


def moe(case: Case, data: Layer) -> list[list[list[float]]]:
    """[T][K][H]: gate weight × expert output, experts by falling logit."""
    out = []
    for x, logits in zip(data.x_TH.tolist(), data.logits_TE.tolist(), strict=True):
        chosen = sorted(range(case.experts), key=logits.__getitem__, reverse=True)[: case.top_k]
        total = sum(math.exp(logits[e]) for e in chosen)
        outputs = [(math.exp(logits[e]) / total, expert_output(case, data.tensors, e, x)) for e in chosen]
        out.append([[weight * y for y in output] for weight, output in outputs])
    return out


def on_rank(case: Case, data: Layer, rank: int) -> torch.Tensor:
    placement = contiguous(case.experts, case.ranks)
    ids = list(placement.experts[rank])
    mine = {name: tensor[ids] for name, tensor in data.tensors.items()}
    weights = ExpertWeights(
        gate_up=Mxfp4Matrix(mine["gate_up_blocks"], mine["gate_up_scales"]),
        gate_up_bias_LN=mine["gate_up_bias"],
        down=Mxfp4Matrix(mine["down_blocks"], mine["down_scales"]),
        down_bias_LH=mine["down_bias"],
    )
    dispatch = route(data.logits_TE, case.top_k, placement.local_E(rank, torch.device("cpu")), len(ids))
    return ReferenceExperts.pack(weights, case.activation).forward(data.x_TH, dispatch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_experts(case: Case) -> None:
    data = layer(case)
    expected_TKH = torch.tensor(moe(case, data))
    actual_TKH = torch.stack([on_rank(case, data, rank) for rank in range(case.ranks)]).sum(0)
    # float32 against Python's doubles: two products of at most 64 terms, each rounded to 2^-24 of its largest term.
    torch.testing.assert_close(actual_TKH, expected_TKH, rtol=1e-5, atol=2e-6 * float(expected_TKH.abs().max()))


def test_the_clamped_case_clamps() -> None:
    """Otherwise the limit would go untested: gates above it, ups beyond it on both sides."""
    (case,) = (case for case in CASES if case.name == "clamped")
    data = layer(case)
    gate_up = [product(data.tensors, "gate_up", e, x) for x in data.x_TH.tolist() for e in range(case.experts)]
    gates, ups = [v for row in gate_up for v in row[::2]], [v for row in gate_up for v in row[1::2]]
    assert max(gates) > 7 and min(gates) < -7 and max(ups) > 7 and min(ups) < -7
