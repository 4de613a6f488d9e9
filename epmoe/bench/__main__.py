"""The benchmarks of a whole model. Each is one command, on one rank or under torchrun, and ends in a line of JSON:

python -m epmoe.bench size=20b                                  decode by batch, prefill, first tokens (model.py)
torchrun --nproc-per-node 4 -m epmoe.bench checkpoint=DIRECTORY
python -m epmoe.bench load=poisson rate=4 size=20b              requests that come and go (load/)
python -m epmoe.bench load=concurrent users=64 size=20b
python -m epmoe.bench start size=20b                            a cold and a warm start (start.py)
python -m epmoe.bench bits size=20b                             the same bits in any company (bits.py)
"""

import sys
from collections.abc import Callable, Sequence

from epmoe import streams
from epmoe.ranks import guard

if __name__ == "__main__":
    streams.open_missing()
    guard.begin()  # the imports below take seconds

from epmoe.bench.bits import bits
from epmoe.bench.load.run import load
from epmoe.bench.model import bench
from epmoe.bench.start import start
from epmoe.ranks.command import main


def chosen(argv: Sequence[str]) -> Callable[[], None]:
    """Which benchmark the words of the command line ask for."""
    if argv[:1] == ["load"] or any(word.startswith("load=") for word in argv):
        return load
    return {"bits": bits, "start": start}.get(argv[0] if argv else "", bench)


if __name__ == "__main__":
    main(chosen(sys.argv[1:]))
