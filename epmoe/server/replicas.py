"""Replicas: one service over all replicas of the model, for callers of rank 0.

    submit ─▶ placing.py ─┬─▶ the service of rank 0's own replica                              epmoe/engine/service.py
                          └─▶ Far ══ a socket (ranks/star.py), frames.py ══ Near ─▶ the service of another one

A request is asked of one replica, and what comes of it is the same bits whichever that is. So where a replica is lost,
another one answers its requests from their beginning, and callers hear what they have not heard yet.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from epmoe.config.schema import Serve
from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.engine import Engine
from epmoe.engine.figures import Figures
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.ranks.control import Control
from epmoe.server.far import Far
from epmoe.server.placing import Placing

MOST_LOST = 2  # replicas that one request may have been asked of when they were lost: it may be what ends them
UNBOUNDED = 1 << 40  # requests, or tokens of theirs: rank 0 has counted them


def service_of(engine: Engine, bounds: Serve) -> "Service | Replicas":
    """What this rank runs (`LLM.serve`), and what callers of rank 0 submit to."""
    if engine.ranks.replicas == 1:
        return Service(engine, bounds)
    own = Service(engine, replace(bounds, queue_requests=UNBOUNDED, queue_tokens=UNBOUNDED))
    return Replicas(own, bounds) if engine.ranks.is_main else own


class Replicas:
    """On rank 0. The bounds hold for all replicas together; no replica's own service refuses what was let in here."""

    def __init__(self, own: Service, bounds: Serve) -> None:
        self.own, self.bounds, self.step_tokens = own, bounds, own.step_tokens
        self.most = own.engine.max_batch * len(own.engine.scheduler.lanes)
        self.lock = threading.Lock()  # for all that follows
        self.far: dict[int, Far] = {}  # by replica
        self.calls: dict[Call, int] = {}  # those that have not ended → the replica
        self.placing = Placing(own.engine.cache.pages.size)
        self.linked = threading.Event()

    def link(self, far: dict[int, Far]) -> None:
        """These are the other replicas."""
        with self.lock:
            self.far = dict(far)
        self.linked.set()

    def run(self, control: Control) -> None:
        """As `Service.run`: the loop of rank 0's own replica."""
        self.own.run(control)

    # The callers of rank 0, on any thread: `Serving`

    @property
    def failure(self) -> BaseException | None:
        return self.own.failure

    def is_running(self, within_s: float) -> bool:
        """Whether all replicas' loops take turns, or do within so many seconds."""
        deadline = time.monotonic() + within_s
        if not (self.linked.wait(within_s) and self.own.is_running(max(0.0, deadline - time.monotonic()))):
            return False
        return all(each.up.wait(max(0.0, deadline - time.monotonic())) for each in self._there().values())

    def submit(self, calls: Sequence[Call]) -> None:
        """As `Service.submit`. Calls for one prompt go to one replica, others where least is to be done."""
        self.own.check(calls)
        with self.lock:
            if self.failure is not None:
                raise Stopped(str(self.failure))
            self._check_room(calls)
            self._place(calls)

    def abort(self, call: Call) -> None:
        with self.lock:
            self._abort(call)

    def stop(self, error: BaseException | None = None) -> None:
        with self.lock:
            if error is None and (count := sum(not each.ended for each in self.calls)):
                raise UserError(f"{count} requests wait or run: let them come to their end, or abort them, before")
            self.own.stop(error)
            for each in self.far.values():
                each.halt(error)
            self.calls.clear()

    def fail(self, error: BaseException) -> None:
        """The own loop is no more, and the run with it."""
        self.own.fail(error)
        for each in self._there().values():
            each.fail_all(Stopped(f"the engine has failed ({type(error).__name__}: {error}), and all requests with it"))

    def figures(self) -> list[Figures]:
        far = [each.figures for each in self._there().values()]
        return [*self.own.figures(), *(each for each in far if each is not None)]

    def lose(self, replicas: Iterable[int]) -> None:
        """They are no more: the others answer their requests. Returns at once; on any thread."""
        gone = frozenset(replicas)
        threading.Thread(target=self._lose, args=(gone,), name="epmoe-lost", daemon=True).start()

    # With the lock

    def _there(self) -> dict[int, Far]:
        with self.lock:
            return dict(self.far)

    def _by_replica(self) -> dict[int, list[Call]]:
        """Calls that have not ended, the oldest first; the others are forgotten."""
        self.calls = {call: replica for call, replica in self.calls.items() if not call.ended}
        found: dict[int, list[Call]] = {replica: [] for replica in (0, *self.far)}
        for call, replica in self.calls.items():
            found[replica].append(call)
        return found

    def _check_room(self, calls: Sequence[Call]) -> None:
        """Raises QueueFull where too many wait already: of each replica those beyond what can run at a time."""
        waiting: list[Call] = []
        for own in self._by_replica().values():
            fresh = [call for call in own if not call.first_token_s]
            waiting += fresh[max(0, self.most - (len(own) - len(fresh))) :]
        room, remedy = self.bounds, "come again when some have their answers"
        if waiting and len(waiting) + len(calls) > room.queue_requests:
            count = len(waiting)
            raise QueueFull(f"{count} requests wait already (serve.queue_requests={room.queue_requests}): {remedy}")
        queued, more = (sum(len(each.request.ids) for each in part) for part in (waiting, calls))
        if waiting and queued + more > room.queue_tokens:
            raise QueueFull(
                f"prompts of {queued} tokens wait already, and this one has {more} "
                f"(serve.queue_tokens={room.queue_tokens}): {remedy}"
            )

    def _place(self, calls: Sequence[Call]) -> None:
        """Give them to replicas; those of rank 0's own first, since it alone may refuse them."""
        tokens = {
            replica: sum(len(call.request.ids) + len(call.ids) for call in own)
            for replica, own in self._by_replica().items()
        }
        shares: dict[int, list[Call]] = {}
        for ids, together in groupby(calls, key=lambda each: each.request.ids):
            replica, own = self.placing.choose(ids, tokens), [*together]
            tokens[replica] += len(ids) * len(own)
            shares.setdefault(replica, []).extend(own)
        for replica, share in sorted(shares.items()):
            if replica:
                self.far[replica].submit(share)
            else:
                self.own.submit(share)
            self.calls.update(dict.fromkeys(share, replica))

    def _abort(self, call: Call) -> None:
        replica = self.calls.pop(call, 0)
        if replica in self.far:
            self.far[replica].abort([call])
        else:
            self.own.abort(call)

    def _lose(self, gone: frozenset[int]) -> None:
        with self.lock:
            for far in [self.far.pop(replica) for replica in gone & set(self.far)]:
                far.drop()
            self.placing.forget(gone)
            orphans = [call for call, replica in self.calls.items() if replica in gone and not call.ended]
            self.calls = {call: replica for call, replica in self.calls.items() if replica not in gone}
            for _, group in groupby(orphans, key=lambda each: each.request.ids):
                self._again([*group])

    def _again(self, calls: Sequence[Call]) -> None:
        for each in calls:
            each.again()
            if each.lost == MOST_LOST:
                each.fail(Stopped(f"{MOST_LOST} replicas were lost while they answered it: it is asked of no other"))
        going = [each for each in calls if not each.ended]
        try:
            self._place(going)
        except (UserError, Stopped) as error:
            for each in going:
                each.fail(Stopped(f"the replica that answered is lost, and no other one takes the request: {error}"))
