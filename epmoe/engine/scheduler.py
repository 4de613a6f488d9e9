"""Scheduler: who waits, who runs, what runs next, what has come. On the host alone, without tensors.

    waiting ──admit──▶ running ──▶ a step: one token of each sequence whose prompt is cached (decode),
       ▲                  │                and pieces of prompts, together `prefill_chunk` tokens at most (prefill)
      add                 │
                          │
                     append ──▶ finish: a token has come; it may be the last one

Every rank has one, is told the same and so makes the same choices; no choice depends on a clock.
"""

from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from epmoe.cache.pages import CacheFull, Pages
from epmoe.engine.request import Request, Result, TokenLogprobs


@dataclass(eq=False)
class Sequence:
    """A request on its way."""

    id: int
    request: Request
    end: int  # length at which it must stop
    added_s: float  # on the engine's clock
    handle: int = -1  # in the cache, once it runs
    cached: int = 0  # tokens of the prompt that were fed
    launched: int = 0  # new tokens whose step was launched
    ids: list[int] = field(default_factory=list)  # new tokens that have come
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    first_token_s: float = 0.0  # since it was added
    finished: bool = False
    stop_ids: Set[int] = frozenset()  # that end it besides the end of text

    @property
    def pending(self) -> int:
        """Tokens of the prompt that the model has not seen yet."""
        return len(self.request.ids) - self.cached

    @property
    def decodes(self) -> bool:
        """Whether the next decode step is to have it."""
        return not self.pending and self.next < self.end

    @property
    def next(self) -> int:
        """The position of the next token to be launched, once the prompt was fed."""
        return len(self.request.ids) + self.launched

    @property
    def length(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.request.ids) + len(self.ids)

    def result(self, reason: str, now: float) -> Result:
        return Result(tuple(self.ids), reason, self.first_token_s, now - self.added_s, tuple(self.logprobs))


class Scheduler:
    """Decides what runs next.

    Args:
        pages: of the cache; sequences reserve theirs here.
        max_positions: of the model.
        eos_ids: ids that end a text, unless a request ignores them.
        max_batch: sequences that run at a time, at most.
        prefill_chunk: prompt tokens of a step, of all sequences together, at most.
    """

    def __init__(
        self, pages: Pages, max_positions: int, eos_ids: Iterable[int], *, max_batch: int, prefill_chunk: int
    ) -> None:
        self.pages, self.max_positions, self.eos_ids = pages, max_positions, frozenset(eos_ids)
        self.max_batch, self.prefill_chunk = min(max_batch, pages.sequences), prefill_chunk
        self.step_tokens = 0  # of a step at most, rows and pieces of prompts together; 0: no other bound
        self.waiting: deque[Sequence] = deque()  # by priority, then by arrival
        self.running: list[Sequence] = []  # in order of admission
        self.added = 0  # requests so far; their ids count from 0

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request, now: float) -> int:
        """Let a request wait for its turn; returns its id.

        Raises:
            UserError: the whole cache could not hold it.
        """
        self.pages.check(request.cached(self.max_positions))
        stop_ids = frozenset(request.params.stop_token_ids)
        sequence = Sequence(self.added, request, request.length(self.max_positions), now, stop_ids=stop_ids)
        place = len(self.waiting)
        while place and self.waiting[place - 1].request.priority > request.priority:
            place -= 1
        self.waiting.insert(place, sequence)
        self.added += 1
        return sequence.id

    def admit(self) -> list[Sequence]:
        """Move requests from `waiting` to `running`, in their order, while there are places and pages; those moved.

        All pages that a request can ever need are reserved now: a running sequence is never put back. A step that is
        under way may still write to pages whose sequence has ended; their new owner's steps come after it.
        """
        admitted = []
        while self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            try:
                sequence.handle = self.pages.admit(sequence.request.cached(self.max_positions))
            except CacheFull:
                assert self.running, "an empty cache refused a request"
                break
            self.running.append(self.waiting.popleft())
            admitted.append(sequence)
        return admitted

    def prefill(self) -> list[tuple[Sequence, int]]:
        """What the next step is to have of prompts: (sequence, how many of its tokens).

        In order of admission; with `step_tokens` shared by priority, see `shares`.
        """
        if not self.step_tokens:
            return pieces(self.running, self.prefill_chunk, self.prefill_chunk)
        most = max(min(self.prefill_chunk, self.step_tokens - len(self.decode())), 1)
        prompts = [sequence for sequence in self.running if sequence.pending]
        return shares(sorted(prompts, key=lambda each: each.request.priority), most)

    def decode(self) -> list[Sequence]:
        """What the next step is to have of others: a token of each sequence that has begun and may go on."""
        return [sequence for sequence in self.running if sequence.decodes]

    def append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, now: float) -> str:
        """A chosen token has come; the reason when it ends the sequence ("eos", "stop" or "length"), else ""."""
        if not sequence.ids:
            sequence.first_token_s = now - sequence.added_s
        sequence.ids.append(token)
        if logprobs is not None:
            own = logprobs.top[: sequence.request.params.logprobs]
            sequence.logprobs.append(TokenLogprobs(logprobs.chosen, own))
        if token in self.eos_ids and not sequence.request.params.ignore_eos:
            return "eos"
        if token in sequence.stop_ids:
            return "stop"
        return "length" if sequence.length >= sequence.end else ""

    def finish(self, sequence: Sequence, reason: str, now: float) -> Result:
        """The sequence ends; its pages are free. Tokens of it that are under way mean nothing any more."""
        sequence.finished = True
        if sequence in self.running:
            self.running.remove(sequence)
            self.pages.release(sequence.handle)
        else:
            self.waiting.remove(sequence)
        return sequence.result(reason, now)

    def find(self, id: int) -> Sequence | None:
        """The request of that id, if it waits or runs."""
        return next((each for each in (*self.running, *self.waiting) if each.id == id), None)


def shares(prompts: list[Sequence], most: int) -> list[tuple[Sequence, int]]:
    """(sequence, how many tokens of its prompt), `most` together, so that nobody waits for the whole of a long prompt.

    Those that fit an equal share are in, whole. Each of the others gets half of what those before it leave, and the
    first ones what remains: so many equal prompts still end one after the other, not all at the end.
    """
    equal = most // max(len(prompts), 1)
    ordered = sorted(prompts, key=lambda each: each.pending > equal)
    counts, left = [], most
    for each in ordered:
        counts.append(min(each.pending, left if each.pending <= equal else (left + 1) // 2))
        left -= counts[-1]
    for place, each in enumerate(ordered):
        more = min(each.pending - counts[place], left)
        counts[place], left = counts[place] + more, left - more
    return [(each, count) for each, count in zip(ordered, counts, strict=True) if count]


def pieces(running: Iterable[Sequence], most: int, each: int) -> list[tuple[Sequence, int]]:
    """(sequence, how many tokens of its prompt): up to `each` of one, `most` together, in order of admission."""
    work = []
    for sequence in running:
        tokens = min(sequence.pending, most, each)
        if tokens:
            work.append((sequence, tokens))
            most -= tokens
    return work
