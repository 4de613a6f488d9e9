"""Meeting: a point that every rank passes, and what must be the same on all of them there."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from epmoe.ranks.fault import Fault


@dataclass(frozen=True)
class Meeting:
    """A point that every rank passes; rank 0 counts who has arrived, and compares what they came with."""

    within_s: float = 0.0  # of the first arrival
    remedy: str = ""  # for a rank that comes later
    last: bool = False
    settled: bool = False  # it ends only when a rank that was left outside would have come, too
    purpose: str = ""  # the same on every rank
    brings: Mapping[str, str] = field(default_factory=dict)  # what must be the same on every rank → its value
    alike: str = ""  # how to make it so

    def missed(self) -> str:
        what = "did not finish" if self.last else "was not ready"
        return f"{what} within {self.within_s:g} s of the others" + (f" ({self.remedy})" if self.remedy else "")


def difference(arrived: Mapping[int, Meeting]) -> Fault | None:
    """The first rank that came with something else than rank 0, as a user's mistake; None: all came with the same."""
    ours = arrived[0]
    for rank, theirs in sorted(arrived.items()):
        if theirs.purpose != ours.purpose:
            calls = [meeting.purpose or "start" for meeting in (theirs, ours)]
            text = f"it comes to {calls[0]}, rank 0 to {calls[1]}: every rank's program must make the same calls"
            return Fault("mistake", rank, text, 2)
        names = [name for name in {**ours.brings, **theirs.brings} if theirs.brings.get(name) != ours.brings.get(name)]
        if names:
            more = f" ({len(names) - 1} more differ)" if len(names) > 1 else ""
            text = f"rank {rank} has {_shown(theirs, names[0])}, rank 0 {_shown(ours, names[0])}{more}: {ours.alike}"
            return Fault("mistake", 0, text, 2)
    return None


def _shown(meeting: Meeting, name: str) -> str:
    return f"{name}={meeting.brings[name]}" if name in meeting.brings else f"no {name}"
