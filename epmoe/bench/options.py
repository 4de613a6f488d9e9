"""The benchmarks' configuration: what is measured, and which model with which parts on what, as in epmoe.generate."""

from dataclasses import dataclass
from typing import ClassVar

from epmoe.bench.lengths import FORMS, Lengths, read_lengths
from epmoe.config.keys import Names, Numbers, Range, key
from epmoe.config.schema import ModelKeys, Serve
from epmoe.errors import UserError

GREEDY = "greedy"
# How the tokens of a decode step are chosen, by name: keys of the group `sampling`.
WAYS: dict[str, dict[str, float]] = {
    GREEDY: {},
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "logprobs": {"logprobs": 5},
    "penalty": {"repetition_penalty": 1.1},
}

PEERS = ("transformers", "hub")


@dataclass(frozen=True)
class Size:
    """Random weights in place of a checkpoint's."""

    size: str | None = key(
        None,
        "random weights of this size; without a checkpoint 20b, on a CPU tiny",
        Names(table="epmoe.weights.synthetic:SIZES"),
    )


def check_size(size: str | None, checkpoint: str) -> None:
    """Raises UserError where both name a model."""
    if size and checkpoint:
        raise UserError(f"size={size} and checkpoint={checkpoint!r} exclude each other: give one")


@dataclass(frozen=True)
class Measurement(Size):
    """What is measured."""

    batches: tuple[int, ...] = key((1, 16, 64, 256), "sequences that decode at a time", Numbers(Range(above=0)))
    sampling: str = key(GREEDY, "how timed decodes choose", Names(tuple(WAYS)))
    prompt_tokens: int = key(128, "random tokens that each sequence begins with", Range(above=0))
    lengths: tuple[int, int] = key(
        (32, 160), "new tokens of the two timed runs", Numbers(Range(above=0), ascending=True)
    )
    prefill: tuple[int, int] | None = key(
        (8, 2048), "prompts of a timed prefill", Numbers(Range(above=0), between="x", form="SEQUENCESxTOKENS")
    )
    first: tuple[int, ...] = key(
        (16, 128, 512, 2048), "prompts whose first token is timed", Numbers(Range(above=0), empty=True)
    )
    mixed: tuple[int, int] | None = key(
        (64, 448),
        "a prompt entering decodes",
        Numbers(Range(above=0), between="x", form="SEQUENCESxTOKENS"),
    )
    samples: int = key(15, "prompts of each length of first, and of mixed, that are timed", Range(above=0))
    repeat: int = key(3, "times that each other run is repeated; the median counts", Range(above=0))
    bandwidth: float = key(0.0, "TB/s that the floor assumes; 0: measured", Range(low=0))
    flops: float = key(0.0, "TFLOP/s that the bounds of prompts assume; 0: measured", Range(low=0))
    compare: str | None = key(None, "run beside it: a peer, or the same with experts=hub", Names(PEERS))

    @property
    def ways(self) -> tuple[str, ...]:
        """Of choosing, whose decode steps are measured in turns."""
        return tuple(dict.fromkeys((GREEDY, self.sampling)))


@dataclass(frozen=True)
class BenchConfig(ModelKeys, Measurement):
    """What one run of `epmoe.bench` does. It makes its own prompts, and runs as many at a time as it measures."""

    subject: ClassVar[str] = "a benchmark"
    ignored: ClassVar[tuple[str, ...]] = ("runtime.max_batch", "runtime.prefix_cache")
    usage: ClassVar[str] = """\
Measure decoding, prefill and first tokens of a model, against what this machine's memory and arithmetic allow.

  python -m epmoe.bench key=value ...
  torchrun --nproc-per-node N -m epmoe.bench key=value ...

The tables go to standard output and end in one line of JSON. Others, each with a --help of its own:

  python -m epmoe.bench load=poisson|concurrent ...     requests that come and go
  python -m epmoe.bench start ...                       a cold and a warm start
  python -m epmoe.bench bits ...                        the same bits in any company"""

    def check(self) -> None:
        super().check()
        check_size(self.size, self.checkpoint)
        if self.compare == "hub" and self.experts == "hub":
            raise UserError("compare=hub with experts=hub is twice the same: choose another backend, or leave one out")
        if self.compare == "transformers" and not self.checkpoint:
            raise UserError(f"compare={self.compare} needs files to read: give checkpoint=DIRECTORY")
        if self.compare == "transformers" and self.sampling != GREEDY:
            raise UserError(f"compare={self.compare} is greedy, and sampling={self.sampling}: leave one of them out")

    def check_steps(self, chunk: int) -> None:
        """While prompts are being read, sequences decode in smaller batches. Both runs must end after that.

        Raises:
            UserError: the shorter run ends before.
        """
        most = max(self.batches)
        steps = -(-most * self.prompt_tokens // chunk)
        if steps > self.lengths[0]:
            raise UserError(
                f"batches={most} prompts of {self.prompt_tokens} tokens take {steps} steps of "
                f"runtime.prefill_chunk={chunk}, more than the {self.lengths[0]} of lengths: raise one of the two"
            )


@dataclass(frozen=True)
class Traffic(Size):
    """Which requests come, and when."""

    load: str = key(
        "poisson", "requests come at random times, or when others have ended", Names(("poisson", "concurrent"))
    )
    rate: float = key(1.0, "of poisson: requests a second, on average", Range(above=0, high=1e6))
    users: int = key(64, "of concurrent: conversations at a time, each with one request under way", Range(above=0))
    requests: int = key(256, "how many come", Range(above=0))
    prompt_tokens: str = key("128", f"random tokens of a prompt: {FORMS}")
    answer_tokens: str = key("128", "new tokens of a request, likewise")
    turns: int = key(1, "requests of a conversation: a prompt is all that was said, and new tokens", Range(above=0))
    seed: int = key(0, "of times, lengths and ids", Range(low=0))


@dataclass(frozen=True)
class LoadConfig(ModelKeys, Traffic):
    """What one run of `epmoe.bench load=…` does."""

    subject: ClassVar[str] = "a benchmark of load"
    # Nobody is refused: what a queue that grows does to those in it is what is measured.
    ignored: ClassVar[tuple[str, ...]] = ("runtime.profile", "serve.queue_requests", "serve.queue_tokens")
    usage: ClassVar[str] = """\
Let requests come and go, and measure what their users wait for.

  python -m epmoe.bench load=poisson rate=4 key=value ...
  torchrun --nproc-per-node N -m epmoe.bench load=concurrent users=64 key=value ...

The table goes to standard output and ends in one line of JSON, which scripts/bench/plot_load.py draws."""

    serve: Serve = key(Serve(), "requests that come and go")

    def check(self) -> None:
        super().check()
        check_size(self.size, self.checkpoint)
        self.serve.check(self.max_batch)
        for name in ("prompt_tokens", "answer_tokens"):
            read_lengths(name, getattr(self, name))

    @property
    def prompts(self) -> Lengths:
        """Tokens of a prompt."""
        return read_lengths("prompt_tokens", self.prompt_tokens)

    @property
    def answers(self) -> Lengths:
        """New tokens of a request."""
        return read_lengths("answer_tokens", self.answer_tokens)

    @property
    def max_batch(self) -> int:
        """Sequences that can run at a time."""
        conversations = -(-self.requests // self.turns)
        return min(self.runtime.max_batch, conversations, self.users if self.load == "concurrent" else conversations)


@dataclass(frozen=True)
class Starts(Size):
    """Which starts are measured."""

    ranks: int = key(1, "processes of a start, on this machine", Range(1, 1024))
    sequences: int = key(64, "a start is ready for so many at a time", Range(above=0))
    prompt_tokens: int = key(
        128, "random tokens of the longest prompt, and of the one that is answered", Range(above=0)
    )
    repeat: int = key(3, "warm starts; the median counts", Range(above=0))


@dataclass(frozen=True)
class StartConfig(ModelKeys, Starts):
    """What one run of `epmoe.bench start` does."""

    subject: ClassVar[str] = "a benchmark of starts"
    ignored: ClassVar[tuple[str, ...]] = ("runtime.max_batch", "runtime.profile")
    usage: ClassVar[str] = """\
Start a model in processes of its own, with no kernel compiled, then with all of them, and measure the time to its
first token.

  python -m epmoe.bench start ranks=N key=value ...

The table goes to standard output and ends in one line of JSON."""

    def check(self) -> None:
        super().check()
        check_size(self.size, self.checkpoint)
