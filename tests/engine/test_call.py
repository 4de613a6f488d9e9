"""Call: an answer that is made once more is heard of once."""

import pytest

from epmoe.engine.call import Call
from epmoe.engine.request import Finished, Request, Result, SamplingParams, Token, TokenLogprobs


class Heard:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.results: list[Result] = []

    def token(self, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.ids.append(token)
        return False

    def finish(self, result: Result) -> None:
        self.results.append(result)

    def fail(self, error: BaseException) -> None:
        raise AssertionError(error)


def test_tokens_that_come_once_more_are_heard_of_once() -> None:
    heard = Heard()
    call = Call(Request((1,), SamplingParams()), heard)
    whole = Result((5, 6, 7), "length", 0.0, 0.0, ())
    for said in ((5,), (5, 6), ()):
        for token in said:
            call.hear(Token(0, token, None))
        call.id = 9
        call.again()
        assert call.id == -1
    for token in whole.ids:
        call.hear(Token(0, token, None))
    call.hear(Finished(0, whole))
    assert heard.ids == [5, 6, 7] and [each.ids for each in heard.results] == [whole.ids] and call.ended


def test_another_token_is_no_answer() -> None:
    call = Call(Request((1,), SamplingParams()), Heard())
    call.hear(Token(0, 5, None))
    call.again()
    with pytest.raises(RuntimeError, match="token 0 was 5, and is 6 now"):
        call.hear(Token(0, 6, None))
