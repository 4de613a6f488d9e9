"""Scheduler: who waits, who runs, what runs next, what has come. On the host alone, without tensors.

    waiting ──────▶ running ──▶ a step: one token of each sequence whose prompt is cached (decode), and its draft's,
     ▲    ▲            │                and pieces of prompts, together `prefill_chunk` tokens at most (prefill)
    add   └─ put back ─┤
                    append ──▶ finish: a token has come; it may be the last one

A sequence holds pages of the cache for what it has computed, and gets more before each step, the oldest first. When
none is left, the youngest is put back: it waits at the front, and is computed again, prompt and output together, as far
as its pages have other owners by then. Its tokens are the same, since each follows from those before it. The oldest
always goes on, and alone it fits, or it was refused; so all come to their end.

Every rank has one, is told the same and so makes the same choices; no choice depends on a clock. Where ranks have
requests of their own, every rank has one for each of them (lanes.py).
"""

from collections import deque
from collections.abc import Iterable

from epmoe.cache.pages import Pages, extend
from epmoe.engine.matcher import Matcher
from epmoe.engine.request import Request, Result, TokenLogprobs
from epmoe.engine.sequence import Piece, Sequence, Work
from epmoe.engine.speculation import Speculation

# Pages whose keys are found at a time, once the first one is there: to ask after each costs as much as its key.
NAMED = 16


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
        self.speculation: Speculation | None = None  # nobody drafts
        self.waiting: deque[Sequence] = deque()  # by priority, then by arrival; who was put back stands in front
        self.running: list[Sequence] = []  # the oldest first
        self.added = 0  # requests so far
        self.put_back = 0  # times that a sequence was, so far

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, request: Request, now: float, matcher: Matcher | None = None, id: int | None = None) -> Sequence:
        """Let a request, with the matcher of its grammar, wait for its turn.

        Args:
            id: None: they count from 0.
        Raises:
            UserError: the whole cache could not hold it at its longest.
        """
        self.pages.check(request.cached(self.max_positions))
        stop_ids = frozenset(request.params.stop_token_ids)
        end = request.length(self.max_positions)
        id = self.added if id is None else id
        sequence = Sequence(id, request, end, now, stop_ids=stop_ids, matcher=matcher)
        place = len(self.waiting)
        while place and self.waiting[place - 1].request.priority > request.priority:
            place -= 1
        self.waiting.insert(place, sequence)
        self.added += 1
        return sequence

    def ends(self, request: Request) -> frozenset[int]:
        """Ids that end its answer."""
        eos_ids = frozenset[int]() if request.params.ignore_eos else self.eos_ids
        return eos_ids.union(request.params.stop_token_ids)

    def found(self, request: Request, keys: list[bytes] | None = None) -> int:
        """Tokens of its prompt that would not be computed, if it began now; `keys` takes what `Lanes.add` may have."""
        if not self.pages.prefix_cache:
            return 0
        return self.found_of(Sequence(-1, request, 0, 0.0, keys=[] if keys is None else keys))

    def found_of(self, sequence: Sequence) -> int:
        """The same of one that has not begun."""
        return self.pages.longest(self._wanted(sequence)[0]) * self.pages.size

    def schedule(self) -> Work:
        """What the next step is to have but drafts (`Speculation.add_to`); whoever is in it has its pages.

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
        return work

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
            self._name(sequence, min(len(keys) + (NAMED if keys else 1), count))
        return keys[:count], count

    def _needs_soon(self, sequence: Sequence) -> int:
        """Pages that it lacks for its prompt, and for a page of tokens more."""
        until = max(len(sequence.prompt), sequence.computed) + self.pages.size
        return self.pages.lacks(sequence.handle, min(until, sequence.request.cached(self.max_positions)))

    def _learn(self, sequence: Sequence) -> None:
        """Its pages that are full, and whose tokens have come, may be found."""
        count = min(sequence.computed, sequence.length) // self.pages.size
        if not sequence.finished and sequence.handle >= 0 and count > self.pages.learnt[sequence.handle]:
            self._name(sequence, count)
            self.pages.learn(sequence.handle, sequence.keys, count)

    def _name(self, sequence: Sequence, count: int) -> None:
        """Find the keys of its first so many pages."""
        if self.pages.prefix_cache:
            extend(sequence.keys, sequence.tokens, self.pages.size, count)

    def append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None, now: float) -> str:
        """A chosen token has come; the reason when it ends the sequence ("eos", "stop" or "length"), else ""."""
        if not sequence.ids:
            sequence.first_token_s = now - sequence.added_s
        sequence.ids.append(token)
        if self.speculation:
            self.speculation.learn(sequence, token)
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
