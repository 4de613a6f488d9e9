"""Meeting: a point that every rank passes, and what must be the same on all of them there; rank 0's book of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from epmoe.ranks.fault import Fault


@dataclass(frozen=True)
class Meeting:
    """A point that every rank of some passes; rank 0 counts who has arrived, and compares what they came with."""

    within_s: float = 0.0  # of the first arrival
    remedy: str = ""  # for a rank that comes later
    last: bool = False
    settled: bool = False  # it ends only when a rank that was left outside would have come, too
    purpose: str = ""  # the same on every rank
    brings: Mapping[str, str] = field(default_factory=dict)  # what must be the same on every rank → its value
    alike: str = ""  # how to make it so
    among: tuple[int, ...] = ()  # the ranks that pass it; none: all

    def missed(self) -> str:
        what = "did not finish" if self.last else "was not ready"
        return f"{what} within {self.within_s:g} s of the others" + (f" ({self.remedy})" if self.remedy else "")


class Meetings:
    """Those to which somebody has come and not yet everybody; used on rank 0, by one thread."""

    def __init__(self, size: int) -> None:
        self.there = set(range(size))  # the ranks that are still of the run
        self.arrived: dict[tuple[int, ...], dict[int, Meeting]] = {}  # by `Meeting.among`; the first one to come first
        self.first_s: dict[tuple[int, ...], float] = {}  # when that was

    def arrive(self, rank: int, meeting: Meeting, now: float) -> None:
        key = tuple(meeting.among)
        self.first_s.setdefault(key, now)
        self.arrived.setdefault(key, {})[rank] = meeting

    def lose(self, ranks: Iterable[int]) -> None:
        """They come no more, and nobody waits for them."""
        self.there.difference_update(ranks)
        for key, arrived in [*self.arrived.items()]:
            self.arrived[key] = {rank: meeting for rank, meeting in arrived.items() if rank in self.there}
            if not self.arrived[key]:
                del self.arrived[key], self.first_s[key]

    @property
    def complete(self) -> bool:
        """Whether there is one to which all have come."""
        return any(self._absent(key) == set() for key in self.arrived)

    def decide(self, *, settled: bool) -> tuple[list[tuple[set[int], Meeting]], Fault | None]:
        """Those that end now, each with the ranks that may go on; or what is wrong with one.

        Args:
            settled: no rank comes any more that may be the one that this run lacks. Then a second one of its number
                might be on its way: a meeting waits for that, where it asks to, or where its ranks differ.
        """
        done: list[tuple[set[int], Meeting]] = []
        for key, arrived in [*self.arrived.items()]:
            if self._absent(key):
                continue
            fault, meeting = difference(arrived), arrived[min(arrived)]
            if (fault is not None or meeting.settled) and not settled:
                continue
            del self.arrived[key], self.first_s[key]
            if fault is not None:
                return done, fault
            done.append((set(arrived), meeting))
        return done, None

    def late(self, now: float) -> list[tuple[int, str]]:
        """Ranks for which the others have waited too long, and what is said of them."""
        found = []
        for key, arrived in self.arrived.items():
            first = next(iter(arrived.values()))
            if now - self.first_s[key] > first.within_s:
                found += [(rank, first.missed()) for rank in sorted(self._absent(key))]
        return found

    def _absent(self, key: tuple[int, ...]) -> set[int]:
        return (self.there & set(key) if key else self.there) - set(self.arrived[key])


def difference(arrived: Mapping[int, Meeting]) -> Fault | None:
    """The first rank that came with something else than rank 0, as a user's mistake; None: all came with the same."""
    ours = arrived[min(arrived)]
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
