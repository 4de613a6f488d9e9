"""Replicas: calls go where least is to be done; a replica that is lost is not noticed by who asked."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from echo import WITHIN_S, Echo, Heard, answer, asked
from fake_model import EOS, FakeCache, FakeModel
from loading import rank_of

from epmoe.config.schema import Serve
from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, Token
from epmoe.errors import UserError
from epmoe.server.far import Far, Near
from epmoe.server.replicas import Replicas, service_of


class All:
    """Three replicas, the first of them rank 0's own."""

    def __init__(self, bounds: Serve | None = None) -> None:
        self.echoes = [Echo(0), Echo(1), Echo(2)]
        own: Any = self.echoes[0]
        self.front = Replicas(own, bounds or Serve())
        pairs = {replica: socket.socketpair() for replica in (1, 2)}
        self.far = {replica: Far(here, lambda: None) for replica, (here, _) in pairs.items()}
        self.near = {replica: Near(there, lambda: None) for replica, (_, there) in pairs.items()}
        for replica, near in self.near.items():
            near.attach(self.echoes[replica])

    def submit(self, *requests: Request, stop: int = 0) -> list[tuple[Call, Heard]]:
        made = [(Call(each, heard), heard) for each, heard in ((each, Heard(stop)) for each in requests)]
        self.front.submit([call for call, _ in made])
        return made

    def wait(self, *counts: int) -> None:
        """Until each replica has been asked so often."""
        for echo, count in zip(self.echoes, counts, strict=True):
            echo.wait(lambda echo=echo, count=count: len(echo.calls) >= count)
            assert len(echo.calls) == count, [len(each.calls) for each in self.echoes]

    def go(self, tokens: int = 1000) -> None:
        for each in self.echoes:
            each.go(tokens)


@contextmanager
def replicas(bounds: Serve | None = None) -> Iterator[All]:
    made = All(bounds)
    made.front.link(made.far)
    try:
        yield made
    finally:
        for replica in made.far:
            made.far[replica].close()
            made.near[replica].close()


def test_the_least_work_has_it() -> None:
    """Each prompt of a request by itself, the answers to one together; what has ended counts no more."""
    with replicas() as all_:
        made = all_.submit(asked(1, 2, 3), asked(4), asked(4), asked(5, 6))
        all_.wait(1, 2, 1)
        more = all_.submit(asked(7))  # 3, 2, 2 tokens
        all_.wait(1, 3, 1)
        all_.go()
        for call, heard in (*made, *more):
            assert heard.result().ids == answer(call.request)
        assert all_.front._by_replica() == {0: [], 1: [], 2: []}
        all_.submit(asked(9))
        all_.wait(2, 3, 1)


def test_they_run_when_all_do() -> None:
    with replicas() as all_:
        for each in all_.echoes[:2]:
            each.running.set()
        assert not all_.front.is_running(0.3)
        all_.echoes[2].running.set()
        assert all_.front.is_running(WITHIN_S)
    assert not All().front.is_running(0.01)  # nobody has said who the others are


def test_a_full_queue_is_full_for_all_replicas_together() -> None:
    """Two can run at a time in each of the three; what waits beyond is bounded, and refused as a whole."""
    with replicas(Serve(queue_requests=3, queue_tokens=1000)) as all_:
        for first in range(8):
            all_.submit(asked(first))
        with pytest.raises(QueueFull, match=r"2 requests wait already \(serve\.queue_requests=3\)"):
            all_.submit(asked(100), asked(101))
        all_.submit(asked(102))
        all_.wait(3, 3, 3)
    with replicas(Serve(queue_requests=1000, queue_tokens=10)) as all_:
        for first in range(7):
            all_.submit(asked(first, first))
        with pytest.raises(QueueFull, match="prompts of 2 tokens wait already, and this one has 9"):
            all_.submit(asked(*range(100, 109)))


def test_a_full_queue_refuses_nothing_of_a_lost_replica() -> None:
    """It was let in: the bounds are of what comes, and rank 0's own service has none besides."""
    held, model = FakeCache(), FakeModel()
    ranks = replace(rank_of(0, 1), replicas=2)
    engine = Engine(model, held, ranks, EngineConfig(eos_ids=[EOS], max_batch=1))  # type: ignore[arg-type]
    front = service_of(engine, Serve(queue_requests=2))
    assert isinstance(front, Replicas)
    here, there = socket.socketpair()
    with here, there:
        front.link({1: (far := Far(here, lambda: None))})
        made = [(Call(asked(first), heard), heard) for first, heard in enumerate(Heard() for _ in range(4))]
        for call, _ in made:
            front.submit([call])
        assert [len(far.calls), front.own.queued] == [2, 2]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            front.submit([Call(asked(9), Heard())])
        front._lose(frozenset([1]))
        assert front.own.queued == 4 and not any(heard.ends for _, heard in made)


def test_aborts_go_where_the_call_is() -> None:
    with replicas() as all_:
        made = all_.submit(asked(1), asked(2), asked(3))
        all_.wait(1, 1, 1)
        for call, _ in made:
            all_.front.abort(call)
        for echo in all_.echoes:
            echo.wait(lambda echo=echo: echo.aborted)
        all_.go()
        assert not any(heard.ids or heard.ends for _, heard in made)


def test_a_stop_ends_all_of_them() -> None:
    with replicas() as all_:
        made = all_.submit(asked(1), asked(2), asked(3))
        with pytest.raises(UserError, match="3 requests wait or run"):
            all_.front.stop()
        all_.front.stop(Stopped("over"))
        assert {str(heard.error()) for _, heard in made} == {"over"}
        for echo in all_.echoes:
            echo.wait(lambda echo=echo: echo.stopped)
        with pytest.raises(Stopped, match="over"):
            all_.submit(asked(1))


def test_without_calls_they_stop_quietly() -> None:
    with replicas() as all_:
        all_.front.stop()
        for echo in all_.echoes:
            echo.wait(lambda echo=echo: echo.stopped)
            assert echo.stopped == [None]


def test_a_failure_here_is_told_to_all() -> None:
    with replicas() as all_:
        made = all_.submit(asked(1), asked(2), asked(3))
        all_.front.fail(RuntimeError("the device is gone"))
        assert all("the device is gone" in str(heard.error()) for _, heard in made)


@pytest.mark.parametrize("said", [0, 2, 5])
def test_who_asks_does_not_notice_a_lost_replica(said: int) -> None:
    """Whatever was said of an answer: another replica makes it once more, and the rest of it is heard."""
    with replicas() as all_:
        made = all_.submit(*(asked(first, tokens=6) for first in range(6)))
        all_.wait(2, 2, 2)
        all_.go(said)
        for _, heard in made:
            heard.wait(said)
        all_.front.lose([1])
        all_.echoes[0].wait(lambda: len(all_.echoes[0].calls) == 3)
        all_.echoes[2].wait(lambda: len(all_.echoes[2].calls) == 3)
        all_.go()
        for call, heard in made:
            assert heard.result().ids == answer(call.request) == tuple(heard.ids)
        assert [each.replica for each in all_.front.figures()][:1] == [0] and 1 not in all_.front.far
        all_.submit(asked(50), asked(51))
        all_.wait(4, 2, 4)


def test_a_request_that_replicas_do_not_survive_ends_before_all_have_gone() -> None:
    with replicas() as all_:
        _, (poison, heard), _ = all_.submit(*(asked(first) for first in range(3)))
        all_.wait(1, 1, 1)
        all_.submit(asked(7))
        all_.echoes[0].wait(lambda: len(all_.echoes[0].calls) == 2)  # so that the third replica has the least to do
        all_.front.lose([1])
        all_.echoes[2].wait(lambda: len(all_.echoes[2].calls) == 2)
        assert not poison.ended
        all_.front.lose([2])
        error = heard.error()
        assert isinstance(error, Stopped) and "2 replicas were lost while they answered it" in str(error)
        all_.echoes[0].wait(lambda: len(all_.echoes[0].calls) == 3)  # the other one's, which was lost once


def test_an_answer_that_comes_out_otherwise_is_no_answer() -> None:
    """That cannot be; if it is, it is told, and no answer is put together of two."""
    with replicas() as all_:
        _, (_, heard), _ = all_.submit(*(asked(first) for first in range(3)))
        all_.wait(1, 1, 1)
        all_.go(2)
        heard.wait(2)
        all_.front.lose([1, 2])
        all_.echoes[0].wait(lambda: len(all_.echoes[0].calls) == 3)
        with pytest.raises(RuntimeError, match="token 0 was 1, and is 2 now"):
            all_.echoes[0].calls[1].hear(Token(0, 2, None))
        assert heard.ids == [*answer(asked(1))[:2]] and not heard.ends


def test_what_no_other_replica_takes_has_failed() -> None:
    with replicas() as all_:
        made = all_.submit(*(asked(first) for first in range(3)))
        all_.wait(1, 1, 1)
        all_.far[2].halt(Stopped("over"))
        all_.echoes[0].failure = Stopped("over")
        all_.front.lose([1, 2])
        error = made[1][1].error()
        assert isinstance(error, Stopped) and "the replica that answered is lost" in str(error)
