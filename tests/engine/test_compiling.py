"""Grammars beside the steps: nobody waits for another's compiler, all ranks keep the same ones, refusals are told."""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from fake_model import EOS, FakeCache, FakeModel, expected
from fake_words import text, vocabulary
from llguidance import LLMatcher
from loading import rank_of
from spawn import run_ranks

from epmoe.config.schema import Serve
from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.compiling import Compiling, Waiting
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.matcher import Grammars
from epmoe.engine.request import Request, Result, SamplingParams, TokenLogprobs
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.ranks.control import Control
from epmoe.ranks.mesh import Ranks

WITHIN_S = 60
LONG = SamplingParams(max_new_tokens=300, ignore_eos=True)
WRONG = 'start: "\u00e9"'  # no id spells it


def bound(pattern: str, tokens: int = 30) -> Request:
    return Request((3, 4, 5), SamplingParams(max_new_tokens=tokens, grammar=f"start: /{pattern}/"))


class Heard:
    def __init__(self) -> None:
        self.begun = threading.Event()
        self.ends: list[Result | BaseException] = []
        self.ended = threading.Event()

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.begun.set()
        return False

    def finish(self, result: Result) -> None:
        self.fail(result)

    def fail(self, error: Any) -> None:
        self.ends.append(error)
        self.ended.set()

    def end(self) -> Any:
        assert self.ended.wait(WITHIN_S)
        (found,) = self.ends
        return found


class Served:
    """A service whose loop runs in a thread; its ranks keep `most` grammars."""

    def __init__(self, ranks: Ranks, most: int = 3, **serve: Any) -> None:
        self.model = FakeModel()
        model: Any = self.model
        cache: Any = FakeCache()
        config = EngineConfig(eos_ids=[EOS], max_batch=6, vocabulary=vocabulary)
        self.ranks, self.engine = ranks, Engine(model, cache, ranks, config)
        self.service, self.control = Service(self.engine, Serve(**serve)), Control(ranks, 20)
        self.service.compiling.most = most
        self.most_held = 0
        self.begin()

    def begin(self) -> None:
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        turn = self.service._turn

        def watched(control: Control) -> bool:
            goes_on = turn(control)
            self.most_held = max(self.most_held, len(self.engine.grammars.held))
            return goes_on

        with mock.patch.object(self.service, "_turn", watched):
            self.service.run(self.control)

    def submit(self, request: Request) -> tuple[Call, Heard]:
        heard = Heard()
        self.service.submit([call := Call(request, heard)])
        return call, heard


@contextmanager
def serving(ranks: Ranks, most: int = 3, **serve: Any) -> Iterator[Served]:
    """On rank 0 until the block's end; on others until rank 0's."""
    served = Served(ranks, most, **serve)
    assert served.service.running.wait(WITHIN_S)
    yield served
    if ranks.is_main:
        served.service.stop(Stopped("over"))
    served.thread.join(WITHIN_S)
    assert not served.thread.is_alive() and not served.engine.grammars.held


@contextmanager
def slow(waits: Callable[[], object]) -> Iterator[None]:
    """Compilers that wait so, as those of a large schema take long."""
    real = Grammars._compile

    def compile(self: Grammars, grammar: str) -> LLMatcher:
        waits()
        return real(self, grammar)

    with mock.patch.object(Grammars, "_compile", compile):
        yield


STEPS = 50


def beside(mine: Ranks, victim: int) -> list[int]:
    """The steps that this rank makes while its compiler is at work: which waits for STEPS of them, or in vain."""
    made: list[int] = []

    def waits() -> None:
        if mine.rank == victim:
            steps, until = served.model.steps, time.monotonic() + WITHIN_S / 2
            begin = len(steps)
            while len(steps) < begin + STEPS and time.monotonic() < until:
                time.sleep(0.001)
            made.append(len(steps) - begin)

    with slow(waits), serving(mine) as served:
        if not mine.is_main:
            return made
        others = [served.submit(Request((1,), LONG))[1]]
        assert others[0].begun.wait(WITHIN_S)
        _, heard = served.submit(bound("[a-f]{9}"))
        while not heard.ended.is_set():  # one after the other, until it has come
            others.append(served.submit(Request((len(others),), LONG))[1])
            assert others[-1].end().ids == expected(Request((len(others) - 1,), LONG))[0]
        result = heard.end()
        assert result.finish_reason == "eos" and re.fullmatch("[a-f]{9}", text(result.ids))
        return made


@pytest.mark.parametrize(
    ("size", "victim"), [*(pytest.param(size, 0, marks=pytest.mark.slow) for size in (1, 2)), (2, 1)]
)
def test_no_step_of_any_rank_waits_for_a_compiler(size: int, victim: int) -> None:
    (made,) = run_ranks(beside, size, victim, timeout=120)[victim]
    assert made >= STEPS


def refused(mine: Ranks) -> list[str]:
    with serving(mine) as served:
        if not mine.is_main:
            return []
        free = served.submit(Request((1,), LONG))[1]
        said = []
        for _ in range(2):  # a refusal is not remembered
            calls = [Call(Request((3,), SamplingParams(grammar=grammar)), Heard()) for grammar in ("start: /a/", WRONG)]
            served.service.submit(calls)
            error = calls[1].listener.end()  # type: ignore[attr-defined]
            assert isinstance(error, UserError) and calls[1].ended
            said.append(str(error))
            assert calls[0].listener.end().finish_reason == "eos"  # type: ignore[attr-defined]
        assert free.end().ids == expected(Request((1,), LONG))[0]
        assert served.service.queued == served.service.queued_tokens == 0
        return said


@pytest.mark.parametrize("size", [1, 2])
def test_a_refusal_is_that_calls_own(size: int) -> None:
    said = run_ranks(refused, size)[0]
    assert len(said) == 2 and all(re.match(r"prompt 2: the grammar is refused \(", each) for each in said)


PATTERNS = [f"[a-{last}]{{{count}}}" for last in "bcdef" for count in (3, 7)]


def storm(mine: Ranks, seed: int) -> tuple[int, int]:
    """More grammars than are kept, from several threads, with aborts and refusals: answers, most held at a time."""
    with serving(mine, most=3) as served:
        done: list[int] = []
        if mine.is_main:
            threads = [threading.Thread(target=caller, args=(served, f"{seed} {n}", done)) for n in range(6)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            assert served.service.queued == 0
        else:
            served.thread.join()
    return len(done), served.most_held


def caller(served: Served, seed: str, done: list[int]) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        pattern = rng.choice(PATTERNS)
        wrong = rng.random() < 0.1
        request = Request((3,), SamplingParams(grammar=WRONG)) if wrong else bound(pattern)
        call, heard = served.submit(request)
        if rng.random() < 0.3:
            heard.ended.wait(rng.uniform(0, 0.02))
            served.service.abort(call)
            continue
        result = heard.end()
        assert isinstance(result, UserError) if wrong else re.fullmatch(pattern, text(result.ids)), result
        done.append(1)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_all_ranks_keep_the_same_few(size: int) -> None:
    found = run_ranks(storm, size, size, timeout=120)
    assert found[0][0] > 60
    assert {most for _, most in found} == {3}


def test_those_that_wait_are_bounded_and_may_leave() -> None:
    go = threading.Event()
    with slow(lambda: go.wait(WITHIN_S)), serving(rank_of(0, 1), queue_requests=2, queue_tokens=100) as served:
        _, heard = served.submit(bound("a{3}"))
        second, _ = served.submit(bound("b{3}"))
        with pytest.raises(QueueFull, match="2 requests wait already"):
            served.submit(bound("c{3}"))
        assert (served.service.queued, served.service.queued_tokens) == (2, 6)
        served.service.abort(second)
        assert (served.service.queued, served.service.queued_tokens) == (1, 3)
        go.set()
        assert text(heard.end().ids) == "aaa"
        go.clear()
        _, lost = served.submit(bound("d{3}"))
    go.set()
    assert isinstance(lost.end(), Stopped)


def test_after_a_pause_they_are_compiled_anew() -> None:
    """Calls that came meanwhile, also those whose grammar was known before."""
    with serving(rank_of(0, 1)) as served:
        assert text(served.submit(bound("a{3}"))[1].end().ids) == "aaa"
        served.service.stop()
        heard = [served.submit(bound(pattern))[1] for pattern in ("a{3}", "b{3}", "a{3}")]
        served.thread.join(WITHIN_S)
        assert not served.engine.grammars.held and not any(each.ended.is_set() for each in heard)
        served.begin()
        assert [text(each.end().ids) for each in heard] == ["aaa", "bbb", "aaa"]


def test_orders_and_reports() -> None:
    """Of two ranks that keep two grammars."""
    made = Compiling(2, most=2)
    asked: list[Waiting] = []

    def ask(grammar: str) -> bool:
        request = Request((1,), SamplingParams(grammar=grammar))
        asked.append(Waiting(Call(request, Heard()), len(asked), 1))
        return made.add(asked[-1])

    def news() -> bool:
        return made.news

    assert made.orders(set) == {} and not news()
    assert all(map(ask, "abca")) and news()
    ((b, _), (c, _)) = made.orders(set)["compile"]  # those that were asked for last come last
    assert [made.known[name].number for name in "bca"] == [b, c, -1] and not news()  # no room, so nothing to do
    assert made.report(b, "") == ([], [])  # of one rank
    assert made.report(b, "") == ([asked[1]], []) and not ask("b")
    assert news() and made.orders(lambda: {"b"}) == {}  # the engine does not have it yet
    orders = made.orders(set)
    ((a, _),) = orders["compile"]
    assert orders == {"drop": ["b"], "compile": [[a, "a"]]}
    assert made.report(b, "") == ([], [])  # too late
    assert made.report(c, "no") == ([], [asked[2]]) and made.report(c, "no") == ([], [])
    assert made.remove(asked[0].call) and not made.remove(asked[0].call)
    assert [made.report(a, "") for _ in range(2)] == [([], []), ([asked[3]], [])]
    assert made.orders(set) == {"drop": ["c"]} and list(made.known) == ["a"]
    made.restart()
    assert ask("a") and list(made.calls()) == [asked[-1].call]
    assert made.remove(asked[-1].call) and made.orders(set) == {} and not made.known  # nobody wants it
