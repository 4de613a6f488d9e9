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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from epmoe.errors import UserError

MOST_CHARACTERS = 1 << 17  # of a grammar
MOST_COMPILED = 32  # grammars that are remembered
MOST_THREADS = 8
# Symbols of a grammar, which take some 20 µs each to compile; states of its lexer, of 1 to 2 kB; and its fuel for a
# mask, of which 14,000 take a millisecond. The rest is llguidance's own.
LIMITS = LLParserLimits(max_grammar_size=20_000, max_lexer_states=50_000, step_lexer_fuel=100_000, verbose_errors=False)


class Matcher:
    """Where an answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.ahead = list[tuple[int, LLMatcher]]()  # a draft's next token, and the state after it

    @property
    def failure(self) -> str:
        """Why it can say nothing any more: the grammar is too complex from here on; else ""."""
        return _line(self.matcher.get_error()) if self.matcher.is_error() else ""

    def along(self, draft: Sequence[int]) -> list[LLMatcher]:
        """Here, and after each of these tokens up to the first that the grammar refuses; `take` goes on with them.

        By copies, some microseconds each: llguidance's own way, there and back on one matcher, loses its place where a
        grammar names tokens by their ids.
        """
        states, self.ahead = [self.matcher], []
        for token in draft:
            state = states[-1].deep_copy()
            if not state.is_stopped():  # else nothing changes any more
                if not state.validate_tokens([token]):
                    break
                state.consume_token(token)
            states.append(state)
            self.ahead.append((token, state))
        return states

    def take(self, token: int) -> None:
        """A token that the last mask allowed. Once the grammar has come to its end nothing changes any more.

        Of a draft's token the state is there, and with it the failure of the mask after it, if it had one.
        """
        ahead, self.ahead = self.ahead, []
        if ahead and ahead[0][0] == token:
            (_, self.matcher), *self.ahead = ahead
        elif not self.matcher.is_stopped():
            self.matcher.consume_token(token)


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
        self._compiled: Callable[[str], LLMatcher] = lru_cache(MOST_COMPILED)(self._compile)

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of an answer.

        Raises:
            UserError: it is no grammar, or too large a one.
        """
        held = self.held.get(grammar)
        return Matcher((self._compiled(grammar) if held is None else held.result()).deep_copy())

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
        rows, states = 0, list[tuple[LLMatcher, int]]()
        for each, draft in asked:
            states += ((state, rows + ahead) for ahead, state in enumerate(each.along(draft)))
            rows += 1 + len(draft)
        assert words_GW.is_contiguous() and words_GW.element_size() == 4 and len(words_GW) >= rows
        if len(states) < rows:
            words_GW[:rows] = -1  # what nobody writes allows everything
        self.executor.unsafe_compute_mask_ptr(states, words_GW.data_ptr(), 4 * words_GW.shape[1], len(words_GW))
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


def _line(message: str) -> str:
    """The first line of what llguidance says, or of it so much."""
    return " ".join(message.split("\n", 1)[0].split())[:200]
