"""CUDA graphs of a step's parts, one for each size and variant; without graphs the same parts are called.

    rows alone             decode, one graph                       a batch is filled up to the next bucket of rows
    … whose logits are     rows, and a graph of the head           … likewise
      adjusted, or beside
      other ranks' own
    prompts alone          prompts, and a graph of the head        … of tokens, up to MOST_TOKENS
    both                   mixed, and a graph of the head          … likewise
    rows with drafts       drafts, and a graph of the head         … of rows, the drafts' among them
    more tokens            the model's call as it is, then a head; so, too, where a prompt is to be scored

What fills a step up belongs to the cache's spare sequence or to nobody. No bit depends on any of this.

Letters: B rows of a step · T tokens of a step · O outputs.
"""

import sys
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch

from epmoe.engine.ragged import Ragged
from epmoe.engine.request import Variant
from epmoe.engine.step import StaticStep
from epmoe.errors import UserError
from epmoe.kernels import run_on
from epmoe.kernels.capture import Capture, Graph
from epmoe.layers.twin import WAITING, torch_only
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import overwrite
from epmoe.rehearsal import rehearsing
from epmoe.streams import on_terminal, tell

# Up to so many rows, in steps of so many. Small batches double; then steps stay small against the batch: a row too many
# costs little, a graph a little memory and a tenth of a second at start.
STEPS = ((2, 1), (4, 2), (8, 4), (64, 8), (256, 32), (sys.maxsize, 128))
# The same of a step's tokens. A step of more takes the GPU longer than its launches take the host.
MOST_TOKENS = 2048
EXTENDED = ("drafts", "prompts", "mixed")  # parts that a draft model goes over
MOST_PREPARED = 4096  # loads that are remembered
TOKEN_STEPS = ((32, 16), (64, 32), (512, 64), (1024, 128), (sys.maxsize, 256))


def buckets(most: int) -> list[int]:
    """Batch sizes for up to `most` rows: 1, 2, 4, 8, 16, 24 … 64, 96 … 256, 384 …; the last one is `most` itself."""
    return [*_sizes(1, most, STEPS), most]


@cache
def token_buckets(most: int) -> tuple[int, ...]:
    """Numbers of tokens for steps of up to `most`: 16, 32, 64, 128, 192 … 512, 640 … 1024, 1280 …

    >>> token_buckets(100), token_buckets(64), token_buckets(5)
    ((16, 32, 64, 128), (16, 32, 64), (16,))
    """
    found = _sizes(16, most, TOKEN_STEPS)
    last = found[-1] + next(step for limit, step in TOKEN_STEPS if found[-1] < limit) if found else 16
    return (*found, last)


def _sizes(size: int, most: int, steps: Sequence[tuple[int, int]]) -> list[int]:
    """From `size` on, below `most`."""
    found = []
    while size < most:
        found.append(size)
        size += next(step for limit, step in steps if size < limit)
    return found


def resolve_graphs(wanted: str, ranks: Ranks, waits: Sequence[str]) -> bool:
    """runtime.graphs as a truth; `auto` says what it took on an accelerator.

    Args:
        waits: what of the model waits for the device, as "key=name" (LoadReport.waits): no graph can capture it.
    Raises:
        UserError: graphs are asked for where there can't be any.
    """
    waiting = [*waits, *(f"{name}'s torch version" for name in sorted(torch_only() & WAITING))]
    reason = ", ".join(waiting) if run_on(ranks.device) else f"runtime.device={ranks.device.type}"
    if wanted == "true" and reason:
        raise UserError(f"runtime.graphs=true is not possible with {reason}: take runtime.graphs=auto")
    chosen = wanted != "false" and not reason
    if wanted == "auto" and ranks.is_main and ranks.device.type != "cpu":
        tell(f"epmoe: graphs={str(chosen).lower()} (auto{': ' + reason if reason else ''})")
    return chosen


Job = TypeVar("Job")


def with_bar(jobs: Sequence[Job], what: str, ranks: Ranks, *, progress: bool) -> Iterator[Job]:
    """The jobs, one by one, behind a progress bar on rank 0's terminal."""
    if rehearsing() or not (jobs and progress and ranks.is_main and on_terminal()):
        yield from jobs
        return
    from tqdm import tqdm  # only here: it starts a thread, which stays

    yield from tqdm(jobs, desc=f"epmoe: {what}", leave=False)


class Kind(NamedTuple):
    """A part of a step: "decode", "rows" or "drafts" of so many rows, "prompts" or "mixed" of so many tokens, "head" of
    so many outputs; where a model drafts, "extend" and one of EXTENDED, and "propose" of so many sequences."""

    part: str
    size: int
    variant: Variant | None


class Graphs:
    """Runs the parts of a StaticStep, replaying graphs where `capture` is set: the Runner's launcher.

    All graphs share one pool of memory: what a part leaves is in its own buffers, so the next may overwrite
    the rest. Ranks capture and replay in the same order, since the step holds collectives: and what has some is one
    capture on all ranks, of one Kind, since NCCL may have kept in it where the other ranks' memory was.

    Args:
        own: each rank has requests of its own, and runs steps of nobody's rows beside the others' where it has none.
    """

    def __init__(
        self, static: StaticStep, ranks: Ranks, *, capture: bool, progress: bool = False, own: bool = False
    ) -> None:
        self.static, self.ranks, self.own = static, ranks, own
        self.capture = Capture(ranks.device) if capture else None
        self.progress = progress
        self.buckets = buckets(len(static.id_M))
        self.ready: set[Kind] = set()
        self.prepared: set[Hashable] = set()  # loads for which nothing is missing, until `close`
        self.graphs: dict[Kind, Graph] = {}
        self.bodies: dict[str, list[int]] = {"prompts": [], "mixed": []}  # sizes of those that are graphs, ascending
        self.handles: list[int] = []  # what the device's sequence_M holds
        self.body: Kind | None = None  # of the step with prompts or drafts that was started last; None: none of these
        if self.capture:
            ranks.at_end.add(self)

    def bucket(self, count: int) -> int:
        return next(size for size in self.buckets if size >= count)

    def decode(self, handles: Sequence[int], variant: Variant) -> torch.Tensor:
        """Start a step of these sequences alone; their ids [B] on the device, which the next step overwrites."""
        self._run(Kind("decode", self._take_rows(handles), variant))
        return self.static.id_M[: len(handles)]

    def rows(self, handles: Sequence[int], most: int = 0) -> None:
        """Start a step of these sequences alone, up to its head; there may be none on this rank.

        Args:
            most: sequences of the rank that has most.
        """
        self._run(Kind("rows", self._take_rows(handles, most), None))

    def _take_rows(self, handles: Sequence[int], most: int = 0) -> int:
        """Let `sequence_M` begin with them, filled up to a bucket, whose size it returns."""
        rows = self.bucket(max(len(handles), most))
        padded = [*handles, *[self.static.state.spare] * (rows - len(handles))]
        if padded != self.handles[:rows]:
            self.handles = padded
            overwrite(self.static.sequence_M, padded)
        return rows

    def ragged(self, ragged: Ragged, every: Sequence[Ragged] = ()) -> None:
        """Start a step with prompts, or with drafts, up to its head.

        Args:
            every: of all ranks, this one's among them, where each has its own; all make the same kind of step, of a
                size for the largest.
        """
        every, static = every or (ragged,), self.static
        if not any(each.spans for each in every):
            static.cache.write()
            static.order_step(ragged)
            self.body = Kind("drafts", self.bucket(max(len(each.rows) for each in every)), None)
            self._run(self.body)
            return
        part = "mixed" if any(each.rows for each in every) else "prompts"
        sizes = self.bodies[part]
        enough = bisect_left(sizes, max(len(each.given) for each in every))
        held = (size for size in sizes[enough:] if all(self.holds(part, size, each) for each in every))
        size = next(held, None)
        if size is not None:
            room = static.changes(size, static.most(size, rows=part == "mixed"))
            static.order_step(ragged, static.cache.write(leave=room))
            self.body = Kind(part, size, None)
            self._run(self.body)
        else:
            self.body = None
            static.cache.write()
            static.order_step(ragged)
            static.run(ragged, every)

    def head(self, outputs: int, variant: Variant) -> torch.Tensor:
        """Choose the ids [O] of the step that was started, as `decode` gives them."""
        self._run(Kind("head", self.bucket(outputs) if self.capture else outputs, variant))
        return self.static.id_M[:outputs]

    def propose(self, ragged: Ragged, most: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Let the draft model go over the step whose ids were chosen, and say what comes behind: [len(most), K], on the
        device until the next step. `most` as in `Proposer.order_step`."""
        proposer = self.static.proposer
        assert proposer is not None
        proposer.order_step(ragged, most)
        if self.body is None:
            self.static.extend_known(ragged)
        else:
            self._run(Kind(f"extend {self.body.part}", self.body.size, None))
        if most:
            self._run(Kind("propose", self.bucket(len(most)), None))
        return proposer.draft_MK[: len(most)]

    def holds(self, part: str, size: int, ragged: Ragged) -> bool:
        """Whether a body has room for a step; none leaves what is to be scored."""
        most = self.static.most(size, rows=part == "mixed")
        room = len(ragged.given) <= size and max(len(ragged.spans), len(ragged.outputs)) <= most
        return room and not ragged.scored

    def missing(self, variants: Iterable[Variant], most: tuple[int, int], bodies: Sequence[Kind]) -> list[Kind]:
        """The parts that a load needs and that were not run before, the largest first: the others fit its memory.

        Args:
            most: rows at a time, and rows with those of drafts.
            bodies: of steps with prompts, the smallest first; what is no graph runs as it is.
        """
        sizes, drafted = ([size for size in self.buckets if size <= self.bucket(each)] for each in most)
        kinds = [(size, variant) for variant in sorted(variants) for size in drafted]
        decodes = [each for each in kinds if each[0] <= sizes[-1]]
        adjusted = [each for each in decodes if each[1].adjusted]
        wanted = [Kind("decode", *each) for each in decodes if not (each[1].adjusted or self.own)]
        apart = self.capture or self.own or self.static.drafted  # heads that no decode has in it, or has as large
        wanted += [Kind("head", *each) for each in (kinds if apart else adjusted)]
        wanted += [Kind("rows", size, None) for size in sizes if adjusted or self.own]
        wanted += [Kind("drafts", size, None) for size in drafted if self.static.drafted]
        wanted += bodies if self.capture else []
        if self.static.proposer:
            wanted += [kind._replace(part=f"extend {kind.part}") for kind in wanted if kind.part in EXTENDED]
            wanted += [Kind("propose", size, None) for size in sizes]
        return [kind for kind in reversed(wanted) if kind not in self.ready]

    def prepare(self, new: Sequence[Kind]) -> None:
        """Run, and capture, these parts; a collective.

        The run compiles kernels and lets libraries allocate, neither of which a capture can do. It is of spare rows and
        nobody's tokens.
        """
        begin = time.perf_counter()
        self._forget()
        for kind in with_bar(new, "steps", self.ranks, progress=self.progress):
            part = self._part(kind)
            if rehearsing():
                part()
                continue
            if self.capture:
                self.graphs[kind] = self.capture(part)
                if kind.part in self.bodies:
                    insort(self.bodies[kind.part], kind.size)
            else:
                part()
            self.ready.add(kind)
        if self.ranks.is_main and not rehearsing():
            torch.accelerator.synchronize(self.ranks.device)
            what = "captured" if self.capture else "warmed up"
            tell(f"epmoe: {len(new)} kinds of step {what} in {time.perf_counter() - begin:.1f} s")

    def remember(self, load: Hashable) -> None:
        """Nothing is missing for it now: to find that out costs 0.1 ms, and a first token waits for it."""
        if len(self.prepared) >= MOST_PREPARED:
            self.prepared.clear()
        self.prepared.add(load)

    def _forget(self) -> None:
        """Let the buffers hold spare rows and nobody's tokens."""
        self.handles = [self.static.state.spare] * len(self.static.sequence_M)
        self.static.sequence_M.fill_(self.static.state.spare)
        nobody = Ragged.of([], [])
        self.static.order_step(nobody)
        if self.static.proposer:
            self.static.proposer.order_step(nobody, [])

    def _part(self, kind: Kind) -> Callable[[], None]:
        if kind.part in ("rows", "drafts"):
            return partial(self.static.rows if kind.part == "rows" else self.static.drafts, kind.size)
        if kind.part.startswith("extend "):
            return partial(self.static.extend, kind.part.removeprefix("extend "), kind.size)
        if kind.part == "propose":
            assert self.static.proposer is not None
            return partial(self.static.proposer.propose, kind.size)
        if kind.variant is None:
            return partial(self.static.body, kind.size, rows=kind.part == "mixed")
        return partial(self.static.decode if kind.part == "decode" else self.static.head, kind.size, kind.variant)

    def _run(self, kind: Kind) -> None:
        if graph := self.graphs.get(kind):
            graph.replay()
        else:
            self._part(kind)()

    def close(self) -> None:
        """Let go of the graphs. A process group waits at its end until no graph holds a collective of it."""
        for graph in self.graphs.values():
            graph.reset()
        self.graphs.clear()
        for sizes in self.bodies.values():
            sizes.clear()
        self.ready.clear()
        self.prepared.clear()
        if self.capture:
            self.capture.new_pool()
