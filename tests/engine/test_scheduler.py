"""The scheduler's choices over a cache of few pages: who gets pages, who is put back, what is found; on the host alone.

A step is a line here: its rows, its pieces of prompts, who begins. Tokens come one step late, as in the engine.
"""

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmoe.cache.cache import CacheConfig
from epmoe.cache.pages import Pages
from epmoe.engine import scheduler as scheduling
from epmoe.engine.lanes import Lanes
from epmoe.engine.request import Request, SamplingParams
from epmoe.engine.scheduler import Scheduler, shares
from epmoe.engine.sequence import Sequence, Work
from epmoe.errors import UserError


def scheduler(pages: int, size: int = 4, *, chunk: int = 100, batch: int = 8, **more: bool) -> Scheduler:
    held = Pages({None: pages, 6: pages}, size, batch, most=pages * size, **more)
    return Scheduler(held, 1000, [99], max_batch=batch, prefill_chunk=chunk)


def asked(prompt: int, new: int, *, first: int = 0) -> Request:
    """`prompt` tokens from `first` on, and so many new ones."""
    return Request(tuple(range(first, first + prompt)), SamplingParams(max_new_tokens=new, ignore_eos=True))


class Run:
    """Steps as the engine makes them: the one that was launched last lands after the next one's launch."""

    def __init__(self, tested: Scheduler) -> None:
        self.tested, self.flights = tested, deque[list[Sequence]]()
        self.work = Work([], [], [])
        self.computed = 0  # tokens of prompts
        self.put_back: list[int] = []

    def step(self) -> list[str]:
        """What it is to do, as words; what was launched before it has come."""
        before = {each.id: each.handle for each in self.tested.running}
        self.work = self.tested.schedule()
        self.put_back += [each.id for each in self.tested.waiting if each.id in before]
        for sequence, count in [*((row, 1) for row in self.work.rows), *self.work.pieces]:
            assert self.tested.pages.holds(sequence.handle, sequence.computed, sequence.computed + count)
        for sequence, count in self.work.pieces:
            sequence.cached += count
            self.computed += count
        ended = [*self.work.rows, *(each for each, _ in self.work.pieces if not each.pending)]
        for sequence in ended:
            sequence.launched += 1
        if ended:
            self.flights.append(ended)
        self.tested.launched(self.work)
        while len(self.flights) > bool(ended):
            for sequence in self.flights.popleft():
                if not sequence.finished and self.tested.append(sequence, token_of(sequence), None, 0.0):
                    self.tested.finish(sequence, "length", 0.0)
        pieces = (f"{each.id}+{count}" for each, count in self.work.pieces)
        return [*(str(each.id) for each in self.work.rows), *pieces]


def token_of(sequence: Sequence) -> int:
    """A function of the history, as a model's is."""
    return hash(sequence.tokens(0, sequence.length)) % 50


def lines(run: Run, count: int) -> list[str]:
    return [" ".join(run.step()) for _ in range(count)]


def test_a_request_is_admitted_for_its_prompt_and_a_page_more() -> None:
    """Not for its longest: three of 24 positions run in a cache of 32, where the third waits for its prompt's room."""
    tested = scheduler(8)
    for number in range(3):
        tested.add(asked(8, 17, first=100 * number), 0.0)
    run = Run(tested)
    assert run.step() == ["0+8", "1+8"]
    assert [len(own.pages) for own in tested.pages.held[0]] == [2, 2] and len(tested.waiting) == 1


def test_the_youngest_is_put_back_and_computed_again() -> None:
    """Prompt and output together, as far as nothing else has taken its pages; what has come is kept."""
    tested = scheduler(8)
    for number in range(2):
        tested.add(asked(8, 17, first=100 * number), 0.0)
    run = Run(tested)
    # 12 positions each, 16 each: 8 pages. The 17th of the first needs one of the second's.
    assert lines(run, 9) == ["0+8 1+8"] + ["0 1"] * 8
    assert run.step() == ["0"] and run.put_back == [1]
    (waiting,) = tested.waiting
    assert (waiting.handle, waiting.cached, len(waiting.ids), waiting.launched) == (-1, 0, 9, 9)
    assert lines(run, 8) == ["0"] * 7 + [""]  # the last one's token comes
    assert run.step() == ["1+9"]  # of 17, 8 were still there: the first has taken the others
    assert waiting.found == 0 and waiting.prompt == waiting.tokens(0, 17)
    assert lines(run, 8) == ["1"] * 7 + [""] and not tested.busy


def test_a_sequence_with_a_token_on_its_way_is_not_admitted_again() -> None:
    """Its next token is not known yet, and would be chosen twice."""
    tested = scheduler(8)
    tested.add(asked(8, 17), 0.0)
    run = Run(tested)
    lines(run, 3)
    sequence = tested.running[0]
    assert sequence.launched == len(sequence.ids) + 1
    tested._put_back(sequence)
    assert tested.schedule() == Work([], [], [])
    assert lines(run, 2) == ["", "0+3"]  # 8 of 11 were still there


def test_the_youngest_alone_waits_where_it_is() -> None:
    """It has nobody to take pages from; it keeps its own, and goes on when others have ended."""
    tested = scheduler(8, chunk=4)
    tested.add(asked(4, 9), 0.0)
    run = Run(tested)
    assert run.step() == ["0+4"]
    tested.add(asked(20, 2, first=100), 0.0)
    assert lines(run, 5) == ["0 1+4"] * 5  # 3 pages and 5
    assert lines(run, 6) == ["0", "0", "0", "", "1", ""] and run.put_back == [] and not tested.busy


def test_a_step_is_as_large_as_the_windows_stock_was_made_for() -> None:
    """Though the last one's pieces still hold what they have passed over; nobody is put back for it."""
    counts = CacheConfig([None, 6], 1, 1, tokens=1600, sequences=4, page=4, step=40).pages
    assert counts[6] == 4 * 4 + 10
    tested = Scheduler(Pages(counts, 4, 4, most=1600), 2000, [99], max_batch=4, prefill_chunk=40)
    for prompt in (3, 57, 78, 99):
        tested.add(asked(prompt, 60, first=1000 * prompt), 0.0)
    run, sizes = Run(tested), []
    for _ in range(7):
        run.step()
        sizes.append(sum(count for _, count in run.work.pieces))
    assert sizes == [40] * 5 + [37, 0] and run.put_back == []


def test_what_fits_no_empty_cache_is_refused_when_added() -> None:
    """By its longest possible length, so that nobody waits for ever."""
    tested = scheduler(8)
    tested.add(asked(16, 17), 0.0)
    with pytest.raises(UserError, match=r"33 tokens can never fit a cache of 32"):
        tested.add(asked(16, 18), 0.0)


def test_requests_that_begin_alike_share_pages() -> None:
    """Also with one that still runs, and the next turn of a conversation computes what follows alone."""
    tested = scheduler(20, chunk=18)
    tested.add(asked(18, 4), 0.0)
    tested.add(asked(18, 4), 0.0)
    run = Run(tested)
    assert lines(run, 2) == ["0+18", "0 1+2"]
    assert tested.pages.together == 10 and tested.pages.left == 14
    while tested.busy:
        run.step()
    first = Request((*range(18), *(7, 7, 7)), SamplingParams(max_new_tokens=4))
    tested.add(first, 0.0)
    assert tested.found(first) == 16 and run.step() == ["2+5"] and tested.running[0].found == 16


@pytest.mark.parametrize("shared", [3, 4, 66, 67, 68, 71, 72, 131])
def test_a_prefix_is_found_as_far_as_it_goes(shared: int) -> None:
    """Wherever it ends: keys are found some at a time."""
    tested = scheduler(80, chunk=200)
    tested.add(asked(132, 1), 0.0)
    run = Run(tested)
    while tested.busy:
        run.step()
    other = Request((*range(shared), *(500 for _ in range(140 - shared))), SamplingParams(max_new_tokens=1))
    assert tested.found(other) == shared // 4 * 4


def test_keys_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has asked what is there hands the keys on: of a long conversation they take a millisecond."""
    inner = scheduler(20, chunk=18)
    tested, run = Lanes([inner]), Run(inner)
    tested.add(asked(18, 4), 0.0)
    while tested.busy:
        run.step()
    keys: list[bytes] = []
    first = Request((*range(18), *(7, 7, 7)), SamplingParams(max_new_tokens=4))
    assert tested.found(first, keys) == 16 and len(keys) == 5
    monkeypatch.setattr(scheduling, "extend", lambda *_: pytest.fail("a key was found twice"))
    tested.add(first, 0.0, keys=keys)
    assert inner.schedule().pieces == [(inner.running[0], 5)]


def test_a_token_is_computed_though_all_pages_are_there() -> None:
    """Else there would be no logits to choose the next one from."""
    tested = scheduler(20)
    run = Run(tested)
    for wanted in ("0+16", "1+4"):
        tested.add(asked(16, 4), 0.0)
        assert lines(run, 5)[0] == wanted and not tested.busy


def test_without_the_key_all_is_computed() -> None:
    tested = scheduler(20, chunk=18, prefix_cache=False)
    for _ in range(2):
        tested.add(asked(18, 4), 0.0)
    assert lines(Run(tested), 2) == ["0+18", "0 1+18"]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4), st.integers(6, 30), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.integers(0, 2**32)
)
def test_all_come_to_their_end(size: int, pages: int, chunk: int, batch: int, prefix: bool, seed: int) -> None:
    """Random requests with shared beginnings, some ended from outside, in caches that hold one of them or a few.

    Each has the tokens that it has alone, the oldest is never put back, and afterwards nothing is held.
    """
    choice = random.Random(seed)
    tested = scheduler(pages, size, chunk=chunk, batch=batch, prefix_cache=prefix)
    run, room = Run(tested), pages * size
    requests: dict[int, Request] = {}
    wanted = choice.randint(1, 12)
    for _ in range(4000):
        if len(requests) < wanted and choice.random() < 0.4:
            length = choice.randint(1, room)
            new = choice.randint(1, room - length + 1)
            ids = tuple(choice.choice((0, 1)) if at in (0, 2 * size) else 7 for at in range(length))
            request = Request(ids, SamplingParams(max_new_tokens=new, ignore_eos=True))
            requests[tested.add(request, 0.0).id] = request
        if choice.random() < 0.02 and tested.busy:
            tested.finish(choice.choice([*tested.running, *tested.waiting]), "abort", 0.0)
        live = [*tested.running, *tested.waiting]
        run.step()
        order = [each.id for each in (*tested.running, *tested.waiting)]
        assert order == sorted(order)  # nobody overtakes anybody
        assert {each.handle for each in tested.running} == set(tested.pages.held)
        for sequence in live:
            begin = len(sequence.request.ids)
            for at, token in enumerate(sequence.ids, begin):
                assert token == hash((*sequence.request.ids, *sequence.ids[: at - begin])) % 50
        if len(requests) == wanted and not tested.busy:
            break
    else:
        pytest.fail("some request never ends")
    stocks = tested.pages.stocks
    assert not tested.pages.held and not any(any(stock.users) for stock in stocks)
    assert all(stock.available == pages for stock in stocks)


# Where a step's tokens are bounded


def prompts(*lengths: int) -> list[Sequence]:
    return [Sequence(id, Request((0,) * each, SamplingParams()), 10**6, 0.0) for id, each in enumerate(lengths)]


def shared(most: int, *lengths: int) -> dict[int, int]:
    return {sequence.id: count for sequence, count in shares(prompts(*lengths), most)}


def test_nobody_waits_for_the_whole_of_a_long_prompt() -> None:
    assert shared(100, 16000) == {0: 100}
    assert shared(100, 16000, 20) == {0: 80, 1: 20}
    assert shared(100, 16000, 600) == {0: 75, 1: 25}
    assert shared(100, 16000, 16000, 600) == {0: 62, 1: 25, 2: 13}
    assert shared(100, 16000, *[10] * 9) == {0: 10, **dict.fromkeys(range(1, 10), 10)}
    assert shared(2, 5, 5, 5) == {0: 1, 1: 1}
    assert shared(1, 5, 5) == {0: 1} and shared(7) == {}


def test_all_of_a_step_is_given_and_no_more() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths, most = [rng.randrange(1, 200) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 300)
        found = shared(most, *lengths)
        assert sum(found.values()) == min(most, sum(lengths))
        assert all(0 < count <= lengths[id] for id, count in found.items())


def test_equal_prompts_end_one_after_the_other() -> None:
    """Their first tokens come about when they would with one prompt at a time: 40 of 1000, in steps of 500."""
    waiting, ends, step = prompts(*[1000] * 40), [], 0
    while waiting:
        step += 1
        for sequence, count in shares(waiting, 500):
            sequence.cached += count
        ends += [step for sequence in waiting if not sequence.pending]
        waiting = [sequence for sequence in waiting if sequence.pending]
    assert step == 80 and sum(ends) / 40 < 1.1 * sum(range(2, 81, 2)) / 40


def test_the_lower_priority_goes_first_and_equal_ones_by_arrival() -> None:
    """Of those that wait, and of the prompts of a step whose tokens are bounded."""
    tested = scheduler(100, chunk=50, batch=7)
    for number, priority in enumerate((5, 0, 5, -1, 0, 7)):
        tested.add(Request((number,) * 10, SamplingParams(max_new_tokens=3), priority=priority), 0.0)
    assert [each.id for each in tested.waiting] == [3, 1, 4, 0, 2, 5]
    run = Run(tested)
    assert run.step() == ["3+10", "1+10", "4+10", "0+10", "2+10"]
    tested.add(Request((9,) * 10, SamplingParams(max_new_tokens=3), priority=-2), 0.0)
    tested.step_tokens = 20  # five rows, and fifteen tokens of two prompts
    assert run.step() == ["3", "1", "4", "0", "2", "6+10", "5+5"]


def test_a_bounded_step_has_a_share_for_who_comes_beside_a_long_prompt() -> None:
    """And no more than its bound, rows included; a prompt that waits begins at once."""
    tested = scheduler(200, size=16, chunk=100)
    tested.step_tokens = 20
    tested.add(asked(1000, 3), 0.0)
    run = Run(tested)
    assert run.step() == ["0+20"]
    tested.add(asked(6, 9, first=5000), 0.0)
    assert run.step() == ["0+14", "1+6"]
    assert run.step() == ["1", "0+19"]


def test_a_step_without_rows_may_be_larger() -> None:
    """It holds up nobody's next token."""
    tested = scheduler(400, size=16, chunk=100)
    tested.step_tokens, tested.alone_tokens = 20, 60
    tested.add(asked(130, 4), 0.0)
    run = Run(tested)
    assert [run.step() for _ in range(3)] == [["0+60"], ["0+60"], ["0+10"]]
    tested.add(asked(50, 3, first=5000), 0.0)
    assert [run.step() for _ in range(2)] == [["0", "1+19"], ["0", "1+19"]]


def test_random_bounded_steps_keep_to_their_bound() -> None:
    rng = random.Random(3)
    tested = scheduler(60, chunk=30)
    run, tested.step_tokens = Run(tested), 12
    for number in range(40):
        tested.add(asked(rng.randrange(1, 60), rng.randrange(1, 20), first=1000 * number), 0.0)
    steps = 0
    while tested.busy:
        run.step()
        steps += 1
        tokens = len(run.work.rows) + sum(count for _, count in run.work.pieces)
        assert tokens <= 12 or (len(run.work.rows) >= 12 and tokens == len(run.work.rows) + 1)
        assert steps < 5000


def test_who_was_put_back_begins_though_all_others_go_first() -> None:
    """It stands in front of those that wait, and has no share of a step beside so many of lower numbers."""
    tested = scheduler(200, size=16, chunk=100, batch=12)
    tested.step_tokens = 20
    tested.add(Request((1,) * 100, SamplingParams(max_new_tokens=3, ignore_eos=True), priority=5), 0.0)
    run = Run(tested)
    assert run.step() == ["0+20"]
    for number in range(11):
        tested.add(asked(100, 3, first=1000 * number), 0.0)
    tested._put_back(tested.running[0])
    assert tested._shares()[tested.waiting[0]] == 0
    for _ in range(200):
        run.step()
        assert len(run.work.rows) + sum(count for _, count in run.work.pieces) <= 20
        if not tested.busy:
            break
    assert not tested.busy
