"""A service without a model, whose answers follow from their prompts; it makes as many tokens as a test lets it."""

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from epmoe.engine.call import Call, Stopped
from epmoe.engine.figures import Figures
from epmoe.engine.request import Finished, Request, Result, SamplingParams, Token, TokenLogprobs

WITHIN_S = 60


def answer(request: Request) -> tuple[int, ...]:
    count = request.params.max_new_tokens
    assert count is not None
    return tuple((sum(request.ids) + 7 * number) % 1000 for number in range(count))


def asked(*ids: int, tokens: int = 5) -> Request:
    return Request(ids, SamplingParams(max_new_tokens=tokens, seed=3))


class Heard:
    """A listener that keeps what it hears, and finds a stop string at so many tokens."""

    def __init__(self, stop: int = 0) -> None:
        self.stop = stop
        self.ids: list[int] = []
        self.ends: list[Result | BaseException] = []
        self.ended = threading.Event()

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.ids.append(token)
        return len(self.ids) == self.stop

    def finish(self, result: Result) -> None:
        self.ends.append(result)
        self.ended.set()

    def fail(self, error: BaseException) -> None:
        self.ends.append(error)
        self.ended.set()

    def wait(self, count: int) -> None:
        """Until so many tokens have come."""
        deadline = time.monotonic() + WITHIN_S
        while len(self.ids) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def result(self) -> Result:
        assert self.ended.wait(WITHIN_S)
        (found,) = self.ends
        assert isinstance(found, Result), found
        return found

    def error(self) -> BaseException:
        assert self.ended.wait(WITHIN_S)
        (found,) = self.ends
        assert isinstance(found, BaseException), found
        return found


class Echo:
    """A `Service` as far as callers see it. `go` gives each call some tokens."""

    def __init__(self, replica: int = 0) -> None:
        self.replica, self.step_tokens = replica, 9
        scheduler, cache = SimpleNamespace(lanes=[None]), SimpleNamespace(pages=SimpleNamespace(size=4))
        self.engine: Any = SimpleNamespace(max_batch=2, scheduler=scheduler, cache=cache)
        self.lock = threading.RLock()
        self.calls: list[Call] = []
        self.made: dict[Call, int] = {}
        self.taken: list[Request] = []
        self.aborted: list[Call] = []
        self.failure: BaseException | None = None
        self.stopped: list[BaseException | None] = []
        self.running = threading.Event()
        self.came = threading.Condition(self.lock)

    def check(self, calls: Sequence[Call]) -> None:
        pass

    def is_running(self, within_s: float) -> bool:
        return self.running.wait(within_s)

    def submit(self, calls: Sequence[Call]) -> None:
        with self.lock:
            if self.failure is not None:
                raise Stopped(str(self.failure))
            self.calls += calls
            self.taken += [each.request for each in calls]
            self.came.notify_all()

    def abort(self, call: Call) -> None:
        with self.lock:
            self.aborted.append(call)
            call.ended = True
            self.came.notify_all()

    def stop(self, error: BaseException | None = None) -> None:
        with self.lock:
            self.stopped.append(error)
            if error is not None:
                self.fail(error)
            self.came.notify_all()

    def fail(self, error: BaseException) -> None:
        self.failure = error
        for each in [call for call in self.calls if not call.ended]:
            each.fail(Stopped(str(error)))

    def figures(self) -> list[Figures]:
        running = sum(not each.ended for each in self.calls)
        return [Figures(0, 0, running, 0, 0, 8, 8, 1, 0.5, replica=self.replica)]

    def go(self, tokens: int = 1000) -> None:
        """Each call has so many more tokens now, and its end where that is all."""
        with self.lock:
            for call in [each for each in self.calls if not each.ended]:
                ids = answer(call.request)
                begin = self.made.get(call, 0)
                self.made[call] = min(len(ids), begin + tokens)
                for token in ids[begin : self.made[call]]:
                    if not call.ended:
                        call.hear(Token(0, token, None))
                if self.made[call] == len(ids) and not call.ended:
                    call.hear(Finished(0, Result(ids, "length", 0.0, 0.0, ())))

    def wait(self, holds: Any) -> None:
        """Until that holds, which a call from elsewhere makes true."""
        with self.came:
            assert self.came.wait_for(holds, WITHIN_S)
