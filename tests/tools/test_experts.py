"""scripts/bench/experts.py: a backend from outside passes, and each way to break the contract is found."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch

from epmoe.errors import UserError
from epmoe.formats import ExpertWeights
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.moe.experts import GatedActivation
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.moe.experts.triton import TritonExperts
from epmoe.moe.router import Dispatch
from scripts.bench.expert_cases import CASES
from scripts.bench.expert_contract import judge

ROOT = Path(__file__).resolve().parents[2]

TOY = '''
"""A backend that lives outside epmoe: every slot by itself, in float64."""

import torch

from epmoe.moe.experts.reference import gated


class Toy:
    formats, waits = frozenset({"mxfp4", "bf16"}), True

    def __init__(self, weights, activation):
        self.weights, self.activation, self.nbytes = weights, activation, weights.gate_up.nbytes + weights.down.nbytes

    nbytes: int

    @classmethod
    def serves(cls, device):
        return True

    @classmethod
    def distinct(cls, tokens):
        return ()

    @classmethod
    def pack(cls, weights, activation):
        return cls(weights, activation)

    def unpack(self):
        return self.weights

    def forward(self, x_TH, dispatch, y_TKH=None):
        weights = self.weights
        gate_up_LNH, down_LHI = (each.dequantize(torch.float32).double() for each in (weights.gate_up, weights.down))
        tokens, top_k = dispatch.expert_TK.shape
        y_TKH = x_TH.new_zeros(tokens, top_k, x_TH.shape[1]) if y_TKH is None else y_TKH
        offsets = dispatch.offset_L1.tolist()
        for expert, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:])):
            for slot in dispatch.slot_R[start:stop].tolist():
                t, k = divmod(slot, top_k)
                both_1N = (gate_up_LNH[expert] @ x_TH[t].double() + weights.gate_up_bias_LN[expert].double())[None]
                h_I = gated(both_1N, self.activation)[0]
                row_H = down_LHI[expert] @ h_I + weights.down_bias_LH[expert].double()
                y_TKH[t, k] = (row_H * dispatch.weight_TK[t, k].double()).to(x_TH.dtype)
        return y_TKH
'''


def script(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run in a folder where epmoe is found through the script alone."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "experts.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_a_backend_outside_the_package(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    sizes = ("--device", "cpu", "--tokens", "1,5", "--hidden", "64", "--intermediate", "32", "--experts", "4")
    done = script(tmp_path, "toy:Toy", *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["bench"], record["backend"], record["formats"]) == ("experts", "toy:Toy", ["bf16", "mxfp4"])
    assert record["passed"] and record["failed"] == [] and not record["same_bits"]
    assert len(record["errors"]) == 4 * len(CASES)
    float32 = [error for error in record["errors"] if error["setting"] == "mxfp4, float32"]
    assert {error["case"] for error in float32} == {case.name for case in CASES}
    # Rounded once from float64; the reference sums in float32.
    assert all(error["rms"] <= error["reference_rms"] for error in float32)
    assert any(0 < error["max"] < error["reference_max"] for error in float32)
    assert record["timed"]["peer"] == "reference"
    assert [row["tokens"] for row in record["rows"]] == [1, 5]
    assert all(row["speedup"] == pytest.approx(row["peer_us"] / row["us"]) for row in record["rows"])
    assert "64 tokens" not in done.stdout and "times as fast" in done.stdout


def test_a_name_of_the_table(tmp_path: Path) -> None:
    """The reference has its own bits; on a CPU the table has nothing else to stand beside it."""
    done = script(tmp_path, "reference", "--device", "cpu", "--tokens", "1", "--hidden", "32", "--intermediate", "32")
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and record["same_bits"] and record["timed"]["peer"] is None
    assert record["rows"][0].keys() == {"tokens", "us"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(
            ["nothing"],
            "experts='nothing' is unknown; known: triton, hub, reference, or package.module:Class",
            marks=pytest.mark.slow,
        ),
        (["toy:Nothing"], "experts='toy:Nothing': toy has no class Nothing: give the name of a class in it"),
        (["triton", "--device", "cpu"], "triton does not serve cpu: take another --device"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    done = script(tmp_path, *arguments)
    assert done.returncode == 1 and done.stderr == f"scripts/bench/experts.py: {says}\n" and not done.stdout


# --- every check can fail ---------------------------------------------------------------------------------------------


class Plain(ReferenceExperts):
    """Of one format, so that judging is quick."""

    formats: ClassVar[frozenset[str]] = frozenset({"mxfp4"})

    @classmethod
    def pack(cls, weights: ExpertWeights, activation: GatedActivation) -> Self:
        if weights.gate_up.format != "mxfp4":
            raise UserError("runs mxfp4 only")
        return super().pack(weights, activation)


class Forward(Plain):
    """The rows of Plain, changed by `spoil`."""

    def forward(self, x_TH: torch.Tensor, dispatch: Dispatch, y_TKH: torch.Tensor | None = None) -> torch.Tensor:
        return self.spoil(super().forward(x_TH, dispatch, y_TKH), dispatch)

    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        raise NotImplementedError


class FollowsTheBatch(Forward):
    """A last bit more where many tokens come together."""

    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return y_TKH.mul_(1 + 2**-22 if len(y_TKH) > 30 else 1.0)


class FollowsThePlacement(Forward):
    """A last bit more where few experts live here."""

    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return y_TKH.mul_(1 + 2**-22 if len(dispatch.offset_L1) < 4 else 1.0)


class Elsewhere(Forward):
    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return y_TKH.clone()


class FillsOtherSlots(Forward):
    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return torch.where(y_TKH == 0, 1e-9, y_TKH)


class Inexact(Forward):
    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return y_TKH.mul_(1.01)


class OtherShape(Forward):
    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return y_TKH.flatten(0, 1)


class OtherDtype(Forward):
    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        return y_TKH.to(torch.float64)


class NeedsTokens(Forward):
    def spoil(self, y_TKH: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        assert len(y_TKH), "nothing to do"
        return y_TKH


class LosesValues(Plain):
    def unpack(self) -> ExpertWeights:
        weights = super().unpack()
        gate_up = weights.gate_up
        assert isinstance(gate_up, Mxfp4Matrix)
        return replace(weights, gate_up=Mxfp4Matrix(gate_up.blocks_LNG16 & 0x7F, gate_up.scales_LNG))


class LosesBiases(Plain):
    def unpack(self) -> ExpertWeights:
        weights = super().unpack()
        return replace(weights, down_bias_LH=torch.zeros_like(weights.down_bias_LH))


class TakesAll(Plain):
    @classmethod
    def pack(cls, weights: ExpertWeights, activation: GatedActivation) -> Self:
        return cls(weights, activation)


class UnknownFormat(Plain):
    formats: ClassVar[frozenset[str]] = frozenset({"mxfp4", "fp5"})


class OddSizes(Plain):
    @classmethod
    def distinct(cls, tokens: int) -> tuple[int, ...]:
        return (tokens + 1,)


@dataclass(frozen=True)
class Break:
    backend: type[Plain]
    found: str  # in each of what fails
    checks: int | None = None  # how many fail; None: not counted

    def __str__(self) -> str:
        return self.backend.__name__


BREAKS = [
    Break(FollowsTheBatch, "other bits than in the batch of 37"),
    Break(FollowsThePlacement, "other bits than among all"),
    Break(Elsewhere, "writes where it is told: the rows are elsewhere than in y_TKH", 2),
    Break(FillsOtherSlots, "a slot of another rank is not zero"),
    Break(Inexact, "relative error 1.0e-02, allowed"),
    Break(OtherShape, "rows have the shape"),
    Break(OtherDtype, "rows are torch.float64, x is"),
    Break(NeedsTokens, "no tokens: AssertionError: nothing to do", 2),
    Break(LosesValues, "unpack gives everything back: gate_up: other values than were packed", 2),
    Break(LosesBiases, "unpack gives everything back: other biases than were packed", 2),
    Break(TakesAll, "refuses other formats: bf16 is packed, and `formats` does not name it", 1),
    Break(UnknownFormat, "facts: formats=", None),
    Break(OddSizes, "facts: distinct(0) is (1,): no tuple of numbers from 1 to 0", 1),
]


@pytest.mark.parametrize("case", BREAKS, ids=str)
def test_each_break_is_found(case: Break) -> None:
    _, failed = judge(case.backend, "cpu")
    assert any(case.found in each for each in failed), failed
    assert case.checks is None or len(failed) == case.checks, failed


def test_what_keeps_the_contract_passes() -> None:
    errors, failed = judge(Plain, "cpu")
    assert failed == [] and len(errors) == 2 * len(CASES) and all(error.same_bits for error in errors)


@pytest.mark.gpu
def test_triton_passes_on_a_gpu(tmp_path: Path) -> None:
    """With the times of an outside backend that waits, and so is in no graph, beside it."""
    errors, failed = judge(TritonExperts, "cuda")
    assert failed == [] and len(errors) == 2 * len(CASES)
    (tmp_path / "toy.py").write_text(TOY)
    done = script(tmp_path, "toy:Toy", "--tokens", "1", "--hidden", "256", "--intermediate", "128", "--experts", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert record["timed"]["peer"] == "triton" and record["rows"][0]["peer_us"] > 0
