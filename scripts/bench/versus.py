#!/usr/bin/env python3
"""Checkouts against each other on one GPU: µs of one layer's two expert products, seconds long, taking turns.

    scripts/bench/versus.py ../before . --tokens 64,448,4096          (each a checkout's root; the first is 100 %)
    scripts/bench/versus.py . .=hopper:128x64x64x4x2 --tokens 448     (a tile instead of those of tiles.json)

Each checkout has a process, which compiles and captures before the first turn: a CUDA graph of CALLS calls of moe.py,
with other tokens and routings each, and COPIES copies of the weights. A turn replays it for --ms, and every number
of tokens has --rounds of turns, forth and back. So all meet one GPU that is as hot as under load: at its limit of power
what takes energy takes time, and gains of milliseconds on a cool GPU may not be there. Beside the time: the clock and
the power that nvidia-smi says amid the first turn. The last line is one JSON object.
"""

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COPIES = 8  # of 32 experts' 420 MB: what is read comes from memory
PREPARE_S, TURN_S = 600.0, 60.0  # how long a side may be silent: until it is ready, and beyond a turn


class Side:
    """A checkout's process, and what its turns have taken."""

    def __init__(self, name: str, cases: str, command: Sequence[str]) -> None:
        self.name = name
        root, _, tile = name.partition("=")
        where = str(Path(root).resolve())
        self.process = subprocess.Popen(
            [*command, where, cases, tile], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=where
        )
        self.us: dict[int, list[float]] = {}

    def wait(self) -> None:
        """Until it has compiled and captured."""
        self._read(PREPARE_S)

    def turn(self, tokens: int, seconds: float) -> list[str]:
        """What nvidia-smi says meanwhile."""
        assert self.process.stdin is not None
        print(tokens, seconds, file=self.process.stdin, flush=True)
        time.sleep(seconds / 2)
        said = gpu()
        self.us.setdefault(tokens, []).append(float(self._read(seconds + TURN_S)))
        return said

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _read(self, limit_s: float) -> str:
        """The next line. Ends the program where there is none, and where none comes."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], limit_s)[0]:
            sys.exit(f"scripts/bench/versus.py: {self.name} has said nothing for {limit_s:g} s")
        if not (line := self.process.stdout.readline()):
            sys.exit(f"scripts/bench/versus.py: {self.name} has failed; what it said is above")
        return line


def gpu() -> list[str]:
    """Clock in MHz and power in W of the GPU in use, the first one that is visible."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split(", ")


def take_turns(sides: Sequence[Side], cases: Sequence[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each number of tokens and side; prints it."""
    found = []
    for tokens in cases:
        said: dict[Side, list[str]] = {}
        for number in range(rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                told = side.turn(tokens, seconds)
                said.setdefault(side, told)
        first = statistics.mean(sides[0].us[tokens])
        for side in sides:
            us = statistics.mean(side.us[tokens])
            mhz, watts = said[side]
            found.append({"tokens": tokens, "side": side.name, "us": side.us[tokens], "mhz": mhz, "watts": watts})
            print(f"{tokens:>6} {us:9.1f} us {us / first:7.1%} {mhz:>6} MHz {watts:>7} W  {side.name}", flush=True)
    return found


def serve(root: str, cases: str, tile: str) -> None:
    """A side's process: prepare, say so, then a mean time a call for each line "tokens seconds".

    Of its checkout it takes names that older ones have too.
    """
    sys.path.insert(0, root)
    import torch

    from epmoe.moe.experts import GatedActivation
    from epmoe.moe.experts.triton import TritonExperts
    from epmoe.moe.experts.triton.tiles import ExpertTile
    from scripts.bench import moe

    assert moe.__file__ is not None and Path(moe.__file__).is_relative_to(root), moe.__file__
    layer = moe.Layer(local=32, experts=32, hidden=2880, intermediate=2880, top_k=4)
    ours = [TritonExperts.pack(moe.random_weights(layer, seed), GatedActivation()) for seed in range(COPIES)]
    graphs = {}
    with moe.only_tile(ExpertTile.parse(tile) if tile else None):
        for tokens in map(int, cases.split(",")):
            graphs[tokens] = captured(ours, *moe.inputs(layer, tokens, 0.2))
    print("ready", flush=True)
    for line in sys.stdin:
        wanted, seconds = line.split()
        replay, calls = graphs[int(wanted)][0].replay, 0
        replay()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        while (passed := time.perf_counter() - begin) < float(seconds):
            replay()
            torch.cuda.synchronize()
            calls += moe.CALLS
        print(1e6 * passed / calls, flush=True)


def captured(ours: Sequence[Any], xs: Sequence[Any], dispatches: Sequence[Any]) -> tuple[Any, ...]:
    """A graph of a call for each input, and what it reads."""
    import torch

    def calls() -> None:
        for call, (x_TH, dispatch) in enumerate(zip(xs, dispatches, strict=True)):
            ours[call % len(ours)].forward(x_TH, dispatch)

    calls()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph, xs, dispatches


def positive(word: str) -> int:
    """Of the command line."""
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"{word!r} is no number from 1 on")
    return int(word)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="+", metavar="ROOT[=TILE]", help="a checkout's root, and the only tile to use")
    parser.add_argument("--tokens", type=lambda words: list(map(positive, words.split(","))), default="64,256,512,4096")
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--ms", type=positive, default=1000, help="of a turn")
    options = parser.parse_args()
    for side in options.sides:
        if not Path(side.partition("=")[0], "scripts", "bench", "moe.py").is_file():
            sys.exit(f"scripts/bench/versus.py: {side} is no checkout of epmoe: it has no scripts/bench/moe.py")
    import torch

    if not torch.cuda.is_available():
        sys.exit("scripts/bench/versus.py needs a CUDA device")
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    cases = ",".join(map(str, options.tokens))
    sides = [Side(name, cases, command) for name in options.sides]
    try:
        for side in sides:
            side.wait()
        found = take_turns(sides, options.tokens, options.rounds, options.ms / 1000)
    finally:
        for side in sides:
            side.end()
    print(json.dumps({"bench": "versus", "device": torch.cuda.get_device_name(), "ms": options.ms, "rows": found}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
