"""The sampler with its rows' parameters on the host."""

from collections.abc import Sequence

import torch

from epmoe.batch import Adjustments, Listed
from epmoe.engine import sampler
from epmoe.engine.adjust import entries, packed
from epmoe.engine.request import MOST_LISTED, Level, SamplingParams, TokenLogprobs


def sample(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    seen_BV: torch.Tensor | None = None,
    said: Sequence[Sequence[int]] | None = None,
    ends: Sequence[Sequence[int]] | None = None,
) -> torch.Tensor:
    """`sampler.sample` at the least level that serves these rows, [B] on the logits' device.

    `said` are the answers so far (None: nothing), `ends` the ids that end them.
    """
    assert len(params) == len(positions) == logits_BV.shape[0]
    params = [each.settled() for each in params]
    level = max((each.level for each in params), default=Level.GREEDY)
    position_B = torch.tensor(positions, dtype=torch.int64, device=logits_BV.device)
    tensors = sampler.sampling_tensors(params, logits_BV.device)
    adjusted = any(each.kept for each in params)
    begins = [position - len(said[row] if said else ()) for row, position in enumerate(positions)]
    asked = adjustments(params, logits_BV, seen_BV, said, ends, begins) if adjusted else None
    return sampler.sample(
        logits_BV, torch.arange(len(params), device=logits_BV.device), position_B, tensors, asked, level
    )


def adjustments(
    params: Sequence[SamplingParams],
    logits_BV: torch.Tensor,
    seen_BV: torch.Tensor | None = None,
    said: Sequence[Sequence[int]] | None = None,
    ends: Sequence[Sequence[int]] | None = None,
    begins: Sequence[int] | None = None,
) -> Adjustments:
    """What these rows ask for; `begins` are the answers' first positions, 0 if nobody says others."""
    vocab, device = logits_BV.shape[1], logits_BV.device
    assert seen_BV is not None or not any("seen" in each.kept for each in params), "a penalty needs the ids seen"
    count_BV = torch.zeros(len(params), vocab, dtype=torch.int32)
    lists = (torch.int64, torch.float32, torch.int64)
    listed = Listed(*(torch.zeros(len(params), MOST_LISTED, dtype=kind) for kind in lists))
    allowed = []
    for row, each in enumerate(params):
        for id in said[row] if said else ():
            count_BV[row, id] += 1
        for place, entry in enumerate(entries(each, begins[row] if begins else 0, ends[row] if ends else ())):
            for tensor_BK, value in zip(listed, entry, strict=True):
                tensor_BK[row, place] = value
        ids = range(vocab) if each.allowed_token_ids is None else each.allowed_token_ids
        allowed.append(torch.from_numpy(packed(ids, vocab)))
    penalty_B3 = torch.tensor([each.penalties() for each in params], dtype=torch.float32, device=device)
    moved = Listed(*(each.to(device) for each in listed))
    return Adjustments(penalty_B3, seen_BV, count_BV.to(device), moved, torch.stack(allowed).to(device))


def log_probabilities(logits_BV: torch.Tensor, id_B: torch.Tensor, top: int) -> list[TokenLogprobs]:
    """`sampler.top_logprobs` on the host."""
    return sampler.to_logprobs(*sampler.top_logprobs(logits_BV, id_B, top))
