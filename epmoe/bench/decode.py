"""A decode step by batch, and the prefill of a batch.

A step's time is the difference of two runs that differ in their length alone, so prefill, admission and the steps with
part of the batch cancel out:

    ms a step = (t(long) − t(short)) / (long − short)        the median of `repeat` such pairs, after a warm-up

Where tokens are chosen in another way than greedily, choice.py says what that adds.
"""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from epmoe.bench.choice import measure_choice
from epmoe.bench.conditions import Record
from epmoe.bench.options import GREEDY, WAYS, BenchConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, SamplingParams
from epmoe.ranks.mesh import Ranks
from epmoe.streams import tell


@dataclass(frozen=True)
class Batch:
    """Prompts of random ids."""

    ids_BP: torch.Tensor

    @classmethod
    def of(cls, sequences: int, tokens: int, vocab: int, seed: int = 0) -> "Batch":
        """Other ids for each number of sequences and each seed."""
        generator = torch.Generator().manual_seed(sequences + (seed << 32))
        return cls(torch.randint(vocab, (sequences, tokens), generator=generator))

    def requests(self, new: int, sampling: str = "greedy") -> list[Request]:
        """Of exactly `new` tokens each, chosen in one of WAYS."""
        way: dict[str, Any] = WAYS[sampling]
        return [
            Request(tuple(ids), SamplingParams(max_new_tokens=new, ignore_eos=True, seed=seed, **way))
            for seed, ids in enumerate(self.ids_BP.tolist())
        ]


def seconds(engine: Engine, ranks: Ranks, batch: Batch, new: int, sampling: str = "greedy") -> tuple[float, float]:
    """Seconds until all sequences have `new` tokens, and until each has its first."""
    ranks.barrier()
    results = engine.generate(batch.requests(new, sampling))
    assert all(len(result.ids) == new for result in results)
    return max(result.total_s for result in results), max(result.first_token_s for result in results)


def measure_decode(engine: Engine, ranks: Ranks, batch: Batch, config: BenchConfig) -> Record:
    """One row of the table, without its floor."""
    short, long = config.lengths
    seconds(engine, ranks, batch, short, config.sampling)
    steps, first = [], []
    for _ in range(config.repeat):
        whole, first_token = seconds(engine, ranks, batch, long, config.sampling)
        less, _ = seconds(engine, ranks, batch, short, config.sampling)
        steps.append((whole - less) / (long - short))
        first.append(first_token)
    step, size = statistics.median(steps), len(batch.ids_BP)
    beside = {} if config.sampling == GREEDY else measure_choice(engine, ranks, batch.requests(long, config.sampling))
    if ranks.is_main:  # a run that is cut short has not been for nothing
        tell(f"epmoe: batch {size}: {1e3 * step:.3f} ms a step")
    return {
        "batch": size,
        "ms": 1e3 * step,
        "tokens_per_s": size / step,
        "first_token_ms": 1e3 * statistics.median(first),
        "ms_of_each": [1e3 * each for each in steps],
        **beside,
    }


def measure_prefill(engine: Engine, ranks: Ranks, config: BenchConfig) -> Record | None:
    """Seconds from prompts to the first token of the last of them; each time other prompts, which no cache knows."""
    if config.prefill is None:
        return None
    sequences, tokens = config.prefill
    batches = [Batch.of(sequences, tokens, engine.vocab, seed) for seed in range(1 + config.repeat)]
    times = [seconds(engine, ranks, batch, 1)[0] for batch in batches]
    taken = statistics.median(times[1:])
    return {"sequences": sequences, "tokens": tokens, "s": taken, "tokens_per_s": sequences * tokens / taken}
