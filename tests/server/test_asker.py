"""Asker: what goes back to the process that asks, in which frames."""

from collections import Counter, deque
from typing import Any

from epmoe.engine.call import Call, QueueFull
from epmoe.engine.request import Finished, Request, Result, SamplingParams, Token, TokenLogprobs
from epmoe.errors import UserError
from epmoe.server.asker import TOGETHER, Asker, Hearing
from epmoe.server.frames import Ended, Failed, NewToken, Ready, Refused, Scores, Step


class Kept(Asker):
    """No socket: what would be sent is kept."""

    def __init__(self) -> None:
        self.calls = {}
        self.outbox = deque()
        self.later = deque()
        self.behind = Counter()
        self.kept: list[object] = []

    def say(self, *what: object) -> None:
        self.kept += what


def test_a_call_says_each_thing_once() -> None:
    scores = (None, TokenLogprobs(-1.0, ()))
    asker = Kept()
    hearing = Hearing(asker, 7)
    hearing.call = asker.calls[7] = Call(Request((1, 2), SamplingParams()), hearing)
    hearing.call.hear(Token(0, 5, None, scores))
    hearing.call.hear(Token(0, 6, None))
    hearing.call.hear(Finished(0, Result((5, 6, 1), "eos", 0.0, 0.0, (), 2, scores)))
    assert asker.kept == [
        Scores(7, 2, scores), NewToken(7, 5, None), NewToken(7, 6, None), Ended(7, "eos", (1,), (), 2),
    ]  # fmt: skip
    assert not asker.calls
    asker = Kept()
    hearing = Hearing(asker, 8)  # nothing but the prompt was asked for
    hearing.call = Call(Request((1, 2), SamplingParams()), hearing)
    hearing.call.hear(Finished(0, Result((), "length", 0.0, 0.0, (), 0, scores)))
    assert asker.kept == [Scores(8, 2, scores), Ended(8, "length", (), (), 0)]
    assert tuple(hearing.call.prompt_logprobs) == scores


def test_a_call_that_fails_says_whose_fault_it_is() -> None:
    asker = Kept()
    for number, error in enumerate((UserError("its grammar"), RuntimeError("the engine"), QueueFull("many"))):
        hearing = Hearing(asker, number)
        asker.calls[number] = Call(Request((1, 2), SamplingParams()), hearing)
        asker.calls[number].fail(error)
    assert asker.kept == [
        Refused([0], "mistake", "its grammar"), Failed(1, "the engine"), Refused([2], "full", "many"),
    ] and not asker.calls  # fmt: skip


def test_a_prompts_scores_hold_up_their_own_call_alone() -> None:
    """One frame of them at a time, after what others have; what follows them of their call keeps its place."""
    asker = Kept()
    part = [Scores(7, 1, (None,)) for _ in range(2)]
    own, others = NewToken(7, 5, None), [NewToken(call, 5, None) for call in range(3)]
    end, failed = Ended(7, "eos", (1,), (), 0), Failed(8, "it failed")
    asker.outbox.extend([others[0], *part, own, others[1], Scores(8, 1, (None,)), failed])
    found = [asker.taken()]
    asker.outbox.extend([end, others[2]])
    while asker.later or asker.outbox:
        found.append(asker.taken())
    assert found == [
        [Step(others[:2], [], []), part[0]],
        [Step(others[2:], [], []), part[1]],
        [Step([own], [], [])],
        [Scores(8, 1, (None,))],
        [Step([], [], [failed])],
        [Step([], [end], [])],
    ]
    assert not asker.behind and asker.taken() == []


def test_a_step_has_so_many_tokens_at_most() -> None:
    asker = Kept()
    asker.outbox.extend([NewToken(call, 5, None) for call in range(TOGETHER + 1)])
    steps: list[Any] = asker.taken()
    assert [len(each.tokens) for each in steps] == [TOGETHER, 1]


def test_what_comes_together_is_one_frame() -> None:
    asker, tokens = Kept(), [NewToken(call, 5, None) for call in range(4)]
    end = Ended(0, "eos", (1,), (), 0)
    asker.outbox.extend([*tokens[:2], end, Ready("f", 1), *tokens[2:]])
    assert asker.taken() == [Step(tokens[:2], [end], []), Ready("f", 1), Step(tokens[2:], [], [])]
    assert asker.taken() == []
