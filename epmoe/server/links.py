"""Links: how rank 0 asks the other replicas, from the first time that a service runs until the ranks part."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from epmoe.engine.service import Service
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.star import star
from epmoe.server.far import Far, Near
from epmoe.server.replicas import Replicas

ALONE_S = 10.0  # after a connection's end: by then the ranks' watch has said why, if it can


class Links:
    """Each rank makes one, at the same time; a collective of all ranks.

    Raises:
        RuntimeError: a replica does not come within `timeout_s`.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self.ranks, self.closing = ranks, threading.Event()
        sockets = star(ranks, timeout_s)
        ranks.until_end.append(self)
        self.near: Near | None = None
        self.far: dict[int, Far] = {}
        if ranks.is_main:
            self.far = {each: Far(own, partial(self._cut, each)) for each, own in sorted(sockets.items())}
        elif sockets:
            self.near = Near(sockets[0], partial(self._cut, 0))

    @contextmanager
    def attached(self, service: Service | Replicas) -> Iterator[None]:
        """In the block requests come to this one, and the run goes on where others than rank 0's node are lost."""
        if isinstance(service, Replicas):
            service.link(self.far)
            self._spare(service)
        elif self.near is not None:
            self.near.attach(service)
        yield
        if isinstance(service, Replicas):
            assert self.ranks.watch is not None
            self.ranks.watch.spare((), lambda ranks: None)  # what follows is of all ranks

    def _spare(self, service: Replicas) -> None:
        """From now on the run goes on where replicas are lost that share no node with rank 0's."""
        expert, watch = self.ranks.expert_size, self.ranks.watch
        assert watch is not None

        def lose(ranks: frozenset[int]) -> None:
            replicas = {rank // expert for rank in ranks}
            self.far = {replica: each for replica, each in self.far.items() if replica not in replicas}
            service.lose(replicas)

        units = [
            frozenset(rank for replica in unit for rank in range(replica * expert, (replica + 1) * expert))
            for unit in self.ranks.units
            if 0 not in unit
        ]
        watch.spare(units, lose)

    def close(self) -> None:
        """The ranks part."""
        self.closing.set()
        for each in self.far.values():
            each.end()
        if self.near is not None:
            self.near.close()

    def _cut(self, replica: int) -> None:
        """The connection to that replica's first rank has ended. Mostly that rank has, which the watch tells."""

        def look() -> None:
            if not self.closing.wait(ALONE_S):
                watch = self.ranks.watch
                assert watch is not None
                watch.accuse(replica * self.ranks.expert_size, "is not to be reached any more")

        threading.Thread(target=look, name="epmoe-cut", daemon=True).start()
