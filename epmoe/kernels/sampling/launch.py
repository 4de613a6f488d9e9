"""What is launched for a choice of tokens, and the numbers that one launch leaves for the next.

    scan ─▶ adjusted scores, best ─▶ round 0 … 2 ─▶ bracket ─▶ sum ─▶ weights, candidates ─▶ border ─▶ draw

As many launches for any rows, and their grids follow from the number of rows alone, so that all of it fits a CUDA
graph; a program whose row needs nothing of it returns at once.

Letters: B rows · V vocabulary · Q log-probabilities asked for.
"""

from typing import NamedTuple

import torch
import triton

from epmoe.batch import Adjustments, SamplingTensors
from epmoe.kernels.sampling.border import border_kernel
from epmoe.kernels.sampling.draw import draw_kernel, top_kernel
from epmoe.kernels.sampling.narrow import round_kernel, sum_kernel
from epmoe.kernels.sampling.scan import scan_kernel

RUN = 8192  # ids of a program: 25 programs a row for 201,088
PART, ROUND_PART, SUM_PART = 2048, 1024, 512  # of them that a program has in registers; beside its sums
ROUNDS, PIVOTS, RECORD = 3, 8, 16
# Of a pass, at most, if the rows are no more: what a program finds out before it begins takes as long as some runs, so
# each has several where there are many. Four for each multiprocessor of an H200.
PROGRAMS = 528
ROOM, FEW = 4096, 1024  # candidates of a row; so many, or fewer, are looked through faster
MOST_TOP = 128  # log-probabilities of a row
VALUES = 5  # of SamplingTensors.value_SP
MOST_IDS = 1 << 20
WARPS = {"scan": 8, "adjust": 16, "round": 4, "sum": 4, "border": 8, "draw": 16, "top": 8}


class Record(NamedTuple):
    """Of B rows and their runs."""

    adjusted: torch.Tensor  # float32, or the logits, where nobody's are adjusted
    key: torch.Tensor  # int64 [B, runs]
    low: torch.Tensor  # float32 [B, runs]
    pivot: torch.Tensor  # float32 [ROUNDS, B, RECORD]
    measure: torch.Tensor  # float32 [ROUNDS, B, groups, RECORD]
    bracket: torch.Tensor  # float32 [B, 2]
    sum: torch.Tensor  # int64 [B, groups, 4]
    kept: torch.Tensor  # int64 [B, runs]
    candidates: torch.Tensor  # int32 [B]
    candidate: torch.Tensor  # int32 [B, ROOM]: ids
    border: torch.Tensor  # int64 [B]


def serves(logits_BV: torch.Tensor) -> bool:
    """Any rows."""
    return True


def choose(
    logits_BV: torch.Tensor,
    sequence_B: torch.Tensor,
    position_B: torch.Tensor,
    params: SamplingTensors,
    adjustments: Adjustments | None,
) -> torch.Tensor:
    """As `layers.sampling.choose`; seven launches."""
    id_B = torch.empty_like(sequence_B)
    if len(logits_BV):
        record = _scan(logits_BV, sequence_B, position_B, params, adjustments)
        _narrow(logits_BV, sequence_B, params, record, every=False)
        (rows, ids), parts = logits_BV.shape, record.key.shape[1]
        draw_kernel[(rows,)](
            logits_BV, logits_BV.stride(0), ids, record.adjusted, record.adjusted.stride(0), sequence_B, position_B,
            params.value_SP, params.seed_S, params.kind_S, record.key, record.kept, record.border, id_B,
            parts, N=RUN, SP=triton.next_power_of_2(parts), num_warps=WARPS["draw"],
        )  # fmt: skip
    return id_B


def top_logprobs(
    logits_BV: torch.Tensor, id_B: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `layers.sampling.top_logprobs`; up to MOST_TOP of them. Temperature 1 and top-k are its rows' parameters."""
    (rows, ids), device = logits_BV.shape, logits_BV.device
    top = min(top, ids)
    assert top <= MOST_TOP
    chosen_B = torch.empty(rows, dtype=torch.float64, device=device)
    id_BQ = torch.empty((rows, top), dtype=torch.int64, device=device)
    logprob_BQ = torch.empty((rows, top), dtype=torch.float64, device=device)
    if not rows:
        return chosen_B, id_BQ, logprob_BQ
    value_15 = torch.ones((1, 5), dtype=torch.float64, device=device)
    value_15[:, 1:4:2] = 0
    value_15[:, 1] = top
    sequence_B = torch.zeros(rows, dtype=torch.int64, device=device)
    params = SamplingTensors(value_15, sequence_B[:1], torch.zeros(1, dtype=torch.int32, device=device))
    record = _scan(logits_BV, sequence_B, sequence_B, params, None)
    _narrow(logits_BV, sequence_B, params, record, every=True)
    found = torch.empty((rows, MOST_TOP), dtype=torch.int64, device=device)
    parts = record.key.shape[1]
    top_kernel[(rows,)](
        logits_BV, logits_BV.stride(0), ids, record.key, record.sum, record.candidates, record.candidate, record.border,
        id_B, found, chosen_B, id_BQ, logprob_BQ, top, parts, record.sum.shape[1],
        M=PART, SP=triton.next_power_of_2(parts), ROOM=ROOM, QP=MOST_TOP, num_warps=WARPS["top"],
    )  # fmt: skip
    return chosen_B, id_BQ, logprob_BQ


def _scan(
    logits_BV: torch.Tensor,
    sequence_B: torch.Tensor,
    position_B: torch.Tensor,
    params: SamplingTensors,
    adjustments: Adjustments | None,
) -> Record:
    (rows, ids), device = logits_BV.shape, logits_BV.device
    assert logits_BV.dtype == torch.float32 and logits_BV.stride(1) == 1 and 0 < ids <= MOST_IDS
    assert params.value_SP.is_contiguous() and params.value_SP.shape[1] == VALUES
    parts = triton.cdiv(ids, RUN)
    groups = triton.cdiv(parts, _runs_of_a_group(parts, rows))

    def made(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # Rows begin at multiples of 16 numbers, so that loads are wide.
    adjusted = logits_BV if adjustments is None else made(torch.float32, rows, triton.cdiv(ids, 16) * 16)
    record = Record(
        adjusted,
        made(torch.int64, rows, parts),
        made(torch.float32, rows, parts),
        made(torch.float32, ROUNDS, rows, RECORD),
        made(torch.float32, ROUNDS, rows, groups, RECORD),
        made(torch.float32, rows, 2),
        made(torch.int64, rows, groups, 4),
        made(torch.int64, rows, parts),
        made(torch.int32, rows),
        made(torch.int32, rows, ROOM),
        made(torch.int64, rows),
    )
    penalty, seen, count, allowed = None, None, None, None
    listed: tuple[torch.Tensor | None, ...] = (None, None, None)
    if adjustments is not None:
        penalty, count, allowed = adjustments.penalty_S3, adjustments.count_SV, adjustments.allowed_SW
        seen = None if adjustments.seen_SV is None else adjustments.seen_SV.view(torch.uint8)
        listed = adjustments.listed or listed
    entries = 1 if listed[0] is None else listed[0].shape[1]
    scan_kernel[(parts, rows)](
        logits_BV, logits_BV.stride(0), ids, sequence_B, position_B, params.kind_S, penalty, seen, count, *listed,
        entries, allowed, 1 if allowed is None else allowed.shape[1], adjusted, adjusted.stride(0),
        record.key, record.low, record.candidates, parts,
        N=RUN, M=min(PART, RUN), K=triton.next_power_of_2(entries),
        num_warps=WARPS["scan" if adjustments is None else "adjust"], enable_fp_fusion=False,
    )  # fmt: skip
    return record


def _runs_of_a_group(parts: int, rows: int) -> int:
    """How many runs of a row a program has."""
    return triton.cdiv(parts, max(1, min(parts, PROGRAMS // rows)))


def _narrow(
    logits_BV: torch.Tensor, sequence_B: torch.Tensor, params: SamplingTensors, record: Record, *, every: bool
) -> None:
    """Fill the record up to the border. `every`: what weighs nothing has its place, too, and has room."""
    (rows, ids), parts = logits_BV.shape, record.key.shape[1]
    shared = (
        logits_BV, logits_BV.stride(0), ids, record.adjusted, record.adjusted.stride(0),
        sequence_B, params.value_SP, params.kind_S, record.key,
    )  # fmt: skip
    groups, each = record.sum.shape[1], _runs_of_a_group(parts, rows)
    sizes = {"SP": triton.next_power_of_2(parts), "ROOM": ROOM}
    for number in range(ROUNDS):
        round_kernel[(groups, rows)](
            *shared, record.low, record.pivot, record.measure, number, rows, parts, groups, each,
            **sizes, N=RUN, M=ROUND_PART, P=PIVOTS, num_warps=WARPS["round"],
        )  # fmt: skip
    sum_kernel[(groups, rows)](
        *shared, record.pivot, record.measure, record.bracket, record.sum, record.kept, record.candidates,
        record.candidate, int(every), rows, parts, groups, each, ROUNDS - 1,
        **sizes, N=RUN, M=SUM_PART, P=PIVOTS, num_warps=WARPS["sum"],
    )  # fmt: skip
    border_kernel[(rows,)](
        *shared, record.bracket, record.sum, record.kept, record.candidates, record.candidate, record.border,
        int(every), parts, groups, **sizes, FEW=min(FEW, ROOM // 2), N=RUN, M=PART, num_warps=WARPS["border"],
    )  # fmt: skip
