"""Streamed: an answer's text as the engine's steps bring it, for a caller who has the engine for himself."""

from collections.abc import Generator

from epmoe.engine.engine import Engine
from epmoe.engine.request import Finished, Request, Token
from epmoe.ranks.memory import told_when_full
from epmoe.text.output import Answer
from epmoe.text.tokenizer import Tokenizer


def streamed(engine: Engine, tokenizer: Tokenizer, request: Request) -> Generator[str]:
    """The text in pieces; a collective of the expert group. Closing it, or leaving its loop, ends the request.

    Raises:
        NotFinite: the request's logits are not.
    """
    answer = Answer(tokenizer, request)
    id = engine.add(request)
    try:
        while engine.busy:
            with told_when_full(engine.ranks.device):
                events = engine.step()
            for event in events:
                result = event.result if isinstance(event, Finished) else None
                if isinstance(event, Token) and not answer.stopped and answer.feed(event.token):
                    result = engine.abort(id, "stop")  # None: it ends by itself, and its event follows
                if result is not None:
                    answer.finish(result)
            if piece := answer.fresh():
                yield piece
        engine.check_finite()
    finally:
        engine.clear()
