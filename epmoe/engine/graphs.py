"""CUDA graphs of the decode step, one for each batch bucket and variant; without graphs the same step is called.

A batch is filled up to the next bucket with rows of the cache's spare sequence, with and without graphs, so that both
run the same kernels on the same shapes and give the same tokens.

Letters: B rows of a step.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from epmoe.engine.decode_step import StaticDecode
from epmoe.engine.request import Variant
from epmoe.errors import UserError
from epmoe.kernels.capture import Capture, Graph
from epmoe.kernels.rehearsal import rehearsing
from epmoe.layers.attention import WAITING
from epmoe.layers.twin import torch_only
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import to_device
from epmoe.streams import on_terminal, tell

# Up to so many rows, in steps of so many. Small batches double; then steps stay small against the batch: a row too many
# costs little, a graph a little memory and a tenth of a second at start.
STEPS = ((2, 1), (4, 2), (8, 4), (64, 8), (256, 32), (sys.maxsize, 128))


def buckets(most: int) -> list[int]:
    """Batch sizes for up to `most` rows: 1, 2, 4, 8, 16, 24 … 64, 96 … 256, 384 …; the last one is `most` itself."""
    found = []
    size = 1
    while size < most:
        found.append(size)
        size += next(step for limit, step in STEPS if size < limit)
    return [*found, most]


def resolve_graphs(wanted: str, ranks: Ranks, waits: Sequence[str]) -> bool:
    """runtime.graphs as a truth; `auto` says what it took on an accelerator.

    Args:
        waits: what of the model waits for the device, as "key=name" (LoadReport.waits): no graph can capture it.
    Raises:
        UserError: graphs are asked for where there can't be any.
    """
    waiting = [*waits, *(f"{name}'s torch version" for name in sorted(torch_only() & WAITING))]
    reason = "runtime.device=cpu" if ranks.device.type == "cpu" else ", ".join(waiting)
    if wanted == "true" and reason:
        raise UserError(f"runtime.graphs=true is not possible with {reason}: take runtime.graphs=auto")
    chosen = wanted != "false" and not reason
    if wanted == "auto" and ranks.is_main and ranks.device.type != "cpu":
        tell(f"epmoe: graphs={str(chosen).lower()} (auto{': ' + reason if reason else ''})")
    return chosen


Job = TypeVar("Job")


def with_bar(jobs: Sequence[Job], what: str, ranks: Ranks, *, progress: bool) -> Iterator[Job]:
    """The jobs, one by one, behind a progress bar on rank 0's terminal."""
    from tqdm import tqdm

    hidden = rehearsing() or not (jobs and progress and ranks.is_main and on_terminal())
    yield from tqdm(jobs, desc=f"epmoe: {what}", disable=hidden, leave=False)


class Graphs:
    """Runs the steps of a StaticDecode, replaying graphs where `capture` is set.

    All graphs share one pool of memory: what a step leaves is in its own buffers, so the next may overwrite
    the rest. Ranks capture and replay in the same order, since the step holds collectives.
    """

    def __init__(self, decode: StaticDecode, ranks: Ranks, *, capture: bool, progress: bool = False) -> None:
        self.decode, self.ranks, self.capture = decode, ranks, Capture(ranks.device) if capture else None
        self.progress = progress
        self.buckets = buckets(len(decode.id_M))
        self.ready: set[tuple[int, Variant]] = set()
        self.graphs: dict[tuple[int, Variant], Graph] = {}
        self.rows: list[int] = []  # what the device's sequence_M holds
        if self.capture:
            ranks.at_end.add(self)

    def bucket(self, count: int) -> int:
        return next(size for size in self.buckets if size >= count)

    def launch(self, handles: Sequence[int], variant: Variant) -> torch.Tensor:
        """Start a step of these sequences; their ids [B] on the device, which the next step overwrites."""
        rows = self.bucket(len(handles))
        padded = [*handles, *[self.decode.state.spare] * (rows - len(handles))]
        if padded != self.rows[:rows]:
            self.rows = padded
            self.decode.sequence_M[:rows] = to_device(padded, torch.int64, self.ranks.device)
        if self.capture:
            self.graphs[rows, variant].replay()
        else:
            self.decode.step(rows, variant)
        return self.decode.id_M[: len(handles)]

    def prepare(self, most: int, variants: Iterable[Variant]) -> None:
        """Run, and capture, every step of up to `most` rows that was not run before, on spare rows; a collective.

        The run compiles kernels and lets libraries allocate, neither of which a capture can do.
        """
        keys = [(size, variant) for variant in sorted(variants) for size in self.buckets if size <= self.bucket(most)]
        new = [key for key in reversed(keys) if key not in self.ready]  # the largest first, the others fit its memory
        if not new or self.ranks.device.type == "cpu":
            return
        begin = time.perf_counter()
        self.rows = [self.decode.state.spare] * len(self.decode.sequence_M)
        self.decode.sequence_M.fill_(self.decode.state.spare)
        for key in with_bar(new, "decode steps", self.ranks, progress=self.progress):
            step = partial(self.decode.step, *key)
            if rehearsing():
                step()
                continue
            if self.capture:
                self.graphs[key] = self.capture(step)
            else:
                step()
            self.ready.add(key)
        if self.ranks.is_main and not rehearsing():
            torch.accelerator.synchronize(self.ranks.device)
            what = "captured" if self.capture else "warmed up"
            tell(f"epmoe: {len(new)} decode steps {what} in {time.perf_counter() - begin:.1f} s")

    def close(self) -> None:
        """Let go of the graphs. A process group waits at its end until no graph holds a collective of it."""
        for graph in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        self.ready.clear()
        if self.capture:
            self.capture.new_pool()
