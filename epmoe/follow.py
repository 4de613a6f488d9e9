"""A rank that `LLM(ranks=N)` has started: it reads what rank 0 calls, and makes the same calls.

python -m epmoe.follow      for epmoe/ranks/local.py, which writes to its standard input
"""

import sys

from epmoe import streams
from epmoe.ranks import guard

if __name__ == "__main__":
    streams.open_missing()
    guard.begin()

from epmoe.config.compose import from_keys
from epmoe.llm import LLM, join
from epmoe.ranks.command import main
from epmoe.ranks.local import Orders


def follow() -> None:
    orders = Orders(sys.stdin.buffer)
    config = from_keys(orders.next() or {})
    with join(config) as ranks:
        llm = LLM.opened(config, ranks)
        llm.load()
        llm.follow(orders)


if __name__ == "__main__":
    main(follow)
