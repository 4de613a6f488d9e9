"""The kernels of a start, compiled in parallel before the first one runs.

    with compile_ahead(ranks):      a rehearsal (rehearsal.py): each launch names its kernel, threads compile it
        warm-up
    warm-up                         for real: finds every kernel compiled

One after the other, as a launch compiles what it needs, they take most of a cold start. Threads are enough: a tenth of
a compile holds Python's lock (scripts/bench/NOTES.md, entry 35). The ranks of a machine share the work, each compiles
the kernels whose key falls to it, and then takes the others' from Triton's cache, where they have one.

It is no more than a hint. A kernel that the rehearsal does not name, or that does not compile, is compiled by its first
launch, which says what is wrong.
"""

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import triton

from epmoe.ranks.mesh import Ranks
from epmoe.rehearsal import rehearsal
from epmoe.streams import tell

NAMED = object()  # in the place of a kernel until it is compiled


@contextmanager
def compile_ahead(ranks: Ranks) -> Iterator[None]:
    """Compile what the block would launch; nothing of it is launched. A collective, if there is anything.

    Raises:
        RuntimeError: the compiler did not end within runtime.start_timeout_s.
    """
    neighbours = ranks.neighbours
    threads = max(1, len(os.sched_getaffinity(0)) // neighbours)
    begin = time.perf_counter()
    with compiling(threads, (ranks.local_rank, neighbours)) as found:
        with found.named():
            yield
        found.wait(ranks.start_timeout_s)
        if found.launches:
            ranks.meet_replica("kernels")  # another's share may take longer than a collective may
        found.compile_rest()
        found.wait(ranks.start_timeout_s)
    if found.made and ranks.is_main:
        seconds = time.perf_counter() - begin
        tell(f"epmoe: {len(found.jobs)} kernels compiled in {seconds:.1f} s, {threads * neighbours} at a time")


@contextmanager
def compiling(threads: int, share: tuple[int, int] = (0, 1)) -> Iterator["Found"]:
    """Who compiles what is named within the block. What is not compiled at its end is forgotten."""
    parse_one_at_a_time()
    executor = ThreadPoolExecutor(threads)
    found, listener = Found(executor, share), triton.knobs.compilation.listener

    def heard(**what: Any) -> None:
        if not what["cache_hit"]:
            found.made.append(what["src"].name)
        if listener:
            listener(**what)

    triton.knobs.compilation.listener = heard
    try:
        yield found
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        triton.knobs.compilation.listener = listener
        found.keep()


@functools.cache
def parse_one_at_a_time() -> None:
    """From here on in this process, also after the block: a thread may still compile what nobody waits for any more.

    Python 3.11 counts how deep a syntax tree is once for all threads: two that parse may fail with a SystemError.
    """
    owner = next(each for each in triton.JITFunction.__mro__ if "parse" in vars(each))
    parse, lock = owner.parse, threading.Lock()

    def locked(function: Any) -> Any:
        with lock:
            return parse(function)

    owner.parse = locked


@dataclass
class Job:
    """A kernel to compile."""

    compile: Callable[[], Any]
    keep: list[Callable[[Any], None]] = field(default_factory=list)  # puts it, or None, where launches look for it
    future: Future[Any] | None = None

    @property
    def kernel(self) -> Any:
        """None: it is not compiled, or cannot be, which its first launch will say."""
        done = self.future is not None and self.future.done() and not self.future.cancelled()
        return self.future.result() if self.future and done and self.future.exception() is None else None


class Found(triton.AsyncCompileMode):
    """The kernels that a rehearsal has named.

    Args:
        share: which of how many equal shares is compiled at once; the others by `compile_rest`.
    """

    def __init__(self, executor: Executor, share: tuple[int, int]) -> None:
        super().__init__(executor)
        self.share = share
        self.jobs: dict[str, Job] = {}  # by the key in Triton's cache
        self.launches = 0
        self.made: list[str] = []  # names of those that were compiled, and not found in the cache

    @contextmanager
    def named(self) -> Iterator[None]:
        """The block is a rehearsal: what it would launch is named, and its compilation begins."""
        run, tune = triton.JITFunction.run, triton.runtime.Autotuner.run

        def name(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            self.launches += 1
            return run(function, *args, grid=grid, warmup=True, **options)

        triton.JITFunction.run = name
        triton.runtime.Autotuner.run = lambda *_, **__: None  # it would compare times of nothing, and keep the best
        try:
            with rehearsal(), self:
                yield
        finally:
            triton.JITFunction.run, triton.runtime.Autotuner.run = run, tune

    def submit(self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]) -> object:
        """Triton calls this in the place of its compiler."""
        job = self.jobs.get(key)
        if job is None:
            job = self.jobs[key] = Job(compile_fn)
            number, count = self.share
            if int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % count == number:
                self._start(job)
        job.keep.append(finalize_fn)
        return NAMED

    def compile_rest(self) -> None:
        """Begin with the other shares."""
        for job in self.jobs.values():
            if job.future is None:
                self._start(job)

    def wait(self, timeout_s: float) -> None:
        """Until all that was begun has ended.

        Raises:
            RuntimeError: not within `timeout_s`.
        """
        late = wait([job.future for job in self.jobs.values() if job.future], timeout_s).not_done
        if late:
            raise RuntimeError(f"{len(late)} kernels did not compile within {timeout_s:g} s (runtime.start_timeout_s)")

    def keep(self) -> None:
        """Put the kernels where launches look for them."""
        for job in self.jobs.values():
            for keep in job.keep:
                keep(job.kernel)

    def _start(self, job: Job) -> None:
        job.future = self.executor.submit(compiled, job.compile)


def compiled(compile_fn: Callable[[], Any]) -> Any:
    """The kernel; and what launches it, of which Triton before 3.7 compiles one for each signature, is in the cache."""
    kernel = compile_fn()
    triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel
