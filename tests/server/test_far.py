"""Far and Near: calls at one end of a connection are those of a service at the other."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from echo import WITHIN_S, Echo, Heard, answer, asked

from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.errors import UserError
from epmoe.server.far import Far, Near
from epmoe.server.frames import Load


@contextmanager
def ends() -> Iterator[tuple[Far, Near, Echo, threading.Event]]:
    """Both ends, the service, and what is set when either says that the connection is gone."""
    here, there = socket.socketpair()
    gone = threading.Event()
    far, near, echo = Far(here, gone.set), Near(there, gone.set), Echo(3)
    try:
        yield far, near, echo, gone
    finally:
        far.close()
        near.close()


def submitted(far: Far, *heard: Heard) -> list[Call]:
    calls = [Call(asked(4, 5, 6), each) for each in heard]
    far.submit(calls)
    return calls


def test_answers_come_as_they_are_and_an_end_by_the_listener_goes_there() -> None:
    with ends() as (far, near, echo, _):
        near.attach(echo)
        whole, cut = Heard(), Heard(stop=2)
        submitted(far, whole, cut)
        echo.wait(lambda: len(echo.calls) == 2)
        assert echo.taken == [asked(4, 5, 6)] * 2
        echo.go(3)
        echo.wait(lambda: echo.aborted)
        assert cut.result().ids == answer(asked(4, 5, 6))[:2] and cut.result().finish_reason == "stop"
        echo.go()
        result = whole.result()
        assert (result.ids, result.finish_reason) == (answer(asked(4, 5, 6)), "length")
        assert tuple(whole.ids) == result.ids and 0 < result.first_token_s <= result.total_s
        assert not far.calls and not near.asker.calls


def test_an_abort_goes_there_and_is_heard_of_no_more() -> None:
    with ends() as (far, near, echo, _):
        near.attach(echo)
        heard, other = Heard(), Heard()
        call, _ = submitted(far, heard, other)
        echo.wait(lambda: len(echo.calls) == 2)
        far.abort([call])
        far.abort([call])
        echo.wait(lambda: echo.aborted)
        echo.go()
        assert other.result() and call.ended and not heard.ids and not heard.ends


def test_it_is_up_when_the_service_runs_and_says_how_things_stand() -> None:
    with ends() as (far, near, echo, _):
        near.attach(echo)
        assert not far.up.wait(0.1)
        echo.running.set()
        assert far.up.wait(WITHIN_S)
        deadline = threading.Event()
        while far.figures is None:
            assert not deadline.wait(0.05)
        assert far.figures.replica == 3


@pytest.mark.parametrize(("error", "kind"), [(QueueFull("many"), QueueFull), (UserError("bad"), UserError)])
def test_a_refusal_comes_to_the_listener(error: UserError, kind: type[Exception]) -> None:
    with ends() as (far, near, echo, _):
        echo.submit = lambda calls: (_ for _ in ()).throw(error)  # type: ignore[method-assign]
        near.attach(echo)
        heard = Heard()
        submitted(far, heard)
        assert type(heard.error()) is kind and str(heard.error()) == str(error)


def test_before_there_is_a_service_it_is_refused() -> None:
    with ends() as (far, *_):
        heard = Heard()
        submitted(far, heard)
        assert isinstance(heard.error(), Stopped)


@pytest.mark.parametrize("text", ["", "the server ends"])
def test_a_halt_stops_the_service_there(text: str) -> None:
    with ends() as (far, near, echo, gone):
        near.attach(echo)
        heard = Heard()
        if text:
            submitted(far, heard)
            echo.wait(lambda: echo.calls)
        far.halt(Stopped(text) if text else None)
        echo.wait(lambda: echo.stopped)
        if text:
            assert str(heard.error()) == text and str(echo.stopped[0]) == text
        else:
            assert echo.stopped == [None]
        assert not gone.is_set()


def test_what_was_said_is_sent_before_the_end() -> None:
    """Whoever closes an AsyncLLM halts the others a moment before the ranks part."""
    for _ in range(20):
        with ends() as (far, near, echo, _):
            near.attach(echo)
            far.halt(Stopped("over"))
            far.end()
            echo.wait(lambda echo=echo: echo.stopped)


def test_a_reader_that_fails_is_told_as_an_end(capfd: pytest.CaptureFixture[str]) -> None:
    with ends() as (_, near, _, gone):
        near.asker.say(Load([]))  # nobody says so: there is nothing in it
        assert gone.wait(WITHIN_S)
    assert "IndexError" in capfd.readouterr().err


@pytest.mark.parametrize("end", ["here", "there"])
def test_the_connections_end_is_told_at_the_other_end(end: str) -> None:
    with ends() as (far, near, _, gone):
        (far if end == "here" else near.asker).socket.shutdown(socket.SHUT_RDWR)
        assert gone.wait(WITHIN_S)


@pytest.mark.parametrize("end", ["here", "there"])
def test_who_parts_says_so(end: str) -> None:
    """Then the end is no surprise, at either end; nor is that of one which is lost."""
    with ends() as (far, near, echo, gone):
        near.attach(echo)
        (far.close if end == "here" else near.close)()
        deadline = time.monotonic() + WITHIN_S
        while not (far.closed and near.closed):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not gone.wait(0.1)
    with ends() as (far, near, _, gone):
        near.closed = True
        far.drop()
        assert not gone.wait(0.1)
