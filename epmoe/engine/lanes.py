"""Lanes: a scheduler for each rank that has requests of its own; one for all where every rank has the same.

    add ──▶ which lane? ──▶ 0: waiting ▶ running     pages of rank 0
                            1: waiting ▶ running     pages of rank 1
                            …

Every host keeps the accounts of all lanes, is told the same and so makes the same choices: it knows what each rank is
to do in a step without asking, and launches what its own lane does. No choice depends on a clock. No tensors.
"""

from collections.abc import Sequence as Several

from epmoe.engine.matcher import Matcher
from epmoe.engine.request import Request, Result, TokenLogprobs
from epmoe.engine.scheduler import Scheduler
from epmoe.engine.sequence import Sequence, Work
from epmoe.engine.speculation import Speculation

# Tokens of an answer that count beside those of prompts where requests are shared out: how long it becomes nobody
# knows. With more of them what a lane has in its pages counts for less.
ANSWER = 256


class Lanes:
    """What the engine asks of one scheduler, of several.

    Args:
        own: the lane of this rank.
    """

    def __init__(self, lanes: Several[Scheduler], own: int = 0) -> None:
        self.lanes, self.own = list(lanes), own
        self.added = 0  # requests so far; their ids count from 0
        self.promised = [0] * len(self.lanes)  # by lane, `Sequence.weight` of all that wait and run

    @property
    def running(self) -> list[Sequence]:
        return [sequence for lane in self.lanes for sequence in lane.running]

    @property
    def waiting(self) -> list[Sequence]:
        return [sequence for lane in self.lanes for sequence in lane.waiting]

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return any(lane.busy for lane in self.lanes)

    @property
    def put_back(self) -> int:
        """Times that a sequence was, so far."""
        return sum(lane.put_back for lane in self.lanes)

    @property
    def room(self) -> int:
        """Requests that may come until as many run or wait in each lane as run at a time: of a lane with more, none."""
        return sum(max(0, lane.max_batch - len(lane.running) - len(lane.waiting)) for lane in self.lanes)

    @property
    def speculation(self) -> Speculation | None:
        """Of this rank's lane; what counts drafts is the same in all."""
        return self.lanes[self.own].speculation

    @property
    def before(self) -> int | None:
        """Who comes with less than this priority goes before others that wait; None: in some lane nobody waits."""
        if not all(lane.waiting for lane in self.lanes):
            return None
        return max(lane.waiting[-1].request.priority for lane in self.lanes)

    def bound(self, step_tokens: int, alone_tokens: int) -> None:
        """See `Scheduler.step_tokens`; of each rank."""
        for lane in self.lanes:
            lane.step_tokens, lane.alone_tokens = step_tokens, alone_tokens

    def add(self, request: Request, now: float, matcher: Matcher | None = None, keys: Several[bytes] = ()) -> int:
        """Let a request wait for its turn in a lane; returns its id. Raises UserError as `Scheduler.add`.

        Args:
            keys: of its first pages, as far as `found` has looked.
        """
        probe = Sequence(-1, request, 0, 0.0, keys=list(keys))  # finds those of its pages once for all lanes
        which, weight = self._choose(probe)
        sequence = self.lanes[which].add(request, now, matcher, id=self.added)
        sequence.lane, sequence.weight, sequence.keys = which, weight, probe.keys
        self.promised[which] += weight
        self.added += 1
        return sequence.id

    def _choose(self, probe: Sequence) -> tuple[int, int]:
        """The lane that a request goes to, and what it is to compute there.

        The first of those where it may begin at once, if there are any, that has the least to compute with it: what
        was promised to others, and of its own prompt what the lane's pages do not hold. So one that goes on with a
        conversation comes where that was, as long as this saves more than the lane has to do besides; what many begin
        with, as a system message, does not bring all of them to one lane.
        """
        if len(self.lanes) == 1:
            return 0, 0
        ids, length = probe.request.ids, probe.request.length(self.lanes[0].max_positions)
        answer = min(length - len(ids), ANSWER)
        found = [lane.found_of(probe) for lane in self.lanes]
        weights = [len(ids) - each + answer for each in found]

        def order(which: int) -> tuple[bool, int, int, int]:
            lane, pages = self.lanes[which], self.lanes[which].pages
            lacks = pages.needs(len(ids) + 1) - pages.needs(found[which])
            waits = bool(lane.waiting) or len(lane.running) >= lane.max_batch or lacks > pages.left
            return waits, self.promised[which] + weights[which], pages.count - pages.left, which

        which = min(range(len(self.lanes)), key=order)
        return which, weights[which]

    def ends(self, request: Request) -> frozenset[int]:
        """As `Scheduler.ends`."""
        return self.lanes[0].ends(request)

    def found(self, request: Request, keys: list[bytes] | None = None) -> int:
        """As `Scheduler.found`, in the lane where most is."""
        return max(lane.found(request, keys) for lane in self.lanes)

    def schedule(self) -> list[Work]:
        """What the next step of each rank is to have, by lane. Of other ranks' pages no device is told."""
        works = [lane.schedule() for lane in self.lanes]
        prompts = any(work.pieces for work in works)
        for which, (lane, work) in enumerate(zip(self.lanes, works, strict=True)):
            if lane.speculation:
                lane.speculation.add_to(work, prompts=prompts)
            if which != self.own:
                lane.pages.told()
        return works

    def launched(self, works: Several[Work]) -> None:
        """As `Scheduler.launched`."""
        for lane, work in zip(self.lanes, works, strict=True):
            lane.launched(work)

    def drafts_soon(self) -> bool:
        """As `Speculation.soon`, of any lane."""
        those = [(lane.speculation, lane.running) for lane in self.lanes if lane.speculation]
        prompts = any(sequence.pending for _, running in those for sequence in running)
        return any(speculation.soon(running, prompts=prompts) for speculation, running in those)

    def append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, now: float) -> str:
        """As `Scheduler.append`."""
        return self.lanes[sequence.lane].append(sequence, token, logprobs, now)

    def finish(self, sequence: Sequence, reason: str, now: float) -> Result:
        """As `Scheduler.finish`."""
        self.promised[sequence.lane] -= sequence.weight
        return self.lanes[sequence.lane].finish(sequence, reason, now)

    def find(self, id: int) -> Sequence | None:
        """The request of that id, if it waits or runs."""
        return next((found for lane in self.lanes if (found := lane.find(id))), None)

    def forget(self) -> None:
        """No lane finds a page again: what they hold is of no use any more, or is not known."""
        for lane in self.lanes:
            lane.pages.forget()
