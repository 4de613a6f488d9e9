"""Scores: log-probabilities of prompts' tokens, each given those before it.

A step leaves the last norms of the tokens that they follow from. Logits are made of a few rows at a time, so that their
memory has a bound, however long a prompt is: a row of gpt-oss has 0.8 MB of them. They are the sampler's
(`sampler.top_logprobs`), of the raw logits over the whole vocabulary, on every rank.

Letters: S tokens that are scored · M of them at a time · Q most likely ones · H hidden · V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import islice

import torch

from epmoe.engine.ragged import Score
from epmoe.engine.request import TokenLogprobs
from epmoe.engine.sampler import to_logprobs, top_logprobs
from epmoe.models import Model
from epmoe.ranks.transfer import to_device


def scored(model: Model, norm_SH: torch.Tensor, scores: Sequence[Score], rows: int) -> list[torch.Tensor]:
    """chosen_S, id_SQ and logprob_SQ as `top_logprobs` has them, of the tokens at the places of `scores`.

    On the device, and nothing waits for it. Q is what the one that asks for most has.

    Args:
        norm_SH: of the tokens before them.
        rows: logits are made of so many at a time, at most.
    """
    ids = [id for sequence, places in scores for id in sequence.request.ids[places.start : places.stop]]
    top = most_asked(scores)
    id_S = to_device(ids, torch.int64, norm_SH.device)
    found = [
        top_logprobs(model.logits(norm_MH, None), id_M, top)
        for norm_MH, id_M in zip(norm_SH.split(rows), id_S.split(rows), strict=True)
    ]
    return [torch.cat(each) for each in zip(*found, strict=True)]


def deliver(scores: Sequence[Score], tensors: Sequence[torch.Tensor]) -> None:
    """Add what `scored` has found, now on the host, to each sequence's, cut to what it asks for.

    A sequence whose logits are not finite is marked, and has no more of them.
    """
    found = iter(to_logprobs(tensors[0], tensors[1], tensors[2]))
    for score in scores:
        sequence, places = score
        for one in islice(found, len(places)):
            own = TokenLogprobs(one.chosen, one.top[: _asked(score)])
            sequence.finite = sequence.finite and all(
                map(math.isfinite, (own.chosen, *(value for _, value in own.top)))
            )
            if sequence.finite:
                sequence.prompt_logprobs.append(own)


def most_asked(scores: Sequence[Score]) -> int:
    """Of how many likely tokens the log-probabilities are found."""
    return max(map(_asked, scores))


def _asked(score: Score) -> int:
    return score[0].request.params.prompt_logprobs or 0
