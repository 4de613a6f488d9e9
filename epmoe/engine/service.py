"""Service: what a server needs above `Engine.add`, `step` and `abort`: a bounded queue, and one loop on all ranks.

    any thread of rank 0:   submit ─▶ (compiling.py) ─▶ queue, by priority   abort
                                        │                                      │
    each rank's turn:       rank 0's orders (epmoe/ranks/control.py): add these, end those ─▶ engine.step ─▶ events
                                                                                                               │
    rank 0 alone:           a call's listener makes text of its tokens ◀───────────────────────────────────────┘

All ranks make the same choices since they obey the same orders; rank 0's clock and its callers decide only what those
are. Where a listener finds a stop string the call has its answer at once, and the end is an order: the tokens that come
before it is obeyed mean nothing.

A request's fault is that request's: whose logits are not finite ends with the reason "error", whose listener fails has
failed, and all others go on.
"""

import heapq
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from epmoe.config.schema import Serve
from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.compiling import Compiling, Waiting
from epmoe.engine.engine import Engine
from epmoe.engine.figures import Figures
from epmoe.engine.request import Event, Request, Token, Workload
from epmoe.errors import UserError
from epmoe.ranks.control import Control, Orders

# If nobody says otherwise: tokens of a step in which answers grow, at least, and for each row of runtime.max_batch, and
# of one in which none does. gpt-oss-20b on one H200, 64 users with prompts of 1,024: 8.8 ms between two tokens, p99
# 9.3, less than two steps of rows alone (docs/measurements.md); 2048 tokens of prompts alone take 26 to 28. With two
# for each of 256 rows answers ended faster than prompts of 1,024 tokens came in: 68 % of the rate of LLM.generate.
STEP_TOKENS, STEP_TOKENS_PER_ROW, ALONE_TOKENS = 384, 4, 2048


class Service:
    """Every rank makes one over its engine and calls `run`; calls are submitted on rank 0 alone, from any thread."""

    def __init__(self, engine: Engine, bounds: Serve) -> None:
        self.engine, self.bounds = engine, bounds
        self.step_tokens = bounds.step_tokens or max(STEP_TOKENS, STEP_TOKENS_PER_ROW * engine.max_batch)
        self.alone_tokens = max(self.step_tokens, ALONE_TOKENS)
        self.turn = threading.Condition()  # for all that follows
        self.queue: list[tuple[int, int, Call]] = []  # a heap: priority, place, call
        self.compiling = Compiling(engine.ranks.expert_size)  # calls that are not in the queue yet
        self.queued_tokens = self.submitted = 0
        self.ending: list[tuple[Call, str]] = []  # whose end is to be ordered, and why
        self.released: dict[int, Call] = {}  # by the engine's id: it has them
        self.leaving: deque[list[Call]] = deque()  # released in orders that travel, oldest first
        self.running = threading.Event()  # the loop takes turns
        self.steps, self.step_s = 0, 0.0  # so far, and what they have taken together
        self.stopping = False
        self.failure: BaseException | None = None

    # Rank 0's callers, on any thread

    def submit(self, calls: Sequence[Call]) -> None:
        """Let these wait for their turn, all or none. One whose grammar is refused fails with a UserError, later.

        Raises:
            UserError: a request that the model or the whole cache cannot hold.
            QueueFull: too many wait already. An empty queue takes anything.
            Stopped: there is no service any more.
        """
        self.check(calls)
        tokens = sum(len(each.request.ids) for each in calls)
        with self.turn:
            self._check_alive()
            self._check_room(len(calls), tokens)
            for which, each in enumerate(calls, 1):
                self._enter(Waiting(each, self.submitted, which))
                self.submitted += 1
            self.queued_tokens += tokens
            self.turn.notify()

    def check(self, calls: Sequence[Call]) -> None:
        """Raises UserError for a request that the model or the whole cache cannot hold."""
        engine = self.engine
        engine.check([each.request for each in calls])
        for each in calls:
            engine.cache.pages.check(each.request.cached(engine.max_positions))

    def is_running(self, within_s: float) -> bool:
        """Whether the loop takes turns, or does within so many seconds."""
        return self.running.wait(within_s)

    def figures(self) -> list[Figures]:
        """How things stand, of this replica. On any thread."""
        scheduler = self.engine.scheduler
        pages = [lane.pages for lane in scheduler.lanes]
        drafting = scheduler.speculation and scheduler.speculation.drafting
        return [
            Figures(
                queued=self.queued,
                queued_tokens=self.queued_tokens,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                put_back=scheduler.put_back,
                pages=sum(each.count for each in pages),
                pages_free=sum(each.left for each in pages),
                steps=self.steps,
                step_s=self.step_s,
                drafted=drafting.drafted if drafting else 0,
                accepted=drafting.accepted if drafting else 0,
                replica=self.engine.ranks.replica,
            )
        ]

    @property
    def queued(self) -> int:
        """Requests that wait for their turn, or for their grammar. On any thread."""
        with self.turn:
            return len(self.queue) + sum(1 for _ in self.compiling.calls())

    def _enter(self, waiting: Waiting) -> None:
        if not (waiting.call.request.params.grammar and self.compiling.add(waiting)):
            self._push(waiting)

    def _push(self, waiting: Waiting) -> None:
        heapq.heappush(self.queue, (waiting.call.request.priority, waiting.place, waiting.call))

    def _check_room(self, requests: int, tokens: int) -> None:
        waiting, bounds = self.queued, self.bounds
        remedy = "come again when some have their answers"
        if waiting and waiting + requests > bounds.queue_requests:
            raise QueueFull(f"{waiting} requests wait already (serve.queue_requests={bounds.queue_requests}): {remedy}")
        if waiting and self.queued_tokens + tokens > bounds.queue_tokens:
            raise QueueFull(
                f"prompts of {self.queued_tokens} tokens wait already, and this one has {tokens} "
                f"(serve.queue_tokens={bounds.queue_tokens}): {remedy}"
            )

    def abort(self, call: Call) -> None:
        """End it within a step; its listener hears nothing more. One that has ended is left alone."""
        with self.turn:
            if not call.ended:
                self._end(call, "abort")

    def stop(self, error: BaseException | None = None) -> None:
        """Let `run` return on every rank. With `error` all calls fail, and those to come; else they wait for `run`.

        Raises:
            UserError: without `error`, where calls wait or run.
            Stopped: without `error`, where there is no service any more.
        """
        with self.turn:
            if error is None:
                self._check_idle()
            self.stopping = True
            if error is not None:
                self._fail(error)
            self.turn.notify()

    def fail(self, error: BaseException) -> None:
        """The loop is no more: all calls fail, and those to come."""
        with self.turn:
            self._fail(error)

    # The engine's thread, on every rank

    def run(self, control: Control) -> None:
        """Prepare for whatever may come, then take turns until rank 0 stops; a collective.

        Raises:
            NoArrival: a step did not end in time.
            RuntimeError: another rank is gone.
        """
        engine = self.engine
        self.prepare()
        control.listen(self._compiled)
        engine.scheduler.bound(self.step_tokens, self.alone_tokens)
        self.running.set()
        try:
            while self._turn(control):
                pass
            control.settle()
        finally:
            self.running.clear()
            engine.scheduler.bound(0, 0)
            engine.clear()
            engine.drop_grammars()
        with self.turn:  # what is left has ended for its callers
            self.compiling.restart()
            came, self.queue = self.queue, []  # meanwhile; all ranks have dropped their grammars
            for _, place, call in came:
                self._enter(Waiting(call, place, 1))
            self.stopping = False
            self.ending.clear()
            self.leaving.clear()
            self.released.clear()

    def prepare(self) -> None:
        """Compile and capture what any request may need, as `run` does at its beginning; a collective."""
        engine = self.engine
        alone, beside = (min(most, engine.prefill_chunk) for most in (self.alone_tokens, self.step_tokens))
        engine.prepare(Workload.unknown(engine.max_batch, alone, beside, engine.max_positions))

    def _turn(self, control: Control) -> bool:
        """Obey this turn's orders and step; False: they say that there is no more."""
        orders = control.turn(self._decide(control) if control.leads else None)
        self.engine.drop_grammars(orders.get("drop", ()))
        for number, grammar in orders.get("compile", ()):
            self.engine.hold_grammar(grammar, partial(control.report, number))
        with self.turn:
            ids = [self.engine.add(Request.of_json(value)) for value in orders.get("add", ())]
            if ids and control.leads:
                self._take_over(ids)
            for id, reason in orders.get("end", ()):
                self.engine.abort(id, reason)
                self.released.pop(id, None)
        if "stop" in orders:
            return False
        if self.engine.busy:
            begin = time.perf_counter()
            events = self.engine.step()
            self.steps, self.step_s = self.steps + 1, self.step_s + time.perf_counter() - begin
            self.engine.failed.clear()  # each has ended with "error": that is all that is said of it
            if control.leads:
                self._tell(events)
        return True

    # Rank 0's side of a turn

    def _decide(self, control: Control) -> Orders:
        """The next orders; with nothing to do they come `beat_s` later, or when there is something."""
        with self.turn:
            if not (self.engine.busy or control.travelling or self._has_news()):
                self.turn.wait(control.beat_s)
            orders: dict[str, Any] = {} if self.stopping else self.compiling.orders(self._needed)
            if calls := self._release():
                orders["add"] = [each.request.to_json() for each in calls]
                self.leaving.append(calls)
            now = [(call, reason) for call, reason in self.ending if call.id >= 0]
            if now:
                orders["end"] = [[call.id, reason] for call, reason in now]
                self.ending = [(call, reason) for call, reason in self.ending if call.id < 0]
            if self.stopping:
                orders["stop"] = True
            return orders

    def _has_news(self) -> bool:
        return bool(self.queue or self.ending or self.stopping or self.compiling.news)

    def _needed(self) -> set[str | None]:
        """Grammars of calls that the engine is to have."""
        travelling = (call for calls in self.leaving for call in calls)
        return {call.request.params.grammar for call in (*(call for *_, call in self.queue), *travelling)}

    def _compiled(self, number: int, why: str) -> None:
        """A rank's report; on a thread of its own."""
        with self.turn:
            done, failed = self.compiling.report(number, why)
            for each in done:
                self._push(each)
            for each in failed:
                self.queued_tokens -= len(each.call.request.ids)
                each.call.fail(UserError(f"prompt {each.which}: {why}"))
            self.turn.notify()

    def _release(self) -> list[Call]:
        """Those of the queue that the engine is to have, as many as may soon run: until then others may go before."""
        found: list[Call] = []
        if self.stopping:
            return found
        # Who waits in the engine does so for pages: who comes later waits here, unless they go before.
        before, room = self.engine.scheduler.before, self.engine.scheduler.room - sum(map(len, self.leaving))
        while self.queue and (before is None or self.queue[0][0] < before):
            if before is None and len(found) >= room:
                break
            found.append(self._pop())
        return found

    def _pop(self) -> Call:
        call = heapq.heappop(self.queue)[2]
        self.queued_tokens -= len(call.request.ids)
        return call

    def _take_over(self, ids: Sequence[int]) -> None:
        """The engine has given the calls whose orders have come these ids."""
        for call, id in zip(self.leaving.popleft(), ids, strict=True):
            call.id = id
            self.released[id] = call

    def _tell(self, events: Sequence[Event]) -> None:
        with self.turn:
            for event in events:
                call = self.released.get(event.id)
                if call is None:
                    continue
                if not call.ended:
                    try:
                        if call.hear(event):
                            self._end(call, "stop")
                    except Exception as error:  # a listener's, and so this call's alone
                        self._end(call, "error")
                        call.fail(error)
                if not isinstance(event, Token):
                    del self.released[event.id]

    def _end(self, call: Call, reason: str) -> None:
        """It is over for whoever submitted it, and is to be for the engine."""
        call.ended = True
        if self.compiling.remove(call):
            self.queued_tokens -= len(call.request.ids)
            return
        place = next((each for each in self.queue if each[2] is call), None)
        if place is None:
            self.ending.append((call, reason))
            self.turn.notify()
            return
        self.queue.remove(place)
        heapq.heapify(self.queue)
        self.queued_tokens -= len(call.request.ids)

    def _calls(self) -> list[Call]:
        travelling = (call for calls in self.leaving for call in calls)
        return [*self.compiling.calls(), *(call for *_, call in self.queue), *travelling, *self.released.values()]

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise _stopped(self.failure)

    def _check_idle(self) -> None:
        self._check_alive()
        if count := sum(not each.ended for each in self._calls()):
            raise UserError(f"{count} requests wait or run: let them come to their end, or abort them, before")

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        calls = [each for each in self._calls() if not each.ended]
        self.compiling.clear()
        self.queue.clear()
        self.queued_tokens = 0
        for each in calls:
            each.fail(_stopped(self.failure))


def _stopped(error: BaseException) -> Stopped:
    if isinstance(error, Stopped):
        return Stopped(*error.args)
    return Stopped(f"the engine has failed ({type(error).__name__}: {error}), and all requests with it")
