"""Callers: requests are due when they should be, users have one each, a turn has all that was said; nothing hangs."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from epmoe.bench.load.callers import Callers
from epmoe.bench.weights import byte_tokenizer
from epmoe.engine.call import Call, Stopped
from epmoe.engine.request import Request, Result, SamplingParams
from epmoe.errors import UserError

TOKENIZER = byte_tokenizer(320)


class Server:
    """A service that answers from a thread of its own, a request after the other, its id being 1, 2, 3 …

    Args:
        together: (so many, all): so many must be under way before it answers, until all have come.
    """

    def __init__(
        self, *, together: tuple[int, int] = (1, 0), reason: str = "length", fails_at: int = -1, refuses_at: int = -1
    ) -> None:
        self.together, self.reason = together, reason
        self.fails_at, self.refuses_at = fails_at, refuses_at
        self.answered: Callable[[], object] = lambda: None  # called when a request has its answer
        self.running, self.failure = threading.Event(), None
        self.running.set()
        self.asked: list[tuple[int, ...]] = []
        self.calls: deque[Call] = deque()
        self.most = 0  # under way at a time
        self.stops: list[BaseException | None] = []
        self.turn = threading.Condition()
        threading.Thread(target=self._answer, daemon=True).start()

    def submit(self, calls: Sequence[Call]) -> None:
        with self.turn:
            if len(self.asked) == self.refuses_at:
                raise UserError("refused")
            self.asked += [call.request.ids for call in calls]
            self.calls.extend(calls)
            self.most = max(self.most, len(self.calls))
            self.turn.notify()

    def stop(self, error: BaseException | None = None) -> None:
        self.stops.append(error)

    def _answer(self) -> None:
        for number in range(1, 100):
            with self.turn:
                if not self.turn.wait_for(self._are_together, 60):
                    return  # the test has ended
            time.sleep(0.01)  # whoever asks too early does so now
            call = self.calls[0]
            if number == self.fails_at:
                call.listener.fail(Stopped("the engine has failed"))
                return
            if self.reason != "error":
                call.listener.token(number, None)
            self.calls.popleft()
            call.listener.finish(Result((number,), self.reason, 0, 0, (), cached_tokens=3))
            self.answered()

    def _are_together(self) -> bool:
        least, whole = self.together
        return len(self.calls) >= (least if len(self.asked) < whole else 1)


def made(server: Any, turns: Sequence[int], at_s: Sequence[float] | None, users: int = 2) -> Callers:
    """Conversations of so many turns, the new ids of whose prompts are 10, 11 … and 20, 21 …"""
    params = SamplingParams(max_new_tokens=1)
    conversations = [
        [Request((10 * number + turn,), params) for turn in range(count)] for number, count in enumerate(turns, 1)
    ]
    return Callers(server, TOKENIZER, conversations, at_s, users)


def hold(server: Any, turns: Sequence[int], at_s: Sequence[float] | None, users: int = 2) -> Callers:
    return held(made(server, turns, at_s, users))


def held(callers: Callers) -> Callers:
    thread = threading.Thread(target=callers.run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return callers


def test_what_is_due_comes_at_its_time() -> None:
    """The first before the next ones are due, and those together."""
    at_s = [0.05, 0.3, 0.3]
    server = Server()
    callers = made(server, [1, 1, 1], [at_s[0], math.inf, math.inf])

    def others_are_due() -> None:
        callers.at_s[1:] = at_s[1:]

    server.answered = others_are_due
    served = held(callers).served
    assert [each.due_s for each in served] == at_s and server.stops == [None]
    assert all(each.first_s > 0 and each.cached_tokens == 3 for each in served)
    assert server.asked == [(10,), (20,), (30,)]


def test_those_to_come_do_not_wait_for_those_before() -> None:
    server = Server(together=(5, 5))
    hold(server, [1] * 5, [0.0] * 5)
    assert server.most == 5


def test_each_user_has_one_under_way() -> None:
    server = Server(together=(2, 5))
    served = hold(server, [1, 2, 1, 1], None, users=2).served
    assert server.most == 2 and len(served) == 5
    ends = sorted(each.token_s[0] for each in served)
    assert [each.due_s for each in served] == [0.0, 0.0, *ends[:3]]


def test_more_users_than_conversations() -> None:
    assert [each.due_s for each in hold(Server(), [1, 1], None, users=9).served] == [0.0, 0.0]


def test_a_turn_has_all_that_was_said() -> None:
    server = Server()
    served = hold(server, [3, 1], None, users=1).served
    assert server.asked == [(10,), (10, 1, 11), (10, 1, 11, 2, 12), (20,)]
    assert [(each.turn, each.prompt_tokens) for each in served] == [(0, 1), (1, 3), (2, 5), (0, 1)]
    assert [each.due_s for each in served[1:3]] == [each.token_s[0] for each in served[:2]]


FAULTS = {
    "the service fails": (dict(fails_at=2), Stopped, "the engine has failed"),
    "it refuses": (dict(refuses_at=1), UserError, "refused"),
    "not finite": (dict(reason="error"), UserError, "logits of a request are not finite"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_stop_the_service(case: str) -> None:
    values, kind, message = FAULTS[case]
    server = Server(**values)  # type: ignore[arg-type]
    callers = hold(server, [2, 2], None, users=1)
    assert isinstance(callers.error, kind) and message in str(callers.error) and "\n" not in str(callers.error)
    assert server.stops == [callers.error]


def test_a_service_that_never_begins() -> None:
    server = Server()
    server.running.clear()
    server.failure = Stopped("it has failed")  # type: ignore[assignment]
    assert hold(server, [1], None).error is server.failure
