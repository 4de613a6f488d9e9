"""The contract of an expert backend as checks: its rows against the equations in float64, and what is asked besides.

For scripts/bench/experts.py. Every check raises `Broken`, which says what does not hold.

Letters: T tokens · H hidden · K experts per token.
"""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from epmoe.errors import UserError
from epmoe.formats import FORMATS, ExpertWeights
from epmoe.moe.experts import Experts
from epmoe.moe.experts.reference import ReferenceExperts
from scripts.bench.expert_cases import (
    CASES,
    TOLERANCE,
    Case,
    dispatched,
    expected,
    of_experts,
    random_input,
    random_weights,
    relative_error,
)

BATCH = Case("batch", tokens=37, hidden=96, intermediate=64, experts=5, top_k=3)


class Broken(Exception):
    """A part of the contract that does not hold; says which."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


@dataclass(frozen=True)
class Setting:
    """What a check runs with."""

    backend: type[Experts]
    format: str
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.format}, {str(self.dtype).removeprefix('torch.')}"

    def weights(self, case: Case) -> ExpertWeights:
        return random_weights(case, self.format, self.dtype, self.device)

    def pack(self, case: Case, ids: tuple[int, ...] | None = None) -> Experts:
        """The experts `ids`, or those of the case's rank; with memory of their own."""
        return self.backend.pack(of_experts(self.weights(case), case.ids if ids is None else ids), case.activation)

    def inputs(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        return random_input(case, self.dtype, self.device)


@dataclass(frozen=True)
class Error:
    """How far a case's rows are from the equations in float64, and the reference's rows beside it."""

    setting: str
    case: str
    max: float
    rms: float
    reference_max: float
    reference_rms: float
    same_bits: bool  # as the reference


def compare(setting: Setting, case: Case) -> Error:
    """Raises Broken for rows of the wrong shape, slots of other ranks that are no zeros, too large an error."""
    x_TH, logits_TE = setting.inputs(case)
    dispatch, weights = dispatched(case, logits_TE), setting.weights(case)
    y_TKH = setting.pack(case).forward(x_TH, dispatch)
    reference = ReferenceExperts.pack(of_experts(weights, case.ids), case.activation).forward(x_TH, dispatch)
    wanted = expected(x_TH, weights, dispatch, case.ids, case.activation)
    demand(y_TKH.shape == wanted.shape, f"rows have the shape {tuple(y_TKH.shape)}, not {tuple(wanted.shape)}")
    demand(y_TKH.dtype == x_TH.dtype, f"rows are {y_TKH.dtype}, x is {x_TH.dtype}")
    demand(not y_TKH[wanted == 0].any(), "a slot of another rank is not zero")
    error = relative_error(y_TKH, wanted)
    demand(error <= TOLERANCE[setting.dtype], f"relative error {error:.1e}, allowed {TOLERANCE[setting.dtype]:.0e}")
    (most, rms), (reference_most, reference_rms) = (_max_and_rms(each, wanted) for each in (y_TKH, reference))
    same = torch.equal(y_TKH.view(torch.uint8), reference.view(torch.uint8))
    return Error(str(setting), case.name, most, rms, reference_most, reference_rms, same)


def _max_and_rms(actual: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    difference = (actual.double() - wanted).flatten()
    return (float(difference.abs().max()), float(difference.square().mean().sqrt())) if len(difference) else (0.0, 0.0)


# --- what the contract asks for besides -------------------------------------------------------------------------------


def bits_do_not_follow_the_batch(setting: Setting) -> None:
    """A token alone, in the whole batch, in a shuffled one, and among the first so many."""
    experts, (x_TH, logits_TE) = setting.pack(BATCH), setting.inputs(BATCH)

    def rows(token_T: torch.Tensor) -> torch.Tensor:
        return experts.forward(x_TH[token_T], dispatched(BATCH, logits_TE[token_T]))

    all_T = torch.arange(BATCH.tokens, device=x_TH.device)
    whole = rows(all_T)
    batches = {f"token {t} alone": all_T[t : t + 1] for t in (0, 1, 17, BATCH.tokens - 1)}
    batches |= {f"the first {count} tokens": all_T[:count] for count in (2, 16, 33)}
    batches["the tokens in another order"] = all_T.flip(0)
    for name, token_T in batches.items():
        demand(torch.equal(rows(token_T), whole[token_T]), f"{name}: other bits than in the batch of {BATCH.tokens}")


def bits_do_not_follow_the_placement(setting: Setting) -> None:
    """A slot's row is the same whichever other experts live on its rank."""
    x_TH, logits_TE = setting.inputs(BATCH)
    whole = setting.pack(BATCH).forward(x_TH, dispatched(BATCH, logits_TE))
    for ids in ((0,), (1, 3), (0, 2, 4), (2, 3, 4)):
        dispatch = dispatched(BATCH, logits_TE, ids)
        part = setting.pack(BATCH, ids).forward(x_TH, dispatch)
        mine_TK = torch.isin(dispatch.expert_TK, torch.tensor(ids, device=x_TH.device))
        demand(torch.equal(part[mine_TK], whole[mine_TK]), f"experts {ids} alone: other bits than among all")
        demand(not part[~mine_TK].any(), f"experts {ids} alone: a slot of another rank is not zero")


def writes_where_it_is_told(setting: Setting) -> None:
    """Into the rows that are given, and returns them."""
    experts, (x_TH, logits_TE) = setting.pack(BATCH), setting.inputs(BATCH)
    wanted = experts.forward(x_TH, dispatched(BATCH, logits_TE))
    given = torch.zeros_like(wanted)
    found = experts.forward(x_TH, dispatched(BATCH, logits_TE), given)
    demand(found.data_ptr() == given.data_ptr(), "the rows are elsewhere than in y_TKH")
    demand(torch.equal(given, wanted), "other bits in y_TKH than in memory of its own")


def unpack_gives_everything_back(setting: Setting) -> None:
    """Every value and bias, for odd numbers of groups too."""
    for case in (BATCH, CASES[1], replace(BATCH, hidden=160, intermediate=96)):
        weights, experts = setting.weights(case), setting.pack(case)
        back = experts.unpack()
        for name, a, b in (("gate_up", back.gate_up, weights.gate_up), ("down", back.down, weights.down)):
            demand(
                (a.format, a.shape) == (b.format, b.shape), f"{name}: {a.format} {a.shape}, not {b.format} {b.shape}"
            )
            same = torch.equal(a.dequantize(torch.float32), b.dequantize(torch.float32))
            demand(same, f"{name}: other values than were packed")
        biases = ((back.gate_up_bias_LN, weights.gate_up_bias_LN), (back.down_bias_LH, weights.down_bias_LH))
        demand(all(torch.equal(a, b) for a, b in biases), "other biases than were packed")
        demand(experts.nbytes > 0, f"nbytes is {experts.nbytes}")


def does_not_wait(setting: Setting) -> None:
    """A backend that promises so calls nothing that waits for a GPU."""
    if setting.backend.waits or setting.device == "cpu":
        return
    experts, (x_TH, logits_TE) = setting.pack(BATCH), setting.inputs(BATCH)
    dispatch = dispatched(BATCH, logits_TE)
    experts.forward(x_TH, dispatch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts.forward(x_TH, dispatch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHECKS: tuple[Callable[[Setting], None], ...] = (
    bits_do_not_follow_the_batch,
    bits_do_not_follow_the_placement,
    writes_where_it_is_told,
    unpack_gives_everything_back,
    does_not_wait,
)


def refuses_other_formats(backend: type[Experts], device: str) -> None:
    """With a UserError that names those it runs."""
    for name in sorted(set(FORMATS) - backend.formats):
        try:
            Setting(backend, name, torch.float32, device).pack(BATCH)
        except UserError as error:
            demand(all(each in str(error) for each in backend.formats), f"{name}: the refusal names no format it runs")
        else:
            raise Broken(f"{name} is packed, and `formats` does not name it")


def facts_are_sound(backend: type[Experts]) -> None:
    """What the class says of itself has the types of the contract."""
    demand(bool(backend.formats) and backend.formats <= set(FORMATS), f"formats={set(backend.formats)}: not of FORMATS")
    demand(isinstance(backend.waits, bool), f"waits={backend.waits!r}: no truth")
    for tokens in (0, 1, 100):
        sizes = backend.distinct(tokens)
        fine = isinstance(sizes, tuple) and all(type(each) is int and 0 < each <= tokens for each in sizes)
        demand(fine, f"distinct({tokens}) is {sizes!r}: no tuple of numbers from 1 to {tokens}")


# --- judging ----------------------------------------------------------------------------------------------------------


def judge(backend: type[Experts], device: str) -> tuple[list[Error], list[str]]:
    """Errors of every case that ran, and what is broken; prints both."""
    errors: list[Error] = []
    failed: list[str] = []

    def attempt(name: str, check: Callable[[], object]) -> None:
        """Whatever a backend raises is a finding about it, not about this script."""
        try:
            check()
        except Broken as error:
            failed.append(f"{name}: {error}")
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {error}")

    attempt("facts", partial(facts_are_sound, backend))
    attempt("refuses other formats", partial(refuses_other_formats, backend, device))

    def collect(setting: Setting, case: Case) -> None:
        errors.append(compare(setting, case))

    for setting in settings(backend, device):
        before = len(failed)
        for case in CASES:
            attempt(f"{setting}: {case}", partial(collect, setting, case))
        for check in CHECKS:
            attempt(f"{setting}: {check.__name__.replace('_', ' ')}", partial(check, setting))
        tell([error for error in errors if error.setting == str(setting)], len(failed) - before)
    for each in failed:
        print(f"FAILED  {each}", flush=True)
    return errors, failed


def settings(backend: type[Experts], device: str) -> Iterator[Setting]:
    for name in sorted(set(FORMATS) & backend.formats):
        for dtype in TOLERANCE.keys() & getattr(backend, "dtypes", TOLERANCE.keys()):
            yield Setting(backend, name, dtype, device)


def tell(errors: list[Error], failed: int) -> None:
    """One setting in a line."""
    if not errors:
        print(f"no case ran; {failed} checks failed")
        return
    worst = max(errors, key=lambda error: error.max)
    same = sum(error.same_bits for error in errors)
    print(
        f"{worst.setting}: {len(errors)} of {len(CASES)} cases, {same} with the reference's bits; "
        f"error at most {worst.max:.1e} (RMS {worst.rms:.1e}; the reference there {worst.reference_max:.1e}, RMS "
        f"{worst.reference_rms:.1e}: {worst.case}); {failed} checks failed",
        flush=True,
    )
