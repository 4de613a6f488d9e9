"""The benchmark's configuration: what is measured, and which model with which parts on what, as in epmoe.generate."""

from dataclasses import dataclass
from typing import ClassVar

from epmoe.config.keys import Names, Numbers, Range, key
from epmoe.config.schema import ModelKeys
from epmoe.errors import UserError


@dataclass(frozen=True)
class Measurement:
    """What is measured."""

    size: str | None = key(
        None,
        "random weights of this size; without a checkpoint 20b, on a CPU tiny",
        Names(table="epmoe.weights.synthetic:SIZES"),
    )
    batches: tuple[int, ...] = key((1, 16, 64, 256), "sequences that decode at a time", Numbers(Range(above=0)))
    prompt_tokens: int = key(128, "random tokens that each sequence begins with", Range(above=0))
    lengths: tuple[int, int] = key(
        (32, 160), "new tokens of the two timed runs", Numbers(Range(above=0), ascending=True)
    )
    prefill: tuple[int, int] | None = key(
        (8, 2048), "prompts of a timed prefill", Numbers(Range(above=0), between="x", form="SEQUENCESxTOKENS")
    )
    repeat: int = key(3, "times that each run is repeated; the median counts", Range(above=0))
    bandwidth: float = key(0.0, "TB/s that the floor assumes; 0: measured", Range(low=0))
    flops: float = key(0.0, "TFLOP/s that the prefill's bound assumes; 0: measured", Range(low=0))
    compare: str | None = key(None, "run this peer on the same checkpoint beside it", Names(("transformers",)))


@dataclass(frozen=True)
class BenchConfig(ModelKeys, Measurement):
    """What one run of `epmoe.bench` does. It makes its own prompts, and runs as many at a time as `batches` says."""

    subject: ClassVar[str] = "a benchmark"
    ignored: ClassVar[tuple[str, ...]] = ("runtime.max_batch",)
    usage: ClassVar[str] = """\
Measure decoding and prefill of a model, against what this machine's memory and arithmetic allow.

  python -m epmoe.bench key=value ...
  torchrun --nproc-per-node N -m epmoe.bench key=value ...

The table goes to standard output and ends in one line of JSON."""

    def check(self) -> None:
        if self.size and self.checkpoint:
            raise UserError(f"size={self.size} and checkpoint={self.checkpoint!r} exclude each other: give one")
        if self.compare and not self.checkpoint:
            raise UserError(f"compare={self.compare} needs files to read: give checkpoint=DIRECTORY")

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
