"""The line as the HTTP process has it, with somebody else at the other end."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from epmoe.engine.call import Call, QueueFull, Stopped
from epmoe.engine.request import Request, Result, SamplingParams, TokenLogprobs
from epmoe.errors import UserError
from epmoe.server.frames import (
    Abort,
    Bye,
    Drain,
    Ended,
    Failed,
    Frame,
    Frames,
    FromHttp,
    Hello,
    Idle,
    NewToken,
    Opened,
    Ready,
    Refused,
    Scores,
    Step,
    Submit,
    packed,
)  # fmt: skip
from epmoe.server.line import Line

HELLO = Hello("m", "0", 0, 9, 9, "", {}, {}, "off", None, {}, {}, 9, 9, 9, 9, 1.0, 1.0, "", "", 9)
REQUEST = Request((1, 2), SamplingParams(max_new_tokens=4))


class Heard:
    """A listener that keeps what it hears, and finds a stop string at so many tokens."""

    def __init__(self, stop: int = 0, broken: bool = False) -> None:
        self.stop, self.broken = stop, broken
        self.ids: list[int] = []
        self.ends: list[Result | BaseException] = []

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        assert not self.broken, "the listener's own fault"
        self.ids.append(token)
        return len(self.ids) == self.stop

    def finish(self, result: Result) -> None:
        self.ends.append(result)

    def fail(self, error: BaseException) -> None:
        self.ends.append(error)


def with_line(body: Callable[[Line, Callable[..., None], socket.socket], Coroutine[Any, Any, None]]) -> list[Frame]:
    """Run `body(line, say, rank 0's socket)`; what the line has said after it was open."""
    here, there = socket.socketpair()
    said: list[Frame] = []

    def read() -> None:
        frames = Frames(FromHttp)
        while piece := there.recv(1 << 16):
            said.extend(frames.feed(piece))

    async def run() -> None:
        line = Line(here, lambda: None)
        there.sendall(packed(HELLO) + packed(Ready("f", 9)))
        assert await line.greet() == HELLO
        listening = asyncio.ensure_future(line.listen())
        await asyncio.sleep(0.01)

        def say(*frames: Frame) -> None:
            there.sendall(b"".join(map(packed, frames)))

        await body(line, say, there)
        say(Bye())
        await asyncio.wait_for(listening, 60)
        line.writer.close()

    reader = threading.Thread(target=read)
    reader.start()
    asyncio.run(run())
    reader.join(60)
    there.close()
    assert said[0] == Opened()
    return said[1:]


def test_tokens_ends_and_stop_strings() -> None:
    whole, stopped, broken = Heard(), Heard(stop=2), Heard(broken=True)

    async def body(line: Line, say: Callable[..., None], there: socket.socket) -> None:
        calls = [Call(REQUEST, each) for each in (whole, stopped, broken)]
        line.submit([(REQUEST, calls)])
        for token in (5, 6, 7):
            say(Step([NewToken(each.id, token, None) for each in calls], [], []))
        say(Step([], [Ended(each.id, "length", (8,), (), 2) for each in calls], []))
        await asyncio.sleep(0.1)
        assert not line.calls

    said = with_line(body)
    (result,), (cut,), (error,) = whole.ends, stopped.ends, broken.ends
    assert isinstance(result, Result) and (result.ids, result.finish_reason, result.cached_tokens) == (
        (5, 6, 7, 8), "length", 2,
    )  # fmt: skip
    assert isinstance(cut, Result) and (cut.ids, cut.finish_reason) == ((5, 6), "stop") and stopped.ids == [5, 6]
    assert isinstance(error, AssertionError)
    assert isinstance(said[0], Submit) and [each for each in said if isinstance(each, Abort)] == [
        Abort([2]),
        Abort([1]),
    ]


def test_scores_of_a_prompt() -> None:
    """They come before the first token, or the end; of calls that have gone nothing is kept."""
    one, two = TokenLogprobs(-0.5, ((3, -0.5),)), TokenLogprobs(-1.5, ())
    heard = [Heard() for _ in range(4)]

    async def body(line: Line, say: Callable[..., None], there: socket.socket) -> None:
        calls = [Call(REQUEST, each) for each in heard]
        line.submit([(REQUEST, calls)])
        for call in calls:
            say(Scores(call.id, 2, [None, one]), Scores(call.id, 1, [two]))
        await asyncio.sleep(0.1)
        line.abort([calls[2]])
        say(Step([NewToken(calls[0].id, 5, None)], [], []))
        say(Step([], [Ended(each.id, "length", (), (), 0) for each in calls[:2]], []))
        say(Scores(calls[2].id, 1, [two]), Step([], [], [Failed(calls[3].id, "it failed")]))
        await asyncio.sleep(0.1)
        assert not line.calls and not line.scores
        assert all(tuple(each.prompt_logprobs) == (None, one, two) for each in calls[:2])

    with_line(body)
    for each in heard[:2]:
        (result,) = each.ends
        assert isinstance(result, Result) and tuple(result.prompt_logprobs) == (None, one, two)


def test_refusals_and_failures() -> None:
    kinds = {"mistake": UserError, "full": QueueFull, "stopped": Stopped}
    heard = {kind: Heard() for kind in kinds}
    failed = Heard()

    async def body(line: Line, say: Callable[..., None], there: socket.socket) -> None:
        for kind, each in heard.items():
            calls = [Call(REQUEST, each)]
            line.submit([(REQUEST, calls)])
            say(Refused([calls[0].id], kind, f"because of {kind}"))
        calls = [Call(REQUEST, failed)]
        line.submit([(REQUEST, calls)])
        say(Step([], [], [Failed(calls[0].id, "it failed")]))
        await asyncio.sleep(0.1)

    with_line(body)
    for kind, each in heard.items():
        (end,) = each.ends
        assert type(end) is kinds[kind] and kind in str(end)
    assert isinstance(failed.ends[0], Stopped) and "it failed" in str(failed.ends[0])


@pytest.mark.parametrize("how", ["closed", "damaged"])
def test_rank_0_goes_and_all_calls_hear_of_it(how: str) -> None:
    heard = Heard()
    ended = []

    async def run() -> None:
        here, there = socket.socketpair()
        line = Line(here, lambda: ended.append(True))
        there.sendall(packed(HELLO) + packed(Ready("f", 9)))
        await line.greet()
        listening = asyncio.ensure_future(line.listen())
        await asyncio.sleep(0.01)
        line.submit([(REQUEST, [Call(REQUEST, heard)])])
        if how == "damaged":
            there.sendall(b"\xff" * 8)
        else:
            there.close()
        await asyncio.wait_for(listening, 60)
        with pytest.raises(Stopped):
            line.submit([(REQUEST, [Call(REQUEST, Heard())])])
        there.close()

    asyncio.run(run())
    assert isinstance(heard.ends[0], Stopped) and len(heard.ends) == 1 and ended == [True]


def test_idle_is_said_once_all_are_answered() -> None:
    async def body(line: Line, say: Callable[..., None], there: socket.socket) -> None:
        line.begin()
        say(Drain())
        await asyncio.sleep(0.05)
        line.finish()
        await asyncio.sleep(0.05)

    assert with_line(body) == [Idle()]
