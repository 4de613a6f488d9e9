"""Prefills of every kind that a workload can lead to, run before the first request, so that nothing compiles after it.

They are brief (epmoe/kernels/rehearsal.py). Which kinds there are the model knows: it asks its kernels and backends,
whose tiles follow the number of tokens.
"""

import torch

from epmoe.engine.graphs import with_bar
from epmoe.engine.request import Request, SamplingParams, Workload
from epmoe.engine.runner import Runner
from epmoe.engine.scheduler import Sequence, pieces
from epmoe.kernels.rehearsal import brief, rehearsing
from epmoe.layers.twin import twin
from epmoe.ranks.mesh import Ranks

Kind = tuple[int, int]  # tokens of a step together, and of one prompt at most


class Warm:
    """Runs prefills of made-up prompts; a collective of the expert group.

    Args:
        chunk: prompt tokens of a step at most.
    """

    def __init__(self, runner: Runner, ranks: Ranks, chunk: int, *, progress: bool) -> None:
        self.runner, self.ranks, self.chunk, self.progress = runner, ranks, chunk, progress
        self.done: set[Kind] = set()

    def prefills(self, load: Workload, timeout_s: float) -> None:
        """Run what such a load can lead to and was not run before."""
        if self.ranks.device.type == "cpu":
            return
        self.run(load, timeout_s)
        # A prefill samples from whole rows of logits, a decode step perhaps from parts; not each warm one samples.
        nothing_1V = torch.zeros(1, self.runner.model.config.vocab, device=self.ranks.device)
        greedy = twin("greedy", nothing_1V)
        greedy.join_largest(greedy.largest(nothing_1V, 0), nothing_1V.shape[1])

    def run(self, load: Workload, timeout_s: float) -> None:
        """The prefills themselves, on any device."""
        tokens, prompts = min(self.chunk, load.prefill_tokens), min(load.longer_prompts, self.chunk // 2)
        kinds = self.runner.model.distinct(tokens, prompts)
        new = sorted(kinds - self.done, reverse=True)  # the largest first, the others fit its memory
        for kind in with_bar(new, "prefills", self.ranks, progress=self.progress):
            running = self._admit(kind, load)
            work = pieces(running, *kind)
            ran = sum(count for _, count in work)
            small = (ran, min(kind[1], ran))  # a small cache holds less than was asked for
            if small not in self.done:
                with brief():
                    flight = self.runner.prefill(work)
                if flight:
                    list(flight.land(timeout_s))
                if not rehearsing():
                    self.done |= {kind, small}
            for sequence in running:
                self.runner.cache.release(sequence.handle)

    def _admit(self, kind: Kind, load: Workload) -> list[Sequence]:
        """Prompts with as many tokens together as `kind` has and the cache holds, none longer than the load's longest.

        Those of two tokens, where `kind` wants no more of one; none of it is read by anyone.
        """
        most, each = kind
        pages, found = self.runner.cache.pages, 0
        running: list[Sequence] = []
        while found < most and len(running) < min(load.sequences, pages.sequences):
            length = min(load.prompt_tokens, most - found, each)
            while length and not pages.fits(length):
                length = length - 1 if length <= pages.size else (length - 1) // pages.size * pages.size
            if not length:
                break
            request = Request((0,) * length, SamplingParams(max_new_tokens=1))
            sequence = Sequence(len(running), request, length + 1, 0.0, pages.admit(length))
            self.runner.admit(sequence)
            running.append(sequence)
            found += length
        return running
