"""Where numbers stopped being finite: in which sublayer, at which position. Asked when logits are not; before, it costs
nothing: a NaN anywhere reaches the logits by itself, through norm, router, experts and attention.

The sequence goes through the model once more, in pieces of its own, and each sublayer's outcome is looked at.

Letters: T tokens of a step · S sublayers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from epmoe.batch import Step
from epmoe.cache.cache import Cache
from epmoe.errors import UserError
from epmoe.layers.owed import Owed
from epmoe.models import Model
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import Arrival, to_device

CHUNK = 1024  # tokens of a piece: small beside what the cache was made for, and in one micro-batch
FINITE = 1 << 60  # above every position
ODD = ("NaN", "an infinity")


class NotFinite(UserError):
    """Logits of some prompts are not finite: which prompts, numbered from 1, and where the first of them failed."""

    def __init__(self, prompts: Sequence[int], position: int, where: str) -> None:
        self.prompts, self.position, self.where = tuple(prompts), position, where
        others = ", ".join(str(each) for each in self.prompts[1:6])
        more = len(self.prompts) - 6
        also = f" (nor are those of {others}{f' and {more} more' if more > 0 else ''})" if others else ""
        super().__init__(
            f"the model's logits are not finite at position {position} of prompt {self.prompts[0]}{also}; {where}: "
            "the checkpoint is damaged, or its numbers overflow in this runtime.dtype"
        )

    def numbered(self, numbers: Sequence[int]) -> "NotFinite":
        """The same of prompts whose n-th one has the number `numbers[n - 1]`; one that is there twice is told once."""
        return NotFinite(list(dict.fromkeys(numbers[each - 1] for each in self.prompts)), self.position, self.where)


def locate(model: Model, cache: Cache, ranks: Ranks, ids: Sequence[int], timeout_s: float) -> str:
    """Which part of the model is the first that is not finite, at which position, and a weight of it that is not.

    A collective, like every call of the model; what is found is the same on every rank.

    Args:
        cache: has room for these ids.
    Raises:
        NoArrival: the model did not answer in time.
    """
    sublayers = model.sublayers()
    outcomes = [Outcome() for _ in sublayers]
    hooks = [part.register_forward_hook(each) for (_, part), each in zip(sublayers, outcomes, strict=True)]
    handle, cached = cache.pages.admit()
    try:
        while cached < len(ids):
            count = cache.grow(handle, cached, min(cached + CHUNK, len(ids)))
            assert count, "the cache is full"
            step = _piece(ids[cached : cached + count], cached, handle, cache)
            for each in outcomes:
                each.positions = step.position_T, step.position_T[-1:]
            model.hidden(step, cache)
            cached += count
        firsts = torch.stack([each.first.to(cache.device) for each in outcomes] or [torch.tensor(FINITE)])
        first_S = Arrival([firsts]).wait(timeout_s)[0].tolist()
    finally:
        cache.release(handle)
        for hook in hooks:
            hook.remove()
    found = [(*named, first) for named, first in zip(sublayers, first_S, strict=False) if first < FINITE]
    if not found:
        return "all sublayers are finite in a second pass, so it is the projection to the vocabulary"
    name, part, position = found[0]
    parameters = list(part.named_parameters())
    odd = [(place, _odd(value)) for place, (_, value) in enumerate(parameters) if not value.isfinite().all()]
    # Of heads that ranks share another may have it.
    mine = (odd[0][0], ODD.index(odd[0][1])) if odd else (len(parameters), 0)
    place, kind = min(map(tuple, ranks.gather(mine)))
    reason = f" (its {parameters[place][0]} holds {ODD[kind]})" if place < len(parameters) else ""
    return f"the first sublayer that is not finite is {name} at position {position}{reason}"


def _piece(ids: Sequence[int], cached: int, handle: int, cache: Cache) -> Step:
    """The step of a sequence's next tokens."""
    return Step(
        token_T=to_device(ids, torch.int64, cache.device),
        position_T=to_device(range(cached, cached + len(ids)), torch.int64, cache.device),
        sequence_B=to_device([], torch.int64, cache.device),
        spans=((0, len(ids), cached, handle),),
        output_O=to_device([len(ids) - 1], torch.int64, cache.device),
    )


class Outcome:
    """A forward hook that keeps the first position at which its module's outcome was not finite, on the device."""

    def __init__(self) -> None:
        self.first = torch.tensor(FINITE)
        self.positions = self.first, self.first  # of the step's tokens, and of those whose logits are wanted

    def __call__(self, module: nn.Module, given: Any, outcome: Any) -> None:
        value = outcome[1] if isinstance(outcome, tuple) else outcome  # beside the residual stream: what is new
        if isinstance(value, Owed):
            value = value.wait()
        if value is None or not len(value):
            return
        position_T = next(each for each in self.positions if len(each) == len(value))
        bad_T = ~value.flatten(1).isfinite().all(1)
        self.first = torch.minimum(self.first.to(value.device), torch.where(bad_T, position_T, FINITE).amin())


def _odd(value: torch.Tensor) -> str:
    return ODD[0] if bool(value.isnan().any()) else ODD[1]
