"""Scheduler: who waits, who runs, what runs next, what has come. On the host alone, without tensors.

    waiting ──────▶ running ──▶ a step: one token of each sequence whose prompt is cached (decode), and its draft's,
     ▲    ▲            │                and pieces of prompts, together `prefill_chunk` tokens at most (prefill)
    add   └─ put back ─┤
                    append ──▶ finish: a token has come; it may be the last one

A sequence holds pages of the cache for what it has computed, and gets more before each step, the oldest first. When
none is left, the youngest is put back: it waits at the front, and is computed again, prompt and output together, as far
as its pages have other owners by then. Its tokens are the same, since each follows from those before it. The oldest
always goes on, and alone it fits, or it was refused; so all come to their end.

Every rank has one, is told the same and so makes the same choices; no choice depends on a clock.
"""

from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from epmoe.cache.pages import Pages, extend
from epmoe.engine.drafts import MOST_DRAFT, Drafter, Drafting, History
from epmoe.engine.matcher import Matcher
from epmoe.engine.request import PromptLogprobs, Request, Result, TokenLogprobs


@dataclass(eq=False)
class Sequence:
    """A request on its way."""

    id: int
    request: Request
    end: int  # length at which it must stop
    added_s: float  # on the engine's clock
    handle: int = -1  # in the cache, once it runs
    prompt: tuple[int, ...] = ()  # what it begins with: the request's ids, and what it had said when it was put back
    cached: int = 0  # tokens of `prompt` that were fed, or found
    found: int | None = None  # of them, those whose pages were there when it began
    keys: list[bytes] = field(default_factory=list)  # of its first pages
    launched: int = 0  # new tokens whose step was launched; of a draft those that have come
    ids: list[int] = field(default_factory=list)  # new tokens that have come
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scored: int = 0  # tokens of the prompt after each of which the next one's log-probability was launched
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # that have come
    finite: bool = True  # whether all logits are, of which these are made
    first_token_s: float = 0.0  # since it was added
    finished: bool = False
    stop_ids: Set[int] = frozenset()  # that end it besides the end of text
    matcher: Matcher | None = None  # where it stands in its grammar, once `ids` have come
    history: History | None = None  # likewise, where there are drafts

    def __post_init__(self) -> None:
        self.prompt = self.request.ids

    @property
    def pending(self) -> int:
        """Tokens of the prompt that the model has not seen yet."""
        return len(self.prompt) - self.cached

    @property
    def unscored(self) -> int:
        """How many more of its first tokens are to be scored; the last one's is the first new token's."""
        return 0 if self.request.params.prompt_logprobs is None else len(self.request.ids) - 1 - self.scored

    @property
    def computed(self) -> int:
        """Positions whose keys and values are there, once what was launched is done."""
        return self.cached if self.pending else self.next - 1

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

    def tokens(self, begin: int, end: int) -> tuple[int, ...]:
        """Those of prompt and output at these positions."""
        own = len(self.request.ids)
        return (*self.request.ids[begin:end], *self.ids[max(begin - own, 0) : max(end - own, 0)])

    def told_of_prompt(self) -> PromptLogprobs:
        """What has come of the log-probabilities of its prompt's tokens, if they are asked for."""
        return () if self.request.params.prompt_logprobs is None else (None, *self.prompt_logprobs)

    def result(self, reason: str, now: float) -> Result:
        times = self.first_token_s, now - self.added_s
        logprobs = tuple(self.logprobs)
        return Result(tuple(self.ids), reason, *times, logprobs, self.found or 0, self.told_of_prompt())


NOTHING = History(())  # of one that has said nothing yet
Piece = tuple[Sequence, int]  # of a prompt: how many of its tokens


@dataclass(frozen=True)
class Work:
    """What a step is to do."""

    rows: list[Sequence]  # a token of each
    pieces: list[Piece]
    begun: list[Sequence]  # of which the device knows nothing yet
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)  # further tokens of some rows, if those come


class Scheduler:
    """Decides what runs next.

    Args:
        pages: of the cache.
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
        # Of a step at most, rows and pieces of prompts together, and of one without rows; 0: no other bound.
        self.step_tokens = self.alone_tokens = 0
        self.drafting: Drafting | None = None  # nobody drafts
        self.waiting: deque[Sequence] = deque()  # by priority, then by arrival; who was put back stands in front
        self.running: list[Sequence] = []  # the oldest first
        self.added = 0  # requests so far; their ids count from 0
        self.put_back = 0  # times that a sequence was, so far

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request, now: float, matcher: Matcher | None = None) -> int:
        """Let a request, with the matcher of its grammar, wait for its turn; returns its id.

        Raises:
            UserError: the whole cache could not hold it at its longest.
        """
        self.pages.check(request.cached(self.max_positions))
        stop_ids = frozenset(request.params.stop_token_ids)
        end = request.length(self.max_positions)
        sequence = Sequence(self.added, request, end, now, stop_ids=stop_ids, matcher=matcher)
        place = len(self.waiting)
        while place and self.waiting[place - 1].request.priority > request.priority:
            place -= 1
        self.waiting.insert(place, sequence)
        self.added += 1
        return sequence.id

    def ends(self, request: Request) -> frozenset[int]:
        """Ids that end its answer."""
        eos_ids = frozenset[int]() if request.params.ignore_eos else self.eos_ids
        return eos_ids.union(request.params.stop_token_ids)

    def found(self, request: Request) -> int:
        """Tokens of its prompt that would not be computed, if it began now."""
        return self.pages.longest(self._wanted(Sequence(-1, request, 0, 0.0))[0]) * self.pages.size

    def schedule(self) -> Work:
        """What the next step is to have; whoever is in it has its pages.

        A step that is under way may still write to pages whose sequence has ended or was put back; their new owner's
        steps come after it.
        """
        work, left = Work([], [], []), self.prefill_chunk
        shares = self._shares()
        for sequence in tuple(self.running):
            if sequence.handle < 0:
                break  # put back just now, as are all that are younger
            if sequence.decodes and self._grow(sequence, 1):
                work.rows.append(sequence)
            elif sequence.pending > 0:
                left -= self._add_piece(work, sequence, min(left, shares.get(sequence, left)))
        while left and self.waiting and len(self.running) < self.max_batch:
            share = min(left, shares.get(self.waiting[0], left))
            first = not (work.rows or work.pieces)  # else nobody would begin, for ever
            if not (share or first) or not self._begin(self.waiting[0]):
                break
            work.begun.append(self.running[-1])
            left -= self._add_piece(work, self.running[-1], max(share, 1))
            if not share:
                break
        self._draft(work)
        return work

    def drafts_soon(self) -> bool:
        """Whether the next step would have drafts, for all that has come; it needs the tokens that are under way."""
        rows = [sequence for sequence in self.running if sequence.decodes]
        return self.drafting is not None and any(self._counts(rows, self.drafting.most_rows - len(rows)))

    def _draft(self, work: Work) -> None:
        """Let rows have drafts, where all their tokens have come, and nobody gives a page for it."""
        if self.drafting is None or not work.rows:
            return
        outputs = len(work.rows) + len(work.pieces)
        room = (self.max_batch if work.pieces else self.drafting.most_rows) - outputs
        known = [sequence for sequence in work.rows if sequence.launched == len(sequence.ids)]
        for sequence, count in zip(known, self._counts(known, room, len(work.rows)), strict=True):
            begin = sequence.computed
            got = self.pages.grow(sequence.handle, begin, begin + 1 + count) - 1 if count else 0
            if got > 0 and sequence.history:
                work.drafts[sequence] = sequence.history.draft(got)
                self.drafting.drafted += got

    def _counts(self, sequences: list[Sequence], room: int, rows: int = 0) -> list[int]:
        """How many tokens each drafts in a step of so many rows; 0: of these."""
        assert self.drafting is not None
        drafters: list[Drafter] = []
        for sequence in sequences:
            if sequence.history is None:
                drafters.append((NOTHING, 0))
            else:
                most = min(sequence.end - 1 - sequence.next, MOST_DRAFT)
                most = self.pages.readable(sequence.handle, most, len(sequences))
                drafters.append((sequence.history, most))
        return self.drafting.allot(drafters, rows or len(sequences), room)

    def _shares(self) -> dict[Sequence, int]:
        """What each prompt may have of a bounded step; those that may begin have a share."""
        if not self.step_tokens:
            return {}
        begin = [sequence for sequence, _ in zip(self.waiting, range(self.max_batch - len(self.running)), strict=False)]
        prompts = [sequence for sequence in (*self.running, *begin) if sequence.pending]
        rows = sum(sequence.decodes for sequence in self.running)
        bound = self.step_tokens - rows if rows else max(self.alone_tokens, self.step_tokens)
        most = max(min(self.prefill_chunk, bound), 1)
        return dict.fromkeys(prompts, 0) | dict(shares(sorted(prompts, key=lambda each: each.request.priority), most))

    def launched(self, work: Work) -> None:
        """The step was launched: what its prompts have written may be found by steps after it."""
        for sequence, _ in work.pieces:
            self._learn(sequence)

    def _add_piece(self, work: Work, sequence: Sequence, most: int) -> int:
        """The next tokens of its prompt, as far as there is room; how many."""
        count = self._grow(sequence, min(sequence.pending, most)) if most else 0
        if count:
            work.pieces.append((sequence, count))
        return count

    def _grow(self, sequence: Sequence, count: int) -> int:
        """Pages for up to so many tokens more, if need be of the youngest's; how many. The youngest waits for room."""
        begin = sequence.computed
        while not (got := self.pages.grow(sequence.handle, begin, begin + count)):
            if self.running[-1] is sequence:
                break
            self._put_back(self.running[-1])
        return got

    def _put_back(self, sequence: Sequence) -> None:
        self.put_back += 1
        self.running.remove(sequence)
        self.pages.release(sequence.handle)
        sequence.handle, sequence.cached = -1, 0
        self.waiting.appendleft(sequence)

    def _begin(self, sequence: Sequence) -> bool:
        """Let it run, with the longest prefix that is there, if there is room for all of its prompt and a page more,
        beside what those that run need for theirs; whether it does."""
        if sequence.launched > len(sequence.ids):
            return False  # a token of it is still under way
        soon = sum(map(self._needs_soon, self.running))
        if self.running and soon > self.pages.left:
            return False
        sequence.prompt = (*sequence.request.ids, *sequence.ids)
        sequence.handle, sequence.cached = self.pages.admit(*self._wanted(sequence))
        if self.running and soon + self._needs_soon(sequence) > self.pages.left:
            self.pages.release(sequence.handle)
            sequence.handle, sequence.cached = -1, 0
            return False
        if sequence.found is None:
            sequence.found = sequence.cached
        self.running.append(self.waiting.popleft())
        return True

    def _wanted(self, sequence: Sequence) -> tuple[list[bytes], int]:
        """Keys of the first pages that it need not compute, up to one that is not there, and how many these pages are.

        A token at least is computed, and those that are to be scored. Keys of pages that are not there have time until
        the step was launched.
        """
        count = (sequence.scored if sequence.unscored else len(sequence.prompt) - 1) // self.pages.size
        keys = sequence.keys
        while self.pages.prefix_cache and len(keys) < count and (not keys or self.pages.may_follow(keys[-1])):
            self._name(sequence, len(keys) + 1)
        return keys[:count], count

    def _needs_soon(self, sequence: Sequence) -> int:
        """Pages that it lacks for its prompt, and for a page of tokens more."""
        until = max(len(sequence.prompt), sequence.computed) + self.pages.size
        return self.pages.lacks(sequence.handle, min(until, sequence.request.cached(self.max_positions)))

    def _learn(self, sequence: Sequence) -> None:
        """Its pages that are full, and whose tokens have come, may be found."""
        count = min(sequence.computed, sequence.length) // self.pages.size
        if sequence.handle >= 0 and count > self.pages.learnt[sequence.handle]:
            self._name(sequence, count)
            self.pages.learn(sequence.handle, sequence.keys, count)

    def _name(self, sequence: Sequence, count: int) -> None:
        """Find the keys of its first so many pages."""
        if self.pages.prefix_cache:
            extend(sequence.keys, sequence.tokens, self.pages.size, count)

    def accept(self, sequence: Sequence) -> None:
        """A token of its draft was right: what its row has chosen counts."""
        assert self.drafting is not None
        self.drafting.accepted += 1
        sequence.launched += 1

    def append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, now: float) -> str:
        """A chosen token has come; the reason when it ends the sequence ("eos", "stop" or "length"), else ""."""
        if not sequence.ids:
            sequence.first_token_s = now - sequence.added_s
        sequence.ids.append(token)
        if self.drafting is not None:
            if sequence.history is None:
                sequence.history = self.drafting.history(sequence.request.ids)
            sequence.history.take(token)
        if logprobs is not None:
            own = logprobs.top[: sequence.request.params.logprobs]
            sequence.logprobs.append(TokenLogprobs(logprobs.chosen, own))
        self._learn(sequence)
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


def shares(prompts: list[Sequence], most: int) -> list[Piece]:
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


def pieces(running: Iterable[Sequence], most: int, each: int) -> list[Piece]:
    """(sequence, how many tokens of its prompt): up to `each` of one, `most` together, in order of admission."""
    work = []
    for sequence in running:
        tokens = min(sequence.pending, most, each)
        if tokens:
            work.append((sequence, tokens))
            most -= tokens
    return work
