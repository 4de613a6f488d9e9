"""Prefills of every kind that a workload can lead to and no graph holds, run before the first request, so that nothing
compiles after it.

They are brief (epmoe/rehearsal.py). Which kinds there are the model knows: it asks its kernels and backends,
whose tiles follow the number of tokens.
"""

from collections.abc import Sequence

import torch

from epmoe.engine import sequence as engine
from epmoe.engine.graphs import Graphs, with_bar
from epmoe.engine.request import Request, SamplingParams, Workload
from epmoe.engine.runner import Runner
from epmoe.engine.sampler import top_logprobs
from epmoe.engine.scheduler import pieces
from epmoe.layers.twin import twin
from epmoe.ranks.mesh import Ranks
from epmoe.rehearsal import brief, rehearsing

Prefill = tuple[int, int]  # tokens of a step together, and of one prompt at most


class Warm:
    """Runs prefills of made-up prompts; a collective of the expert group.

    Args:
        chunk: prompt tokens of a step at most.
    """

    def __init__(self, runner: Runner, graphs: Graphs, ranks: Ranks, chunk: int, *, progress: bool) -> None:
        self.runner, self.graphs, self.ranks, self.chunk, self.progress = runner, graphs, ranks, chunk, progress
        self.done: set[Prefill] = set()

    def missing(self, load: Workload, rows: int, captured: int) -> list[Prefill]:
        """What such a load can lead to and was not run before, but steps of up to `captured` tokens, the largest first:
        the others fit its memory.

        Args:
            rows: that decode beside prompts, at most. Of a load whose prompts are known each has had one of these, or
                is one of a draft.
        """
        together = load.prefill_tokens + rows - min(rows, load.sequences)
        if load.beside_tokens is not None:
            together = max(together, load.beside_tokens + rows)
        tokens = min(self.chunk + rows, together)
        prompts = min(load.longer_prompts, self.chunk // 2)
        if tokens <= captured:
            return []
        kinds = self.runner.model.distinct(tokens, prompts)
        return sorted((kind for kind in kinds - self.done if kind[0] > captured), reverse=True)

    def run(self, load: Workload, new: Sequence[Prefill], timeout_s: float) -> None:
        """Run these prefills, of such a load's prompts."""
        for kind in with_bar(new, "prefills", self.ranks, progress=self.progress):
            most, each = kind[0], min(kind[1], self.chunk)
            running = self._admit(most, each, load)
            work = pieces(running, most, each)
            ran = sum(count for _, count in work)
            small = (ran, min(kind[1], ran))  # a small cache holds less than was asked for
            if small not in self.done:
                with brief():
                    flight = self.runner.launch([], work, self.graphs)
                if flight:
                    list(flight.land(timeout_s))
                if not rehearsing():
                    self.done |= {kind, small}
            for sequence in running:
                self.runner.cache.release(sequence.handle)
        # A prefill samples from whole rows of logits, a decode step perhaps from parts; not each warm one samples.
        nothing_1V = torch.zeros(1, self.runner.model.config.vocab, device=self.ranks.device)
        greedy = twin("greedy", nothing_1V)
        id_1 = greedy.join_largest(greedy.largest(nothing_1V, 0), nothing_1V.shape[1])
        if load.prompt_logprobs or True in load.logprobs:
            top_logprobs(nothing_1V, id_1, 1)

    def _admit(self, most: int, each: int, load: Workload) -> list[engine.Sequence]:
        """Prompts of up to `each` tokens, `most` together as far as the cache holds them, none longer than the load's
        longest; none of it is read by anyone."""
        pages, found = self.runner.cache.pages, 0
        running: list[engine.Sequence] = []
        while found < most and len(running) < load.sequences and pages.free_handles:
            handle, _ = pages.admit()
            length = pages.grow(handle, 0, min(load.prompt_tokens, most - found, each))
            if not length:
                pages.release(handle)
                break
            scores = 0 if load.prompt_logprobs else None
            request = Request((0,) * length, SamplingParams(max_new_tokens=1, prompt_logprobs=scores))
            sequence = engine.Sequence(len(running), request, length + 1, 0.0, handle)
            self.runner.admit(sequence)
            running.append(sequence)
            found += length
        return running
