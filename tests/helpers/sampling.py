"""The sampler with its rows' parameters on the host."""

from collections.abc import Sequence

import torch

from epmoe.engine import sampler
from epmoe.engine.request import Level, SamplingParams, TokenLogprobs


def sample(
    logits_BV: torch.Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    seen_BV: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sampler.sample` at the least level that serves these rows; [B] on the logits' device."""
    assert len(params) == len(positions) == logits_BV.shape[0]
    params = [each.settled() for each in params]
    assert seen_BV is not None or all(each.repetition_penalty == 1 for each in params), "a penalty needs the ids seen"
    level = max((each.level for each in params), default=Level.GREEDY)
    position_B = torch.tensor(positions, dtype=torch.int64, device=logits_BV.device)
    tensors = sampler.SamplingTensors.of(params, logits_BV.device)
    return sampler.sample(logits_BV, tensors, position_B, seen_BV, level)


def log_probabilities(logits_BV: torch.Tensor, id_B: torch.Tensor, top: int) -> list[TokenLogprobs]:
    """`sampler.top_logprobs` on the host."""
    return sampler.to_logprobs(*sampler.top_logprobs(logits_BV, id_B, top))
