"""The service on a fake model: many callers, one loop; every answer is the one that it is alone, on any ranks."""

import random
import threading
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any
from unittest import mock

import pytest
from fake_model import EOS, VOCAB, FakeCache, FakeModel, expected, logits_of, some_requests
from loading import rank_of
from spawn import run_ranks

from epmoe.config.schema import Serve
from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.compiling import Waiting
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import Finished, Request, Result, SamplingParams, TokenLogprobs
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.ranks.control import Control
from epmoe.ranks.mesh import Ranks

WITHIN_S = 60


class Heard:
    """A listener that keeps what it hears. `stop` ends the answer at so many tokens, `broken` fails there."""

    def __init__(self, stop: int = 0, broken: int = 0, then: Callable[[], None] = lambda: None) -> None:
        self.stop, self.broken, self.then = stop, broken, then
        self.ids: list[int] = []
        self.ends: list[Result | BaseException] = []
        self.ended = threading.Event()

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.ids.append(token)
        self.then()
        assert len(self.ids) != self.broken, "the listener's own fault"
        return len(self.ids) == self.stop

    def finish(self, result: Result) -> None:
        self.end(result)

    def fail(self, error: BaseException) -> None:
        self.end(error)

    def end(self, how: Result | BaseException) -> None:
        self.ends.append(how)
        self.ended.set()

    def outcome(self) -> tuple[tuple[int, ...], str]:
        assert self.ended.wait(WITHIN_S)
        (result,) = self.ends
        assert isinstance(result, Result), result
        return result.ids, result.finish_reason


class Served:
    """A service whose loop runs in a thread of its own, as the context says."""

    def __init__(self, ranks: Ranks | None = None, tokens: int = 10_000, serve: Serve | None = None, **limits: Any):
        held: Any = FakeCache(tokens=tokens)
        self.model = FakeModel()
        model: Any = self.model
        self.ranks = ranks or rank_of(0, 1)
        engine = Engine(model, held, self.ranks, EngineConfig(eos_ids=[EOS], **limits))
        self.engine, self.service = engine, Service(engine, serve or Serve())
        self.control, self.go = Control(self.ranks, 20), threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        try:
            self.service.run(self.control)
        except Exception as error:
            self.service.fail(error)

    def __enter__(self) -> "Served":
        self.thread.start()
        assert self.service.running.wait(WITHIN_S)
        return self

    def __exit__(self, *_: Any) -> None:
        self.go.set()
        if self.ranks.is_main:
            self.service.stop(Stopped("over"))
        self.thread.join(WITHIN_S)
        assert not self.thread.is_alive() and not self.engine.busy
        assert self.engine.cache.pages.unused

    def submit(self, request: Request, heard: Heard | None = None) -> tuple[Call, Heard]:
        heard = heard or Heard()
        call = Call(request, heard)
        self.service.submit([call])
        return call, heard

    def hold(self) -> threading.Event:
        """Once this is set no step begins until `go` is, or the block ends: what runs then still runs."""
        begun, step = threading.Event(), self.engine.step

        def waits() -> Any:
            assert not begun.is_set() or self.go.wait(WITHIN_S)
            return step()

        self.engine.step = waits  # type: ignore[method-assign]
        return begun


def test_answers_are_those_of_each_request_alone() -> None:
    requests = some_requests(60)
    with Served(max_batch=7) as served:
        heard = [served.submit(request)[1] for request in requests]
        assert [each.outcome() for each in heard] == [expected(each) for each in requests]
    for request, each in zip(requests, heard, strict=True):
        ids, reason = expected(request)
        assert tuple(each.ids) == (ids if reason == "length" else ids[:-1])
        (result,) = each.ends
        assert isinstance(result, Result) and 0 < result.first_token_s <= result.total_s


def test_an_end_by_the_listener_cuts_what_came_after() -> None:
    request = Request((3, 4), SamplingParams(max_new_tokens=20, ignore_eos=True, logprobs=1))
    ids, _ = expected(request)
    with Served() as served:
        for count in (1, 2, 19, 20):
            _, heard = served.submit(request, Heard(stop=count))
            assert heard.outcome() == (ids[:count], "stop") and heard.ids == list(ids[:count])
            assert isinstance(heard.ends[0], Result) and len(heard.ends[0].logprobs) == count


def test_an_answer_that_its_listener_ends_knows_what_the_cache_had() -> None:
    request = Request(tuple(range(3, 40)), SamplingParams(max_new_tokens=20, ignore_eos=True))
    with Served() as served:
        for cached in (0, 36):  # whole pages of all but the last token
            _, heard = served.submit(request, Heard(stop=3))
            heard.outcome()
            assert isinstance(heard.ends[0], Result) and heard.ends[0].cached_tokens == cached


def test_a_prompts_log_probabilities_come_with_the_first_token() -> None:
    """Also where the listener ends the answer, there or later, and where no token is asked for."""
    ids, _ = expected(Request((3, 4, 5), SamplingParams(max_new_tokens=9, ignore_eos=True)))
    with Served() as served:
        for stop, new in ((0, 9), (1, 9), (3, 9), (0, 0)):
            params = SamplingParams(max_new_tokens=new, ignore_eos=True, prompt_logprobs=1)
            _, heard = served.submit(Request((3, 4, 5), params), Heard(stop=stop))
            assert heard.outcome() == (ids[: stop or new], "stop" if stop else "length")
            (result,) = heard.ends
            assert isinstance(result, Result) and result.prompt_logprobs[0] is None
            for place in (1, 2):
                raw = logits_of([3, 4, 5][:place]).double().log_softmax(0)
                one = result.prompt_logprobs[place]
                assert one is not None and one.chosen == pytest.approx(raw[3 + place].item(), abs=1e-9)
                assert one.top[0][0] == int(raw.argmax()) and len(one.top) == 1


def test_a_requests_fault_is_its_own() -> None:
    """A listener that fails, logits that are none, a request that cannot be: all others go on."""
    good = some_requests(10, seed=5)
    bad = Request((7, 95, 7), SamplingParams(max_new_tokens=20))

    def logits(tokens: list[int]) -> Any:
        return logits_of(tokens) * (float("nan") if tokens[:3] == [7, 95, 7] and len(tokens) > 5 else 1)

    with mock.patch("fake_model.logits_of", logits), Served(max_batch=20) as served:
        heard = [served.submit(each)[1] for each in good]
        _, broken = served.submit(Request((1,), SamplingParams(max_new_tokens=20, ignore_eos=True)), Heard(broken=2))
        _, not_finite = served.submit(bad)
        for wrong, says in ((), "is empty"), ((VOCAB,), "vocab_size"), ((1,) * 400, "has 400 tokens"):
            with pytest.raises(UserError, match=says):
                served.submit(Request(tuple(wrong), SamplingParams()))
        assert [each.outcome() for each in heard] == [expected(each) for each in good]
        assert broken.ended.wait(WITHIN_S) and isinstance(broken.ends[0], AssertionError) and len(broken.ids) == 2
        assert not_finite.outcome() == (expected(bad)[0][:3], "error")
        _, after = served.submit(good[0])
        assert after.outcome() == expected(good[0]) and not served.engine.failed


LONG = SamplingParams(max_new_tokens=300, ignore_eos=True)


def test_an_abort_frees_what_it_has_wherever_it_is() -> None:
    with Served(max_batch=2) as served:
        begun = served.hold()
        first, heard = served.submit(Request((1,), LONG), Heard(then=begun.set))
        second, _ = served.submit(Request((2,), LONG))
        third, _ = served.submit(Request((3,), LONG))
        last, after = served.submit(Request((4,), SamplingParams(max_new_tokens=3)))
        assert begun.wait(WITHIN_S)
        for call in (third, first, second, first):  # waiting, running, running or about to, ended
            served.service.abort(call)
        count = len(heard.ids)
        served.go.set()
        assert after.outcome() == expected(last.request)
        assert heard.ends == [] and len(heard.ids) == count and not served.service.queue


def test_the_queue_is_bounded() -> None:
    with Served(max_batch=1, serve=Serve(queue_requests=3, queue_tokens=40)) as served:
        begun = served.hold()
        served.submit(Request((1,), LONG), Heard(then=begun.set))
        assert begun.wait(WITHIN_S)
        calls = [served.submit(Request((2,) * 10, LONG))[0] for _ in range(2)]
        with pytest.raises(QueueFull, match=r"20 tokens wait already.*serve.queue_tokens=40"):
            served.submit(Request((2,) * 21, LONG))
        with pytest.raises(QueueFull, match=r"2 requests wait already \(serve.queue_requests=3\)"):
            served.service.submit([Call(Request((2,), LONG), Heard()) for _ in range(2)])
        served.submit(Request((2,) * 20, LONG))
        with pytest.raises(QueueFull):
            served.submit(Request((2,), LONG))
        served.service.abort(calls[0])
        served.submit(Request((2,) * 10, LONG))
        assert served.service.queued_tokens == 40


def test_an_empty_queue_takes_what_is_larger_than_it() -> None:
    with Served(serve=Serve(queue_requests=1, queue_tokens=1)) as served:
        requests = some_requests(5)
        heard = [Heard() for _ in requests]
        served.service.submit([Call(*each) for each in zip(requests, heard, strict=True)])
        assert [each.outcome() for each in heard] == [expected(each) for each in requests]


def test_who_waits_goes_by_priority_then_by_arrival() -> None:
    """Where there is one place; nobody leaves it for a later one of a lower number."""
    order: list[int] = []
    heard: list[Heard] = []
    hundred = SamplingParams(max_new_tokens=100, ignore_eos=True)
    with Served(max_batch=1) as served:
        first = Heard()

        def others_come() -> None:
            order.append(-1)
            for priority in {10: [5, 0], 20: [5, -1, 0]}.get(len(first.ids), []):
                heard.append(Heard(then=partial(order.append, len(heard))))
                served.submit(Request((2,), hundred, priority=priority), heard[-1])

        first.then = others_come
        served.submit(Request((1,), hundred, priority=99), first)
        assert first.outcome()[1] == "length"
        assert [each.outcome()[1] for each in heard] == ["length"] * 5
    assert [number for number, _ in groupby(order)] == [-1, 3, 1, 4, 0, 2]


def test_no_step_has_more_tokens_than_it_may() -> None:
    """A long prompt is fed beside the others, whose answers go on, and which need not wait for its end."""
    first = Request((7, 8, 9), SamplingParams(max_new_tokens=390, ignore_eos=True))
    long, shorts = Request((5,) * 390, SamplingParams(max_new_tokens=2)), some_requests(12, seed=9)
    with Served(max_batch=8, serve=Serve(step_tokens=16)) as served:
        began = served.hold()
        heard = [served.submit(first, Heard(then=began.set))[1]]
        assert began.wait(WITHIN_S)  # where no answer grows, a step may be larger
        heard += [served.submit(each)[1] for each in (long, *shorts)]
        served.go.set()
        assert [each.outcome() for each in heard] == [expected(each) for each in (first, long, *shorts)]
        steps = [step for step in served.model.steps if len(step.sequence_B)]
        assert max(len(step.token_T) for step in steps) == 16
    assert served.engine.scheduler.lanes[0].step_tokens == 0  # for what comes then
    first_s = [each.ends[0].first_token_s for each in heard[1:]]  # type: ignore[union-attr]
    assert all(each < first_s[0] for each in first_s[1:])


def test_a_pause_waits_for_nobody_and_goes_on() -> None:
    with Served() as served:
        request = some_requests(1)[0]
        with served.service.turn:
            call, _ = served.submit(Request((1,), LONG))
            with pytest.raises(UserError, match="1 requests wait or run"):
                served.service.stop()
        served.service.abort(call)
        for _ in range(3):
            served.service.stop()
            _, heard = served.submit(request)  # it waits until the loop goes on
            served.thread.join(WITHIN_S)
            assert not served.thread.is_alive() and not heard.ended.is_set()
            served.thread = threading.Thread(target=served.run, daemon=True)
            served.thread.start()
            assert heard.outcome() == expected(request)


def test_a_failure_of_the_engine_is_told_to_all() -> None:
    def broken(tokens: list[int]) -> Any:
        if len(tokens) > 10:
            raise RuntimeError("the device is gone")
        return logits_of(tokens)

    with mock.patch("fake_model.logits_of", broken), Served(max_batch=2) as served:
        heard = [served.submit(Request((number,), LONG))[1] for number in range(5)]
        for each in heard:
            assert each.ended.wait(WITHIN_S) and len(each.ends) == 1
            assert isinstance(each.ends[0], Stopped) and "RuntimeError: the device is gone" in str(each.ends[0])
        with pytest.raises(Stopped, match="the device is gone"):
            served.submit(Request((1,), LONG))


def storm(ranks: Ranks, seed: int, count: int) -> int:
    """Requests at random times from several threads, with aborts, stops, priorities and shared prefixes."""
    with Served(ranks, tokens=700, serve=Serve(step_tokens=48), max_batch=9) as served:
        if ranks.is_main:
            return sum(each_of_them(served, seed, count))
        served.thread.join()
    return 0


def each_of_them(served: Served, seed: int, count: int) -> list[int]:
    done: list[int] = []
    failures: list[BaseException] = []

    def caller(number: int) -> None:
        try:
            done.append(sum(one(served, random.Random(f"{seed} {number} {i}")) for i in range(count // 8)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failures:
        raise failures[0]
    return done


def one(served: Served, rng: random.Random) -> bool:
    prefix = tuple(range(rng.choice([0, 8, 30, 60])))
    ids = (*prefix, *(rng.randrange(VOCAB - 1) for _ in range(rng.choice([1, 3, 20]))))
    params = SamplingParams(max_new_tokens=rng.choice([1, 5, 30]), ignore_eos=rng.random() < 0.3)
    request = Request(ids, params, priority=rng.choice([0, 0, -1, 3]))
    cut = rng.choice([0, 0, 3])
    call, heard = served.submit(request, Heard(stop=cut))
    if rng.random() < 0.25:
        heard.ended.wait(rng.uniform(0, 0.05))
        served.service.abort(call)
        assert len(heard.ends) <= 1
        return False
    wanted, reason = expected(request)
    fed = len(wanted) - (reason == "eos")
    assert heard.outcome() == ((wanted[:cut], "stop") if 0 < cut <= fed else (wanted, reason))
    return True


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_requests_at_random_times(size: int) -> None:
    found = run_ranks(storm, size, size, 240, timeout=120)
    assert found[0] > 120 and found[1:] == [0] * (size - 1)


def engine_of_requests_of_its_own(ranks: Ranks, **limits: Any) -> Engine:
    model: Any = FakeModel(meets=ranks)
    cache: Any = FakeCache(tokens=400)
    return Engine(model, cache, ranks, EngineConfig(eos_ids=[EOS], attention="data", **limits))


def prompt(first: int, length: int, new: int) -> Request:
    return Request(tuple(range(first, first + length)), SamplingParams(max_new_tokens=new, ignore_eos=True))


def figures(ranks: Ranks) -> tuple[int, int, int]:
    """Who runs, and the pages of all caches and those that are free, with a prompt of 50 tokens on the last rank."""
    tested = engine_of_requests_of_its_own(ranks)
    for length in (10, 10, 50):
        tested.add(prompt(0, length, 9))
    tested.step()
    (found,) = Service(tested, Serve()).figures()
    tested.clear()
    return found.running, found.pages, found.pages_free


def test_figures_count_the_caches_of_all_ranks() -> None:
    assert run_ranks(figures, 3) == [(3, 300, 300 - 2 * 3 - 13)] * 3


def released(ranks: Ranks) -> tuple[list[tuple[int, int]], int]:
    """Who runs and who waits on each rank, and how many more come of the queue, when one has nothing to do any more."""
    tested = engine_of_requests_of_its_own(ranks, max_batch=2)
    service = Service(tested, Serve())
    for number in range(4):  # as much to compute, in a step or in 40
        for request in (prompt(number, 41, 1), prompt(number + 50, 2, 40)):
            id = tested.add(request)
            service.released[id] = Call(request, Heard(), id=id)
    while tested.scheduler.lanes[0].busy:
        for event in tested.step():
            if isinstance(event, Finished):
                del service.released[event.id]
    for number in range(5):
        service._push(Waiting(Call(prompt(number, 3, 3), Heard()), number, 1))
    assert tested.scheduler.before is None
    busy = [(len(lane.running), len(lane.waiting)) for lane in tested.scheduler.lanes]
    found = busy, len(service._release())
    tested.clear()
    return found


def test_a_rank_that_runs_dry_gets_requests_while_others_wait_elsewhere() -> None:
    """Those that went before others, by their priority, may all be on one rank."""
    assert run_ranks(released, 2) == [([(0, 0), (2, 2)], 2)] * 2
