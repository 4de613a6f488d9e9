"""CUDA graphs: work captured once, replayed with one launch.

    capture = Capture(device)
    graph = capture(step)        runs `step` twice: briefly, then recorded
    graph.replay()

All graphs of a Capture share one pool of memory, so what one leaves in it the next may overwrite.
"""

from collections.abc import Callable
from functools import cache

import torch

from epmoe.rehearsal import brief

Graph = torch.cuda.CUDAGraph


class Capture:
    """A stream and a pool of memory for graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.new_pool()

    def new_pool(self) -> None:
        """For the graphs to come: a pool whose last graph is gone takes no new ones."""
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], object]) -> Graph:
        """A graph of what `work` launches. The run before it compiles kernels and lets libraries allocate."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        graph = Graph()
        # A library's workspace belongs to a stream: run where the capture will.
        with torch.cuda.stream(self.stream), brief():
            work()
        # thread_local: the process group's watchdog may ask for events of earlier collectives from its own thread.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return graph


def beside(device: torch.device, first: Callable[[], None], second: Callable[[], None]) -> None:
    """Call both. In a graph that is being captured what they launch runs at the same time, else one follows the other;
    what comes behind waits for both.

    Neither may read or write what the other writes.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        first()
        second()
        return
    here, there = torch.cuda.current_stream(device), _branch(device)
    there.wait_stream(here)
    first()
    with torch.cuda.stream(there):
        second()
    here.wait_stream(there)


@cache
def _branch(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
