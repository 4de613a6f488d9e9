"""Engine: requests → token ids, several sequences in one forward pass, each coming and going when it can.

    id = engine.add(request)        it waits for its turn (epmoe/engine/scheduler.py)
    events = engine.step()          launch what runs next (epmoe/engine/runner.py), then say what has come
    engine.abort(id)                it ends now

    flights: ids on their way to the host, read one launch later

The next step is launched before the last one's ids are read: the device feeds them back itself
(epmoe/engine/step.py). So the host learns one step late that a sequence has ended; the token of the step that
was launched meanwhile is dropped. It is never beyond a sequence's longest, since an end by length is known beforehand.

Every rank runs this loop with the same requests and makes the same choices, so that all of them call the model with the
same step; no choice depends on a clock. With mesh.attention=data each rank has requests of its own: all ranks still
make all choices, each launches its own step, of one size with the others', and all hear what all steps bring (lanes.py,
planned.py, flight.py). It knows token ids only; text listens to the events.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial

import torch

from epmoe.cache.cache import Cache
from epmoe.engine import sequence as kinds
from epmoe.engine.adjust import check_adjustments
from epmoe.engine.config import EngineConfig, resolve_chunk
from epmoe.engine.diagnose import NotFinite, locate
from epmoe.engine.drafts import Drafting, History, Modelled, least_share, most_rows
from epmoe.engine.flight import Flight
from epmoe.engine.graphs import MOST_TOKENS, Graphs, token_buckets
from epmoe.engine.lanes import Lanes
from epmoe.engine.matcher import Grammars, Matcher
from epmoe.engine.preparation import Most, Preparation
from epmoe.engine.proposer import DEPTH
from epmoe.engine.request import Event, Finished, OnFinish, OnToken, Request, Result, Token, Workload, check
from epmoe.engine.runner import Runner, Started
from epmoe.engine.scheduler import Scheduler
from epmoe.engine.speculation import Speculation
from epmoe.engine.step import Sizes
from epmoe.engine.warm import Warm
from epmoe.errors import UserError, warn
from epmoe.models import Model, values
from epmoe.ranks.mesh import Ranks


class Engine:
    """Runs requests through a model: see this file's beginning. Each method is called alike on every rank."""

    def __init__(self, model: Model, cache: Cache, ranks: Ranks, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        assert config.prefill_chunk >= 0 and config.max_batch > 0
        self.model, self.cache, self.ranks, self.config = model, cache, ranks, config
        self.vocab, self.max_positions = model.config.vocab, model.config.max_positions
        self.prefill_chunk = resolve_chunk(config.prefill_chunk, ranks.device)
        self.max_batch = min(config.max_batch, cache.pages.sequences)
        own = config.attention == "data" and ranks.expert_size > 1
        self.scheduler = self._lanes(ranks.expert_size if own else 1, ranks.expert_rank if own else 0)
        self.most_rows = self.max_batch
        if config.drafts is not None:
            self.most_rows = most_rows(self.max_batch)
            kind, depth = (History, 0) if config.draft_model is None else (self._modelled(config), DEPTH)
            drafting = Drafting(config.drafts, self.most_rows, kind, depth)
            for lane in self.scheduler.lanes:
                lane.speculation = Speculation(lane.pages, drafting, self.max_batch)
        most_tokens = token_buckets(min(MOST_TOKENS, self.prefill_chunk + self.most_rows))[-1]
        with torch.inference_mode():
            sizes = Sizes(self.max_batch, most_tokens, self.most_rows if config.drafts else 0, config.score_rows)
            self.runner = Runner(model, cache, ranks, sizes, config.draft_model, own=own)
        self.graphs = Graphs(self.runner.static, ranks, capture=config.graphs, progress=config.progress, own=own)
        self.warm = Warm(self.runner, self.graphs, ranks, self.prefill_chunk, progress=config.progress)
        most = Most(self.max_batch, self.most_rows, most_tokens, self.prefill_chunk)
        self.preparation = Preparation(self.runner, self.graphs, self.warm, ranks, most)
        self.flights: deque[Flight] = deque()
        self.landed: Flight | None = None  # the last one
        self.first = 0  # id of the first request of this run: messages number prompts from it
        self.failed: dict[int, kinds.Sequence] = {}  # by id, until `clear`: their logits were not finite

    def _lanes(self, count: int, own: int) -> Lanes:
        """A scheduler for each rank that has requests of its own, over accounts of its cache."""
        pages = self.cache.pages
        if count > 1:
            assert pages.unused
            pages.forget()  # the accounts of this rank's cache on other hosts begin empty
        every = [pages if lane == own else pages.alike() for lane in range(count)]
        limits = {"max_batch": self.max_batch, "prefill_chunk": self.prefill_chunk}
        return Lanes([Scheduler(each, self.max_positions, self.config.eos_ids, **limits) for each in every], own)

    def _modelled(self, config: EngineConfig) -> Callable[[Sequence[int]], History]:
        """What drafts with a draft model, as long as that is worth it."""
        assert config.draft_model is not None and config.drafts is not None
        cost = (1 + DEPTH) * config.draft_model.values / values(self.model.config)
        return partial(Modelled, least=least_share(config.drafts, cost, DEPTH))

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars; raises UserError where there can be none."""
        if self.config.vocabulary is None or not self.config.eos_ids:
            what = "tokenizer" if self.config.vocabulary is None else "end-of-text id (eos_token_id)"
            raise UserError(f"a grammar needs the checkpoint's {what}, which it lacks: ask without a grammar")
        return Grammars(self.config.vocabulary(), self.ranks.neighbours)

    def prepare_for(self, requests: Sequence[Request]) -> list[list[bytes]]:
        """As `prepare`, for these requests, all of which are added before the first step. A collective.

        Returns:
            of each the keys of its first pages, as far as they were looked for: to find them takes a while.
        """
        pages = self.cache.pages
        needs = sorted((pages.needs(each.cached(self.max_positions)) for each in requests), reverse=True)
        fit = sum(needs[: self.max_batch]) <= pages.count  # nobody is put back
        # Where ranks have requests of their own, some begin beside others that have begun.
        at_once = fit and len(requests) <= self.max_batch and len(self.scheduler.lanes) == 1
        keys: list[list[bytes]] = [[] for _ in requests]
        found = sum(map(self.scheduler.found, requests, keys)) if at_once else 0
        load = Workload.of(requests, self.max_batch, 0 if fit else self.max_positions)
        self.prepare(load, at_once=at_once, found=found)
        return keys

    def prepare(self, load: Workload, *, at_once: bool = False, found: int = 0) -> None:
        """Whatever compiles or is captured for such a load is, now: `step` does neither after it. A collective.

        Args:
            at_once: the first step finds all its requests, and room for each of them.
            found: of their prompts' tokens, those that it need not compute then.
        """
        found_then = found if at_once else None
        ran = self.preparation.prepare(load, found_then, self.config.timeout_s, lambda: self.grammars)
        if ran and len(self.scheduler.lanes) > 1:
            self.forget()  # made-up prompts have taken pages here, of which other hosts' accounts know nothing

    def check(self, requests: Sequence[Request], first: int = 0) -> None:
        """Raises UserError as `request.check` and `check_adjustments`, with the prompt's number from `first` + 1 on.

        Of grammars it raises where there can be none at all; `matcher` compiles them.
        """
        check(requests, self.vocab, self.max_positions, first)
        for number, each in enumerate(requests, first + 1):
            check_adjustments(each.params, self.scheduler.ends(each), number)
            if each.params.grammar:
                with _numbered(number):
                    _ = self.grammars

    def matcher(self, request: Request, number: int) -> Matcher | None:
        """At the beginning of an answer to prompt `number`; raises UserError with it for what is no grammar."""
        if not request.params.grammar:
            return None
        with _numbered(number):
            return self.grammars.matcher(request.params.grammar)

    def hold_grammar(self, grammar: str, then: Callable[[str], object]) -> None:
        """As `Grammars.hold`."""
        self.grammars.hold(grammar, then)

    def drop_grammars(self, names: Sequence[str] | None = None) -> None:
        """As `Grammars.drop`; None: all that are held."""
        if "grammars" in vars(self):
            for each in tuple(self.grammars.held) if names is None else names:
                self.grammars.drop(each)

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; returns its id, which counts from 0.

        Raises:
            UserError: see `check` and `matcher`; a request that the whole cache cannot hold.
        """
        self.check([request], self.scheduler.added - self.first)
        return self._add(request)

    def _add(self, request: Request, keys: Sequence[bytes] = ()) -> int:
        """One that was checked, and of whose first pages these keys are known."""
        number = self.scheduler.added - self.first
        assert request.kept <= self.runner.state.kept, "not prepared"
        matcher = self.matcher(request, number + 1)
        return self.scheduler.add(request, time.perf_counter(), matcher, keys)

    def forget(self) -> None:
        """Nothing that is in a cache is found again, on any rank."""
        self.scheduler.forget()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Launch what runs next, and say what has come of the launch before. A collective of the expert group.

        A request whose logits are not finite ends with the reason "error", alone: see `check_finite`.

        Raises:
            NoArrival: a step did not end in time.
        """
        events: list[Event] = []
        if self.flights and (self.flights[-1].waits or self.scheduler.drafts_soon()):
            events += self._land_all()  # what has come says where the next rows are, and what their drafts
        works = self.scheduler.schedule()
        started = self.runner.begin(works, self.graphs)
        for sequence in works[self.scheduler.own].begun:  # beside the step's layers: its head is the first to read it
            self.runner.admit(sequence, self.scheduler.ends(sequence.request))
        events += self._restrict(started) if started else []
        launched = started and self.runner.finish(started, self.graphs)
        self.scheduler.launched(works)
        if launched:
            self.flights.append(launched)
        while len(self.flights) > (launched is not None):  # the newest stays in the air while the host reads the others
            events += self._land(self.flights.popleft())
        return events

    def abort(self, id: int, reason: str = "abort") -> Result | None:
        """End a request now, whether it waits or runs; what came of it. None when it has ended already.

        If its logits are not finite at one of a draft's tokens, that is behind its end, and harms nobody.
        """
        self.failed.pop(id, None)
        sequence = self.scheduler.find(id)
        return None if sequence is None else self.scheduler.finish(sequence, reason, time.perf_counter())

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return self.scheduler.busy

    def generate(
        self,
        requests: Sequence[Request],
        on_token: OnToken = lambda request, token: False,
        on_finish: OnFinish = lambda request, result: None,
        on_launch: Callable[[], object] = lambda: None,
    ) -> list[Result]:
        """Run all requests to their end; results in their order. A collective of the expert group.

        Times in the results count from the moment when everything is prepared.

        Args:
            on_launch: called once, before all other calls, while the first step runs: what it does takes no time.
        Raises:
            UserError: see `check` and `matcher`; a request that the whole cache cannot hold.
            NotFinite: logits of some requests are not finite. All others have come to their end, each with its
                `on_finish`; so have these, with the reason "error".
            NoArrival: a step did not end in time.
        """
        assert not (self.scheduler.running or self.scheduler.waiting), "beside other requests, use add and step"
        self.check(requests)
        for number, request in enumerate(requests, 1):
            self.matcher(request, number)  # before any work, and remembered
        keys = self.prepare_for(requests)
        self.first = self.scheduler.added
        results: dict[int, Result] = {}
        told = [0] * len(requests)  # tokens of each
        stopped: set[int] = set()
        try:
            for request, known in zip(requests, keys, strict=True):
                self._add(request, known)
            for event in self._events(on_launch):
                index = event.id - self.first
                result = event.result if isinstance(event, Finished) else None
                if isinstance(event, Token) and index not in stopped:
                    told[index] += 1
                    if on_token(index, event.token):
                        stopped.add(index)
                        result = self.abort(event.id, "stop")  # None: it ends by itself, and its event follows
                if result is not None:
                    results[index] = result.stopped(told[index]) if index in stopped else result
                    on_finish(index, results[index])
            self.check_finite()
        finally:
            self.clear()
        return [results[index] for index in range(len(requests))]

    def _events(self, on_launch: Callable[[], object]) -> Iterator[Event]:
        """What comes until nothing waits or runs any more."""
        events = self.step() if self.busy else []
        on_launch()
        yield from events
        while self.busy:
            yield from self.step()

    def clear(self) -> None:
        """End whatever waits or runs; what has failed is forgotten."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            self.scheduler.finish(sequence, "abort", time.perf_counter())
        self.flights.clear()
        self.failed.clear()
        self.first = self.scheduler.added

    def check_finite(self) -> None:
        """Raises NotFinite if logits were not since `clear`, when nothing runs any more; a collective then."""
        if not self.failed:
            return
        assert not self.busy
        self.flights.clear()
        prompts = [id - self.first + 1 for id in sorted(self.failed)]
        sequence = self.failed[min(self.failed)]
        ids = (*sequence.request.ids, *sequence.ids)
        where = locate(self.model, self.cache, self.ranks, ids, self.config.timeout_s)
        if len(self.scheduler.lanes) > 1:
            self.forget()  # it has taken pages behind the accounts
        raise NotFinite(prompts, sequence.length - 1, where)

    def _land_all(self) -> list[Event]:
        events: list[Event] = []
        while self.flights:
            events += self._land(self.flights.popleft())
        return events

    def _restrict(self, started: Started) -> list[Event]:
        """Masks for rows with grammars, whose step runs up to its head meanwhile; what has come of the steps before.

        Each mask follows from the tokens before it, so those must have come. A request whose grammar has become too
        complex ends here with the reason "error", alone.
        """
        sequences = [sequence for plan in started.plans for sequence in plan.restricted]
        events = self._land_all() if sequences else []
        going = [each for each in sequences if not each.finished]
        if going:
            self.runner.mask(started, going, self.grammars)
        return [*events, *(self._fail(each) for each in going if _failure(each))]

    def _fail(self, sequence: kinds.Sequence) -> Finished:
        """Its grammar has failed: it ends."""
        failure, grammar = _failure(sequence), sequence.request.params.grammar
        assert grammar
        self.grammars.spoil(grammar)
        warn(f"request {sequence.id - self.first + 1} cannot go on: its grammar has failed ({failure})")
        result = self.scheduler.finish(sequence, "error", time.perf_counter())
        return Finished(sequence.id, replace(result, failure=failure))

    def _land(self, flight: Flight) -> list[Event]:
        """What a step has brought, when it has ended."""
        self.landed = flight  # let go of beside a later step: to give pinned memory back takes a while
        events: list[Event] = []
        before, speculation = None, self.scheduler.speculation
        for sequence, token, logprobs in flight.land(self.config.timeout_s):
            drafted, before = sequence is before, sequence
            if sequence.finished or token < 0:
                continue  # it ended while this step was under way; of its draft a token before was another
            if drafted and _failure(sequence):  # nothing allowed this token
                events.append(self._fail(sequence))
                continue
            if drafted and speculation:
                speculation.accept(sequence)
            now = time.perf_counter()
            if token == self.vocab or not sequence.finite:  # no token: its logits are not finite, or its prompt's
                self.failed[sequence.id] = sequence
                events.append(Finished(sequence.id, self.scheduler.finish(sequence, "error", now)))
                continue
            if sequence.length == sequence.end:  # it asks for its prompt's log-probabilities alone
                events.append(Finished(sequence.id, self.scheduler.finish(sequence, "length", now)))
                continue
            reason = self.scheduler.append(sequence, token, logprobs, now)
            if sequence.matcher and not reason:
                sequence.matcher.take(token)
            if reason not in ("eos", "stop"):
                first = len(sequence.ids) == 1
                prompt, cached = (sequence.told_of_prompt(), sequence.found or 0) if first else ((), 0)
                own = sequence.logprobs[-1] if logprobs is not None else None
                events.append(Token(sequence.id, token, own, prompt, cached))
            if reason:
                events.append(Finished(sequence.id, self.scheduler.finish(sequence, reason, now)))
        for sequence, ids in zip(flight.told, flight.drafts, strict=True):
            if speculation:
                speculation.tell(sequence, ids)
        return events


def _failure(sequence: kinds.Sequence) -> str:
    """Why its grammar cannot go on; else ""."""
    return sequence.matcher.failure if sequence.matcher else ""


@contextmanager
def _numbered(number: int) -> Iterator[None]:
    """A mistake within the block is one of prompt `number`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"prompt {number}: {error}") from None
