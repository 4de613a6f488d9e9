"""Figures: how much a service has to do, and has done."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Figures:
    """Of one replica of the model, or of several together."""

    queued: int
    queued_tokens: int
    running: int
    waiting: int  # for pages
    put_back: int
    pages: int
    pages_free: int
    steps: int
    step_s: float
    drafted: int = 0  # tokens
    accepted: int = 0  # of them, those that came
    replica: int = 0


def total(several: Sequence[Figures]) -> Figures:
    """All of them together, under the first one's number."""
    names = [item.name for item in fields(Figures) if item.name != "replica"]
    return replace(several[0], **{name: sum(getattr(each, name) for each in several) for name in names})
