"""When requests are to be added, the same ones before the same step on every rank.

Of `poisson` rank 0's clock decides: one whole number a step goes from it to the others, on the CPU, so that no rank
waits for its device. Of `concurrent` the ends of others decide, which all ranks see alike.
"""

import statistics
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from epmoe.ranks.mesh import Ranks

NAP_S = 0.2  # between two messages while nothing runs: the others wait for one in a collective, whose time is bounded


class Arrivals(Protocol):
    """Says which requests come next."""

    def come(self, running: int, clock: Callable[[], float]) -> list[float]:
        """The times, in seconds since the beginning, at which the requests were due that come before the next step.

        Args:
            running: requests that were added and have not ended; with none of them it may wait for a while.
            clock: seconds since the beginning.
        """
        ...


class Told:
    """Whole numbers from rank 0 to all, one at a time."""

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self.ranks, self.group = ranks, ranks.expert_group
        if self.group is not None and ranks.device.type != "cpu":
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.taken_us: list[int] = []  # by each message here, waiting for the others included

    def __call__(self, number: int) -> int:
        """Rank 0's number; a collective."""
        if self.group is None:
            return number
        begin = time.perf_counter()
        value = torch.tensor([number])
        dist.broadcast(value, group=self.group, group_src=0)
        self.taken_us.append(round(1e6 * (time.perf_counter() - begin)))
        return int(value)

    def cost_us(self) -> float:
        """What a message takes when all ranks are there: of each, the rank counts that came last; then the median.

        A collective.
        """
        by_rank = self.ranks.gather(self.taken_us)
        return statistics.median(map(min, zip(*by_rank, strict=True))) if self.taken_us else 0.0


class Poisson:
    """Requests come at the times `at_s`, ascending, whatever has become of those before."""

    def __init__(self, at_s: Sequence[float], told: Told) -> None:
        self.at_s, self.told, self.added = at_s, told, 0

    def come(self, running: int, clock: Callable[[], float]) -> list[float]:
        if self.added == len(self.at_s):
            return []
        last = self.added
        if self.told.ranks.is_main:
            if not running:
                time.sleep(min(max(self.at_s[self.added] - clock(), 0.0), NAP_S))
            last = bisect(self.at_s, clock())
        begin, self.added = self.added, self.told(last)
        return list(self.at_s[begin : self.added])


class Concurrent:
    """So many users: each has one request under way, and the next one comes when it has ended."""

    def __init__(self, requests: int, users: int) -> None:
        self.left, self.users = requests, users

    def come(self, running: int, clock: Callable[[], float]) -> list[float]:
        count = min(self.users - running, self.left)
        self.left -= count
        return [clock()] * count
