"""Delivery: what comes of a prompt's answers is taken in pieces, at any pace."""

from pathlib import Path

import pytest
from scripted import save_tokenizer

from epmoe.engine.request import Request, Result, SamplingParams, TokenLogprobs
from epmoe.server.frames import Frames, FromReplica, Packed, packed, scores
from epmoe.text.delivery import Delivery, Piece

NONE = TokenLogprobs(-1.0, ())


def made(tmp_path: Path, **params: object) -> tuple[Delivery, list[int]]:
    woken: list[int] = []
    request = Request((1,), SamplingParams(temperature=1.0, seed=1, **params))  # type: ignore[arg-type]
    return Delivery(save_tokenizer(tmp_path / "tokenizer.json"), request, lambda: woken.append(1)), woken


def test_one_is_woken_once_until_it_takes(tmp_path: Path) -> None:
    delivery, woken = made(tmp_path, logprobs=1)
    listener = delivery.calls[0].listener
    assert delivery.take() == ([], None) and not woken
    for token in b"ab":
        assert not listener.token(token, NONE)
    assert len(woken) == 1
    assert delivery.take() == ([Piece(0, "ab", (97, 98), (NONE, NONE))], None)
    listener.token(ord("c"), NONE)
    listener.finish(Result((97, 98, 99, 257), "eos", 0.1, 0.2, (NONE,) * 4))
    assert len(woken) == 2
    (piece,), completion = delivery.take()
    assert piece == Piece(0, "c", (99, 257), (NONE, NONE))
    assert completion is not None and (completion.text, completion.ids) == ("abc", (97, 98, 99, 257))


def test_of_several_answers_each_has_its_pieces(tmp_path: Path) -> None:
    delivery, _ = made(tmp_path, n=2, stop=("bc",))
    first, second = (call.listener for call in delivery.calls)
    assert not first.token(ord("b"), None) and not second.token(ord("x"), None)
    assert delivery.take() == ([Piece(0, "", (98,), ()), Piece(1, "x", (120,), ())], None)
    assert first.token(ord("c"), None)
    first.finish(Result((98, 99), "stop", 0.1, 0.2, ()))
    assert delivery.take() == ([Piece(0, "", (99,), ())], None)
    second.finish(Result((120, 121), "length", 0.1, 0.2, ()))
    (piece,), completion = delivery.take()
    assert piece == Piece(1, "", (121,), ()) and completion is not None
    assert [(each.text, each.ids, each.finish_reason) for each in completion.outputs] == [
        ("", (98, 99), "stop"),
        ("x", (120, 121), "length"),
    ]


def test_an_error_is_what_is_taken(tmp_path: Path) -> None:
    delivery, woken = made(tmp_path, n=2)
    first, second = (call.listener for call in delivery.calls)
    first.token(ord("b"), None)
    second.fail(RuntimeError("the first"))
    first.fail(RuntimeError("the second"))
    assert len(woken) == 1
    with pytest.raises(RuntimeError, match="the first"):
        delivery.take()


def test_scores_of_a_prompt_are_a_tuple_from_wherever_they_come(tmp_path: Path) -> None:
    """From another replica they come packed, and each look at one would read them all."""
    delivery, _ = made(tmp_path, prompt_logprobs=0)
    given = (None, NONE, NONE)
    came = [each for frame in scores(0, given) for each in Frames(FromReplica).feed(packed(frame))]
    delivery.calls[0].listener.finish(Result((257,), "eos", 0.1, 0.2, (), 0, Packed(came)))
    _, completion = delivery.take()
    assert completion is not None and completion.prompt_logprobs == given
