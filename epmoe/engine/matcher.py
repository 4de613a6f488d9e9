"""Grammars: which token may come next in an answer, by llguidance, the same on every rank.

    grammar, a text        compiled once, then copied for each request
      │ take(token)        a token has come
      ▼
    a mask, a bit an id    of each row of a step, before its head

A grammar is llguidance's: its JSON form, or Lark (text/grammar.py writes them). How much it may cost is counted in its
steps, never by a clock, so that ranks agree on what is too much.

Letters: G rows with a grammar · W words of 32 bits, a bit an id.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from epmoe.errors import UserError

MOST_CHARACTERS = 1 << 17  # of a grammar
MOST_COMPILED = 32  # grammars that are remembered
MOST_THREADS = 8
# Symbols of a grammar, which take some 20 µs each to compile; states of its lexer, of 1 to 2 kB; and its fuel for a
# mask, of which 14,000 take a millisecond. The rest is llguidance's own.
LIMITS = LLParserLimits(max_grammar_size=20_000, max_lexer_states=50_000, step_lexer_fuel=100_000, verbose_errors=False)


Due = tuple[LLMatcher, int, int]  # whose mask is to be made; the mask's row; the lexer


class Matcher:
    """Where an answer stands in its grammar.

    Args:
        lexer: that it shares with all copies of one compiled grammar.
    """

    def __init__(self, matcher: LLMatcher, lexer: int) -> None:
        self.matcher, self.lexer = matcher, lexer
        self.ahead = list[tuple[int, str]]()  # a draft's next token, and the failure of the mask after it
        self.failed = ""

    @property
    def failure(self) -> str:
        """Why it can say nothing any more: the grammar is too complex from here on; else ""."""
        return self.failed or _failure(self.matcher)

    def take(self, token: int) -> None:
        """A token that the last mask allowed. Once the grammar has come to its end nothing changes any more."""
        ahead, self.ahead = self.ahead, []
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
        if ahead and ahead[0][0] == token:
            (_, self.failed), *self.ahead = ahead


class Walk:
    """A copy of a matcher, which goes along a draft as if its tokens had come.

    By a copy: llguidance's own way, there and back on one matcher, loses its place where a grammar names tokens by
    their ids.
    """

    def __init__(self, of: Matcher, draft: Sequence[int], row: int) -> None:
        self.of, self.draft, self.row = of, draft, row
        self.state = of.matcher.deep_copy()
        of.ahead = []

    def step(self, ahead: int) -> bool:
        """Take the draft's token behind `ahead` others; False: the grammar refuses it."""
        token = self.draft[ahead]
        if not self.state.is_stopped():  # else nothing changes any more
            if not self.state.validate_tokens([token]):
                return False
            self.state.consume_token(token)
        return True

    def masked(self, ahead: int) -> None:
        """There is the mask behind so many tokens."""
        self.of.ahead.append((self.draft[ahead - 1], _failure(self.state)))


class Grammars:
    """Compiles grammars over a vocabulary. Its methods may be called on any thread.

    `matcher` compiles what is not there, which may take a second; of what was ordered by `hold` it waits for nothing
    once `then` was called.

    Args:
        vocabulary: the bytes of each id, which ids are special, and which end a text.
        ranks: processes that share this machine's processors.
    """

    def __init__(self, vocabulary: LLTokenizer, ranks: int = 1) -> None:
        self.vocabulary = vocabulary
        threads = min((os.cpu_count() or 1) // ranks, MOST_THREADS)
        self.executor = LLExecutor(max(1, threads))
        self.compilers = ThreadPoolExecutor(max(2, threads), "epmoe-grammar")  # two: a long compile delays no short one
        self.held: dict[str, Future[LLMatcher]] = {}
        self.compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # beside those, the latest ones
        self.lock = Lock()

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of an answer.

        Raises:
            UserError: it is no grammar, or too large a one.
        """
        held = self.held.get(grammar)
        made = self._remembered(grammar) if held is None else held.result()
        return Matcher(made.deep_copy(), id(made))

    def spoil(self, grammar: str) -> None:
        """A matcher of it has failed: who begins from now on shares nothing with it.

        What its lexer may take up is a bound for all copies together.
        """
        with self.lock:
            self.compiled.pop(grammar, None)
        if grammar in self.held:
            self.held[grammar] = self.compilers.submit(self._compile, grammar)

    def hold(self, grammar: str, then: Callable[[str], object]) -> None:
        """Compile it on another thread, and keep it until `drop`.

        Args:
            then: called on that thread when it is there, with "", or with the reason why it cannot be.
        """

        def told(done: Future[LLMatcher]) -> None:
            if not done.cancelled():
                error = done.exception()
                then("" if error is None else str(error) or type(error).__name__)

        self.held[grammar] = future = self.compilers.submit(self._compile, grammar)
        future.add_done_callback(told)

    def drop(self, grammar: str) -> None:
        """Nobody asks for it any more; matchers that there are stay."""
        self.held.pop(grammar).cancel()

    def _remembered(self, grammar: str) -> LLMatcher:
        with self.lock:
            made = self.compiled.pop(grammar, None)
        made = made or self._compile(grammar)
        with self.lock:
            self.compiled[grammar] = made
            if len(self.compiled) > MOST_COMPILED:
                self.compiled.popitem(last=False)
        return made

    def _compile(self, grammar: str) -> LLMatcher:
        _check_length(grammar)
        made = LLMatcher(self.vocabulary, grammar, log_level=0, limits=LIMITS)
        if not made.is_error():
            made.compute_bitmask()  # the copies have what that has found
        if made.is_error():
            raise _refused(made.get_error())
        return made

    def fill(self, asked: Sequence[tuple[Matcher, Sequence[int]]], words_GW: Any) -> int:
        """Write the masks of these, row by row, into int32 memory on the host; without the interpreter's lock.

        At a grammar's end the mask has the ids that end a text, and no others. Of one that fails it means nothing.

        Args:
            asked: matchers, and tokens after each of which there is a further mask, as if they had come; from the first
                one on that the grammar refuses, masks mean nothing.
            words_GW: a tensor of at least as many rows, which lie one after the other.
        Returns:
            how many rows were written.
        """
        rows = sum(1 + len(draft) for _, draft in asked)
        assert words_GW.is_contiguous() and words_GW.element_size() == 4 and len(words_GW) >= rows
        states, walks, row = list[Due](), list[Walk](), 0
        for each, draft in asked:
            states.append((each.matcher, row, each.lexer))
            if draft:
                walks.append(Walk(each, draft, row))
            row += 1 + len(draft)
        ahead = 0  # tokens of a draft
        while states:
            for wave in _waves(states):
                self.executor.unsafe_compute_mask_ptr(wave, words_GW.data_ptr(), 4 * words_GW.shape[1], len(words_GW))
            going = list[Walk]()
            for walk in walks:
                if ahead:
                    walk.masked(ahead)
                if ahead < len(walk.draft):
                    if walk.step(ahead):
                        going.append(walk)
                    else:
                        words_GW[walk.row + ahead + 1 : walk.row + 1 + len(walk.draft)] = -1
            ahead, walks = ahead + 1, going
            states = [(walk.state, walk.row + ahead, walk.of.lexer) for walk in going]
        return rows


def check_grammar(grammar: str) -> None:
    """Raises UserError as `Grammars.matcher`, for what shows without a vocabulary: no token of it is known here."""
    _check_length(grammar)
    if message := LLMatcher.validate_grammar(grammar, limits=LIMITS):
        raise _refused(message)


def _check_length(grammar: str) -> None:
    if len(grammar) > MOST_CHARACTERS:
        raise UserError(f"the grammar has {len(grammar)} characters, and may have {MOST_CHARACTERS}: shorten it")


def _refused(message: str) -> UserError:
    """All of what llguidance says, which for a pattern has its reason at the end."""
    return UserError(f"the grammar is refused ({' '.join(message.split())[:300]}): mend it")


def _waves(states: Sequence[Due]) -> list[list[tuple[LLMatcher, int]]]:
    """Those of one lexer one after the other, since threads would wait for each other: and in their order, so that
    every rank finds the same one failing where the lexer's bound is used up."""
    waves, found = list[list[tuple[LLMatcher, int]]](), Counter[int]()
    for matcher, row, lexer in states:
        if found[lexer] == len(waves):
            waves.append([])
        waves[found[lexer]].append((matcher, row))
        found[lexer] += 1
    return waves


def _failure(matcher: LLMatcher) -> str:
    return _line(matcher.get_error()) if matcher.is_error() else ""


def _line(message: str) -> str:
    """The first line of what llguidance says, or of it so much."""
    return " ".join(message.split("\n", 1)[0].split())[:200]
