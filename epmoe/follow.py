"""A rank that `LLM(ranks=N)` has started: it reads what rank 0 calls, and makes the same calls.

python -m epmoe.follow      for epmoe/ranks/local.py, which writes to its standard input
"""

import sys

from epmoe import streams
from epmoe.ranks import guard

if __name__ == "__main__":
    streams.open_missing()
    guard.begin()

from collections.abc import Generator

from epmoe.config.compose import from_keys
from epmoe.config.schema import Serve
from epmoe.errors import UserError
from epmoe.llm import LLM, join
from epmoe.ranks.command import main
from epmoe.ranks.local import Orders
from epmoe.server.replicas import service_of


def obey(llm: LLM, orders: Orders) -> None:
    """Make the calls of rank 0, which has started this process, until it closes.

    Raises:
        UserError: one of the two has failed alone.
    """
    streams: list[Generator[str]] = []
    while order := orders.next():
        if order["call"] == "failed":
            raise UserError(f"rank 0 alone failed: {order['text']}")
        try:
            match order:
                case {"call": "close"}:
                    return
                case {"call": "serve", "step_tokens": tokens}:
                    llm.serve(service_of(llm.engine, Serve(step_tokens=tokens)))
                case {"call": "update_weights", "table": table}:
                    llm._update(table, None)
                case {"call": "stream", "purpose": purpose}:
                    streams.append(llm._begin(llm._shared("stream", purpose)))
                case {"call": "next", "stream": number}:
                    next(streams[number], None)
                case {"call": "drop", "stream": number}:
                    streams[number].close()
                case {"call": call, "purpose": purpose}:
                    llm._complete(llm._shared(call, purpose))
        except UserError as error:
            # Rank 0 finds the same at the same moment; one that does not may wait in a collective, for timeout_s.
            if orders.next(llm.config.runtime.timeout_s / 2) != {"call": "failed", "text": str(error)}:
                raise


def follow() -> None:
    orders = Orders(sys.stdin.buffer)
    config = from_keys(orders.next() or {})
    with join(config) as ranks:
        llm = LLM.opened(config, ranks)
        llm.load()
        obey(llm, orders)


if __name__ == "__main__":
    main(follow)
