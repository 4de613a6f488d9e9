"""Drafts: what a sequence will probably say next, found in what was said (prompt lookup), and how much of it is tried.

    prompt and answer   … a b c d e f … a b c        its last tokens stood there before: d e f may follow, a draft
    rows of a step              c  d  e  f           its last token and the draft's, each at its own position
    chosen                      d  e  x  y           the draft was right up to e, so d, e and x are the answer's

What was said otherwise once is expected so again: here x instead of f, and behind it what follows the x, or g,
whichever came. A table that becomes a list of objects, or a text in which a name changes, so costs one wrong draft for
each kind of place and not for each place.

A token follows from those before it and from nothing else, a row's bits from no other row: so an answer with drafts is
the answer without, bit for bit, and a wrong draft costs the time of its rows.

Whether a draft is right is measured without trying one: each token that comes is compared with what would have been
drafted. A step has drafts where the tokens that they probably bring are more than the step becomes dearer by: `Costs`.
No choice depends on a clock, so all ranks make the same.

Letters: E experts of a layer · K of them a token's.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_DRAFT = 15  # tokens of a draft
MOST_ROWS = 256  # of a step with drafts
SEARCHED = 1024  # the latest places that have the last token; a text of one token has as many as it is long
LEAST_MATCH, MOST_MATCH = 2, 8  # last tokens that stood there before; more of them tell no more
RARE = 4  # a token that was there no more often is a match alone
PATIENCE = 16  # tokens until the next search, at most, after some that were in vain
FRESH = 64  # tokens after a right one in which every search counts
FOLLOWED = 3  # tokens that have agreed, after which another one replaces what stood there
MARGIN = 1.02  # drafts are tried where the tokens a second become so many times as many

# After so many tokens a sequence goes on without a draft model that has guessed too few of them (`least_share`).
MODEL_TRIALS = 32

# How often a drafted token was the one that came, by how many tokens before it were drafted rightly or had matched:
# fewer than 2, fewer than 6, more. What is held before anything has come counts as so many trials; older ones fade.
MATCHES = (2, 6)
HELD, HELD_TRIALS, FADE = (0.2, 0.5, 0.8), 2.0, 0.95


@dataclass(frozen=True)
class Costs:
    """What a decode step of so many rows takes, beside what it takes for a row without experts' weights: 1.

    The defaults are fitted to gpt-oss-20b's steps on one H200 (1.65, 3.38, 4.77 and 8.16 ms at 1, 16, 64 and 256 rows;
    scripts/bench/NOTES.md, entries 39, 41 and 44): of 1.35 ms, 2.3 are what all 768 experts' weights take, 0.018 a row.
    Whoever drafts waits for the tokens of the step before, and the host has more to do for each row: 0.25 ms and 20 µs
    a row, of 28 that were measured where each row has a grammar.

    Args:
        experts: of a layer on this rank.
        untouched: share of them of which one row needs no weight, 1 - K / E.
    """

    experts: float
    untouched: float
    expert: float = 0.053
    row: float = 0.013
    wait: float = 0.19
    wait_row: float = 0.015

    @classmethod
    def of(cls, num_experts: int, top_k: int, ranks: int = 1) -> "Costs":
        """Of a model whose experts so many ranks share."""
        return cls(num_experts / ranks, 1.0 - top_k / num_experts)

    def steps(self, most: int) -> list[float]:
        """Of 0 … `most` rows. By multiplications, which every machine rounds alike."""
        found, untouched = [], 1.0
        for rows in range(most + 1):
            found.append(1.0 + self.expert * self.experts * (1.0 - untouched) + self.row * rows)
            untouched *= self.untouched
        return found

    def drafted(self, steps: Sequence[float], rows: int) -> float:
        """What one of `steps` with drafts takes, of so many rows."""
        return steps[rows] + self.wait + self.wait_row * rows


@dataclass
class Replaced:
    """What was said instead of a token, when its place was followed."""

    token: int
    behind: int  # the place behind it in the answer, the latest
    stays: bool = False  # whether the text went on as behind the replaced one, and not as there


class History:
    """A sequence's tokens so far, and what followed when the last ones stood there before."""

    modelled = False  # whether a draft model goes on with it

    def __init__(self, ids: Sequence[int]) -> None:
        self.count, self.ids = len(ids), np.empty(len(ids) + 512, np.int32)
        self.ids[: self.count] = ids
        self.next = -1  # place of the token that is drafted first; -1: none
        self.matched = 0  # tokens before it that agree with the last ones, as far as was looked
        self.replaced: dict[int, Replaced] = {}
        self.judged: tuple[int, int] | None = None  # a token just replaced, and the place behind it
        # Searches without use, one after the other; tokens until the next one; and since a right one, counted down.
        self.vain, self.pause, self.fresh = 0, 0, 0
        self.tried, self.right = [HELD_TRIALS] * len(HELD), [HELD_TRIALS * held for held in HELD]
        self._search()

    def take(self, token: int) -> None:
        """A token has come."""
        if self.count == len(self.ids):
            self.ids = np.concatenate((self.ids, np.empty(self.count, np.int32)))
        place, expected, behind = self.next, -1, -1
        if place >= 0:
            expected, behind = self._expected(place)
            self._learn(expected == token)
        self.ids[self.count] = token
        self.count += 1
        self._judge(token)
        if expected == token:
            self.next, self.matched, self.vain, self.pause, self.fresh = behind, self.matched + 1, 0, 0, FRESH
            if (stood := int(self.ids[place])) != token:
                self.replaced[stood].behind = self.count
            return
        followed = self.matched >= FOLLOWED
        if place >= 0:
            self._replace(place, token, followed)
        self.next, self.matched, self.fresh = -1, 0, max(0, self.fresh - 1)
        if self.pause:
            self.pause -= 1
        else:
            self._search()
        if self.next < 0 and place >= 0 and followed:
            self.next = place + 1  # a token was replaced, perhaps: the text goes on behind it

    @property
    def longest(self) -> int:
        """Tokens that it can draft now."""
        return MOST_DRAFT if self.next >= 0 else 0

    def draft(self, most: int) -> list[int]:
        """Up to so many next tokens; a text that runs into its own end goes on as it did before."""
        found: list[int] = []
        place = self.next
        while place >= 0 and len(found) < most:
            if place < self.count:
                token, place = self._expected(place)
            else:
                token, place = found[place - self.count], place + 1
            found.append(token)
        return found

    def _expected(self, place: int) -> tuple[int, int]:
        """The token that comes where that place is followed, and the place behind it."""
        stood = int(self.ids[place])
        instead = self.replaced.get(stood)
        if instead is None:
            return stood, place + 1
        return instead.token, place + 1 if instead.stays else instead.behind

    def _replace(self, place: int, token: int, followed: bool) -> None:
        """Another token has come than was expected."""
        stood = int(self.ids[place])
        if stood == token:
            del self.replaced[stood]  # it is back
        elif followed:
            self.replaced[stood], self.judged = Replaced(token, self.count), (stood, place + 1)

    def _judge(self, token: int) -> None:
        """The first token behind one that was replaced."""
        if self.judged:
            stood, place = self.judged
            self.judged = None
            if stood in self.replaced:
                self.replaced[stood].stays = int(self.ids[place]) == token

    def chance(self, ahead: int) -> float:
        """That the draft's token after `ahead` right ones is right."""
        kind = _kind(self.matched + ahead)
        return self.right[kind] / self.tried[kind]

    def _learn(self, right: bool) -> None:
        kind = _kind(self.matched)
        self.tried[kind] = FADE * self.tried[kind] + 1.0
        self.right[kind] = FADE * self.right[kind] + right

    def _search(self) -> None:
        """The place behind the longest earlier match of the last tokens, of equal ones the latest."""
        ids = self.ids[: self.count]
        end_X: np.ndarray[Any, Any] = np.flatnonzero(ids[:-1] == ids[-1]) if self.count else np.empty(0, np.int64)
        rare = len(end_X) <= RARE
        end_X, length = end_X[-SEARCHED:], 1
        while len(end_X) and length < MOST_MATCH:
            longer_X = end_X[end_X >= length]
            longer_X = longer_X[ids[longer_X - length] == ids[self.count - 1 - length]]
            if not len(longer_X):
                break
            end_X, length = longer_X, length + 1
        if len(end_X) and (rare or length >= LEAST_MATCH):
            self.next, self.matched = int(end_X[-1]) + 1, length
        self.vain += 1  # until a token proves it right
        self.pause = 0 if self.fresh else min(2 ** min(self.vain, 8) // 4, PATIENCE)


class Modelled(History):
    """The same, and what a draft model has said of the next tokens: whichever of the two is likelier to be right.

    Args:
        least: share of its first tokens that must be right.
    """

    modelled = True

    def __init__(self, ids: Sequence[int], least: float = 0.5) -> None:
        super().__init__(ids)
        self.least = least
        self.said: list[int] = []
        self.place = 0  # how many of these have come, all right
        self.depth_tried, self.depth_right = [HELD_TRIALS] * MOST_DRAFT, [HELD_TRIALS * 0.6] * MOST_DRAFT
        self.trials = 0

    def told(self, ids: list[int]) -> None:
        """What the draft model says of the tokens behind the last one."""
        self.said, self.place = ids if self.modelled else [], 0

    def take(self, token: int) -> None:
        if self.place < len(self.said):
            right = self.said[self.place] == token
            self.depth_tried[self.place] = FADE * self.depth_tried[self.place] + 1.0
            self.depth_right[self.place] = FADE * self.depth_right[self.place] + right
            self.trials += self.place == 0
            self.place = self.place + 1 if right else len(self.said)
        if self.trials >= MODEL_TRIALS and self._depth(0) < self.least:
            self.modelled, self.said = False, []
        super().take(token)

    @property
    def longest(self) -> int:
        return len(self.said) if self._by_model() else super().longest

    def draft(self, most: int) -> list[int]:
        return self.said[:most] if self._by_model() else super().draft(most)

    def chance(self, ahead: int) -> float:
        return self._depth(ahead) if self._by_model() else super().chance(ahead)

    def _depth(self, ahead: int) -> float:
        return self.depth_right[ahead] / self.depth_tried[ahead]

    def _by_model(self) -> bool:
        """Of two tokens it brings more than a match; nothing of what it said has come yet."""
        if not self.said or self.place:
            return False
        first = super().chance(0) if self.next >= 0 else 0.0
        second = super().chance(1) if self.next >= 0 else 0.0
        return self._depth(0) * (1.0 + self._depth(1)) >= first * (1.0 + second)


def _kind(matched: int) -> int:
    few, some = MATCHES
    return 0 if matched < few else 1 if matched < some else 2


def least_share(costs: Costs, cost: float, depth: int) -> float:
    """Which share of what a draft model says must be right, so that steps bring more tokens than they take longer.

    Args:
        cost: of its `depth` tokens, in steps of one row.
    """
    steps = costs.steps(1 + depth)
    longer = costs.drafted(steps, 1 + depth) / steps[1] + cost
    shares = (percent / 100 for percent in range(5, 100, 5))
    return next((share for share in shares if sum(share**ahead for ahead in range(depth + 1)) > longer), 1.0)


def most_rows(sequences: int) -> int:
    """Rows of a step of so many sequences at most, and their drafts; a step of more takes as much longer as it brings.

    >>> most_rows(1), most_rows(64), most_rows(300)
    (16, 256, 300)
    """
    return max(sequences, min((1 + MOST_DRAFT) * sequences, MOST_ROWS))


Drafter = tuple[History, int]  # and how many tokens it may draft, at most


class Drafting:
    """Decides how much is drafted in steps of up to `most_rows` rows.

    Args:
        history: makes what drafts, of a prompt's ids.
        depth: tokens that a draft model says; 0: there is none.
    """

    def __init__(
        self,
        costs: Costs,
        most_rows: int,
        history: Callable[[Sequence[int]], History] = History,
        depth: int = 0,
    ) -> None:
        self.costs, self.most_rows, self.steps, self.depth = costs, most_rows, costs.steps(most_rows), depth
        self.history = history
        self.drafted = self.accepted = 0  # tokens so far

    def pays(self, rows: int) -> bool:
        """Whether any drafts can be worth it beside so many rows: those that are all right."""
        before, most = MARGIN * rows / self.steps[rows], min(self.most_rows, (1 + MOST_DRAFT) * rows)
        return any(each / self.costs.drafted(self.steps, each) > before for each in range(rows + 1, most + 1))

    def allot(self, drafters: Sequence[Drafter], rows: int, room: int) -> list[int]:
        """How many tokens each drafts, so that a step brings the most tokens in its time; none where none is worth it.

        Args:
            rows: of the step without drafts.
            room: rows for drafts, at most.
        """
        counts, taken, best = [0] * len(drafters), list[int](), 0
        drafters = [(history, min(most, history.longest)) for history, most in drafters]
        those = [each for each, (_, most) in enumerate(drafters) if most > 0]
        chances = [(-drafters[each][0].chance(0), each) for each in those]
        heapq.heapify(chances)
        tokens = float(rows)
        best_rate = MARGIN * tokens / self.steps[rows]
        while chances and len(taken) < room:
            chance, each = chances[0]
            if -chance * self.steps[rows] < (self.costs.row + self.costs.wait_row) * tokens:
                break  # less than a row takes, and no other brings more
            history, most = drafters[each]
            taken.append(each)
            counts[each] += 1
            tokens -= chance
            rate = tokens / self.costs.drafted(self.steps, rows + len(taken))
            if rate > best_rate:
                best_rate, best = rate, len(taken)
            if counts[each] < most:
                heapq.heapreplace(chances, (chance * history.chance(counts[each]), each))
            else:
                heapq.heappop(chances)
        for each in taken[best:]:
            counts[each] -= 1
        return counts
