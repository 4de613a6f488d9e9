"""Sampler: logits → the next token's id, the same on every rank and in every batch; layers/sampling.py defines it.

What a token is drawn with is a hash of (seed, position): there is no generator state, so a token does not depend on the
batch, the row, the rank or the order of requests.

Letters: B rows (sequences) · S handles of sequences · P parameters of a row · V vocabulary · Q log-probabilities asked
for.
"""

from collections.abc import Sequence

import torch

from epmoe.batch import KINDS, Adjustments, SamplingTensors
from epmoe.engine.request import Level, SamplingParams, TokenLogprobs
from epmoe.layers.twin import twin


def sampling_tensors(params: Sequence[SamplingParams], device: torch.device) -> SamplingTensors:
    """The parameters of as many sequences."""
    values = [each.row() for each in params]
    return SamplingTensors(
        torch.tensor(values, dtype=torch.float64).reshape(len(params), 5).to(device),
        torch.tensor([each.settled().seed for each in params], dtype=torch.int64).to(device),
        torch.tensor([kind(each) for each in params], dtype=torch.int32).to(device),
    )


def kind(params: SamplingParams) -> int:
    """The bits of what its logits need.

    >>> kind(SamplingParams()), kind(SamplingParams(presence_penalty=1, min_tokens=2))
    (0, 6)
    """
    return sum(1 << bit for bit, name in enumerate(KINDS) if name in params.kept)


def sample(
    logits_BV: torch.Tensor,
    sequence_B: torch.Tensor,
    position_B: torch.Tensor,
    params: SamplingTensors,
    adjustments: Adjustments | None,
    level: Level,
) -> torch.Tensor:
    """Choose one token a row: int64 [B] on the logits' device. A row that is not finite yields V, which is no token.

    With kernels nothing waits for the device, so it fits a CUDA graph. Does not change its arguments.

    Args:
        sequence_B: the rows' handles.
        position_B: the index that the chosen token will have in its sequence.
        adjustments: of the sequences' logits; None: they stay as they are.
        level: at least that of every row.
    """
    if level == Level.GREEDY and adjustments is None:
        greedy = twin("greedy", logits_BV)
        id_B: torch.Tensor = greedy.join_largest(greedy.largest(logits_BV, 0), logits_BV.shape[1])
    else:
        id_B = twin("sampling", logits_BV).choose(logits_BV, sequence_B, position_B, params, adjustments)
    return id_B


def top_logprobs(
    logits_BV: torch.Tensor, id_B: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `layers.sampling.top_logprobs`: chosen_B, id_BQ, logprob_BQ, on the device."""
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    found = twin("sampling", logits_BV).top_logprobs(logits_BV, id_B, top)
    return found


def to_logprobs(chosen_B: torch.Tensor, id_BQ: torch.Tensor, logprob_BQ: torch.Tensor) -> list[TokenLogprobs]:
    tops = zip(id_BQ.tolist(), logprob_BQ.tolist(), strict=True)
    return [
        TokenLogprobs(chosen, tuple(zip(ids, values, strict=True)))
        for chosen, (ids, values) in zip(chosen_B.tolist(), tops, strict=True)
    ]
