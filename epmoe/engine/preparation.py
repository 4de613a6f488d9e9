"""Preparation: whatever compiles or is captured for the requests to come, before their first step.

load      sizes and kinds of these requests (epmoe/engine/request.py)
  ▼
kinds     of steps that it leads to, and prefills that are no graphs (graphs.py, warm.py)
  ▼
rehearse  which kernels these launch, compiled in parallel; then run, and captured
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from epmoe.engine.drafts import MOST_DRAFT
from epmoe.engine.graphs import Graphs, Kind, token_buckets
from epmoe.engine.request import Workload
from epmoe.engine.runner import Runner
from epmoe.engine.warm import Prefill, Warm
from epmoe.ranks.mesh import Ranks


@dataclass(frozen=True)
class Most:
    """Sizes of an engine's steps, at most."""

    batch: int  # sequences
    rows: int  # of a step without prompts, those of drafts among them
    tokens: int  # of a step that is a graph
    chunk: int  # of prompts


class Preparation:
    """Makes ready for loads. Its methods are collectives of the expert group."""

    def __init__(self, runner: Runner, graphs: Graphs, warm: Warm, ranks: Ranks, most: Most) -> None:
        self.runner, self.graphs, self.warm, self.ranks, self.most = runner, graphs, warm, ranks, most

    def prepare(self, load: Workload, found: int | None, timeout_s: float, grammars: Callable[[], object]) -> bool:
        """See `Engine.prepare`; whether anything was run that takes pages of the cache.

        Args:
            found: of the prompts' tokens, those that the first step need not compute, where it finds all requests, and
                room for each; else None.
            grammars: makes what compiles grammars.
        """
        asked = (load, found)
        if asked in self.graphs.prepared:
            return False
        ran = False
        with torch.inference_mode(), ExitStack() as beside:
            if self.runner.state.keep(load.kept):
                self.graphs.close()  # they neither write nor read what is new
            if True in load.logprobs:
                self.runner.static.keep_logits()
            if load.grammars:  # seconds for a large vocabulary, meanwhile; a UserError is for the request to be told
                beside.enter_context(ThreadPoolExecutor(1)).submit(grammars)
            if self.ranks.device.type != "cpu":
                ran = self._prepare_steps(load, found, timeout_s)
        self.graphs.remember(asked)
        return ran

    def _prepare_steps(self, load: Workload, found: int | None, timeout_s: float) -> bool:
        rows = min(self.most.batch, load.sequences)
        drafted = min(self.most.rows, rows * (1 + MOST_DRAFT)) if self.runner.static.drafted else rows
        beside = min(self.most.batch, drafted)  # rows of a step with prompts
        bodies = self.bodies(load, beside, found)
        captured = self.most.tokens if self.graphs.capture and not load.prompt_logprobs else 0
        prefills = self.warm.missing(load, beside, captured)
        kinds = self.graphs.missing(load.variants(), (rows, drafted), bodies)
        if prefills or kinds:
            if self.graphs.capture:
                self._rehearse(load, prefills, kinds, timeout_s)
            self._warm_up(load, prefills, kinds, timeout_s)
        return bool(prefills)

    def bodies(self, load: Workload, rows: int, found: int | None) -> list[Kind]:
        """Steps with prompts that such a load leads to; with `found`, the first step alone has any."""
        alone, prompts = min(self.most.chunk, load.prefill_tokens), load.sequences
        if found is not None and load.prefill_tokens <= self.most.chunk:
            sizes = {size for most in (alone, alone - found) for size in self.totals(most, prompts, at_once=True)}
            return [Kind("prompts", size, None) for size in sorted(sizes)]
        beside = alone if load.beside_tokens is None else min(alone, load.beside_tokens)
        mosts = {"prompts": alone, "mixed": beside + rows}
        bodies = [(size, part) for part, most in mosts.items() for size in self.totals(most, prompts, at_once=False)]
        return [Kind(part, size, None) for size, part in sorted(bodies)]

    def totals(self, most: int, prompts: int, *, at_once: bool) -> list[int]:
        """Buckets of steps of up to so many tokens and prompts; `at_once`: of just as many."""
        sizes, room = token_buckets(self.most.tokens), self.runner.static.most
        enough = next((size for size in sizes if size >= most and room(size, rows=False) >= prompts), None)
        if at_once:
            return [] if enough is None else [enough]
        return [size for size in sizes if size <= (enough or self.most.tokens)]

    def _rehearse(self, load: Workload, prefills: Sequence[Prefill], kinds: Sequence[Kind], timeout_s: float) -> None:
        """Compile the kernels of `_warm_up`. Only of what can be captured, and so reads nothing on the host."""
        from epmoe.kernels.compile_ahead import compile_ahead  # only here: a CPU machine need not have triton

        with compile_ahead(self.ranks):
            self._warm_up(load, prefills, kinds, timeout_s)

    def _warm_up(self, load: Workload, prefills: Sequence[Prefill], kinds: Sequence[Kind], timeout_s: float) -> None:
        self.warm.run(load, prefills, timeout_s)
        self.graphs.prepare(kinds)
