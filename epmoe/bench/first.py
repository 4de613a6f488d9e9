"""The first token by prompt length: the whole call of `LLM.generate` with a prompt's ids and max_new_tokens=1.

What a user waits for is in it, from the call's arguments to the answer's text. Each call has ids of its own, which no
cache knows; a first one, which prepares, is not counted. A floor: the step's bytes or its arithmetic (floor.py).
"""

import statistics
import time

from epmoe.bench.conditions import Record
from epmoe.bench.decode import Batch
from epmoe.engine.request import SamplingParams
from epmoe.llm import LLM
from epmoe.streams import tell


def measure_first(llm: LLM, tokens: int, samples: int) -> Record:
    """One row of the table, for prompts of `tokens` tokens, without its floor; a collective."""
    params = SamplingParams(max_new_tokens=1, ignore_eos=True)
    times = []
    for ids in Batch.of(1 + samples, tokens, llm.architecture.vocab).ids_BP.tolist():
        llm.ranks.barrier()
        begin = time.perf_counter()
        llm.generate(ids, params)
        times.append(1e3 * (time.perf_counter() - begin))
    del times[0]
    row = {"tokens": tokens, "ms": statistics.median(times), "best_ms": min(times), "ms_of_each": times}
    if llm.ranks.is_main:
        tell(f"epmoe: prompt of {tokens}: {row['ms']:.3f} ms to the first token")
    return row
