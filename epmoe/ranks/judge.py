"""Judge: what a rank's watch knows to be wrong, until it is clear why; and which ranks the others can do without.

A failure seldom comes alone, so faults are collected for `SETTLE_S` from the first one on. Then all end by the
likeliest cause. While a service runs, replicas of the model that share no node with rank 0's are units of their own: a
fault in one of them ends that unit alone.
"""

from collections.abc import Sequence

from epmoe.ranks.fault import KINDS, SETTLE_S, Fault

SURVIVED = ("lost", "mistake", "error", "term")  # kinds of faults that end no more than a unit

Losses = list[tuple[frozenset[int], Fault]]  # units, each with its cause


class Judge:
    """Used by one thread, but that `units` may be set by any.

    Args:
        rank: whose watch this is. Rank 0 judges; the others wait longer, for its verdict.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.faults: list[Fault] = []
        self.first_s = 0.0  # when the first one came
        self.units: Sequence[frozenset[int]] = ()  # ranks without which, each time, the others go on
        self.lost: set[int] = set()  # ranks that have been let go

    def add(self, fault: Fault, now: float) -> None:
        """Take note of it, unless it is one of a rank that is lost already."""
        if fault.rank in self.lost:
            return
        if not self.faults:
            self.first_s = now
        self.faults.append(fault)

    def spares(self, rank: int) -> bool:
        """Whether the others can go on without this one."""
        return any(rank in unit for unit in self.units)

    def settled(self, now: float, early_s: float) -> bool:
        """Whether it is time to judge. `early_s`: what a mistake waits while ranks have not met; 0: they have."""
        if not self.faults:
            return False
        first = self.faults[0]
        wait = early_s if early_s and first.kind in ("told", "mistake") else SETTLE_S
        return now - self.first_s > wait + (0 if self.rank == 0 or first.rank == 0 else 5 * SETTLE_S)

    def verdict(self, *, draining: bool) -> tuple[Fault | None, Losses]:
        """Why all end; or what is lost, if anything is. It is judged once.

        Args:
            draining: the whole run was asked to come to its end: then units that were asked, too, serve up to it.
        """
        faults, self.faults = self.faults, []
        if draining:
            faults = [each for each in faults if not (each.kind == "term" and self.spares(each.rank))]
        found = losses(faults, self.units)
        for unit, _ in found:
            self.lost |= unit
        return (cause(faults) if faults and not found else None), found


def cause(faults: Sequence[Fault]) -> Fault:
    """The likeliest of all."""
    return min(faults, key=lambda fault: (KINDS.index(fault.kind), fault.rank))


def losses(faults: Sequence[Fault], units: Sequence[frozenset[int]]) -> Losses:
    """The units that are lost by these faults, each with its cause; none: the whole run is, or nothing."""
    of_unit: dict[frozenset[int], list[Fault]] = {}
    for fault in faults:
        unit = next((each for each in units if fault.rank in each), None)
        if unit is None or fault.kind not in SURVIVED:
            return []
        of_unit.setdefault(unit, []).append(fault)
    return [(unit, cause(each)) for unit, each in of_unit.items()]
