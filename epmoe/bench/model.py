"""python -m epmoe.bench: decode by batch, prefill, first tokens, loading and memory, against the limits of the machine.

Random prompts, the end-of-text token ignored, decodes greedy or as `sampling` says.
`floor` is what a step takes at the memory's speed or, of many
tokens, at the speed of arithmetic (floor.py); `of floor` is time / floor, so 1 is the limit.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from epmoe import strictjson
from epmoe.bench import peer
from epmoe.bench.conditions import Record, conditions, open_model
from epmoe.bench.decode import Batch, measure_decode, measure_prefill
from epmoe.bench.first import measure_first
from epmoe.bench.floor import Floor, measure_bandwidth, measure_flops
from epmoe.bench.mixed import measure_mixed
from epmoe.bench.options import BenchConfig
from epmoe.bench.table import table
from epmoe.bench.work import check_cache, most_sequences, positions_needed
from epmoe.config.compose import parse
from epmoe.engine.config import resolve_chunk
from epmoe.llm import LLM, join
from epmoe.moe.placement import PLACEMENTS
from epmoe.ranks.memory import peak_bytes
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.profile import profiled
from epmoe.tables import lookup
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES
from epmoe.weights.manifest import Manifest

PROFILED_TOKENS = 8  # new tokens of each batch in a trace; a whole run's would be too large to open


def bench() -> None:
    config = parse(sys.argv[1:], BenchConfig)
    with join(config) as ranks:
        chunk = resolve_chunk(config.runtime.prefill_chunk, ranks.device)
        # Prompts are run again and again: what they begin with must not be found.
        runtime = replace(config.runtime, prefill_chunk=chunk, max_batch=most_sequences(config), prefix_cache=False)
        config = replace(config, runtime=runtime)
        config.check_steps(chunk)
        if config.compare:
            peer.check(config, ranks.size)
        source, floor, record = measure(config, ranks)
        gc.collect()  # the model is gone: its memory is the peer's and that of the arrays that measure the limits
        if ranks.device.type != "cpu":
            torch.accelerator.empty_cache()
        add_limits(record, floor, config, ranks)
        if config.compare == "hub":
            _, _, other = measure(replace(config, experts="hub"), ranks)
            peer.add_other(record, other, config)
        elif config.compare:
            peer.add_peer(record, config, source, ranks)
        if ranks.is_main:
            print(table(record))
            print(strictjson.dumps(record))


def measure(config: BenchConfig, ranks: Ranks) -> tuple[Checkpoint, Floor, Record]:
    """Load, decode, prefill, first tokens. The model and its cache live in here only."""
    llm = open_model(config, config.size, ranks)
    llm.load(positions_needed(llm.architecture, config))
    check_cache(llm.cache, config)
    batches = [Batch.of(size, config.prompt_tokens, llm.architecture.vocab) for size in config.batches]
    begin = time.perf_counter()
    largest = max(batches, key=lambda batch: len(batch.ids_BP))
    for way in config.ways:
        llm.prepare(largest.requests(config.lengths[1], way))
    ready_s = time.perf_counter() - begin

    # First tokens come first: a GPU that has just run at its limit of power is slower for a while.
    first = [measure_first(llm, tokens, config.samples) for tokens in config.first]
    measured: Record = {
        "decode": [measure_decode(llm.engine, ranks, batch, config) for batch in batches],
        "prefill": measure_prefill(llm.engine, ranks, config),
        "first": first,
        "mixed": measure_mixed(llm, config.mixed, config.prompt_tokens, config.samples) if config.mixed else None,
    }
    with profiled(config.runtime.profile, ranks):
        for batch in batches if config.runtime.profile else ():
            llm.engine.generate(batch.requests(PROFILED_TOKENS, config.sampling))
    load_us, peak, cached = zip(
        *ranks.gather([int(1e6 * llm.report.seconds), peak_bytes(ranks.device), llm.cache.nbytes]), strict=True
    )
    record = {
        **conditions("model", llm),
        **{key: getattr(config, key) for key in ("sampling", "prompt_tokens", "lengths", "samples", "repeat")},
        "load_s": max(load_us) / 1e6,
        "ready_s": ready_s,
        "peak_bytes": list(peak),
        "cache_bytes": list(cached),
    }
    return llm.source, floor_of(llm, config.placement), record | measured


def floor_of(llm: LLM, placement: str) -> Floor:
    """The floor under steps of a model that is loaded."""
    ranks, report = llm.ranks, llm.report
    owners = lookup("placement", PLACEMENTS, placement)(llm.architecture.num_experts, ranks.expert_size)
    return Floor.of(
        Manifest.of(llm.source, llm.model, report.quant),
        llm.model,
        DTYPES[report.dtype],
        local=max(map(len, owners.experts)),
        ranks=ranks.expert_size,
    )


def add_limits(record: Record, floor: Floor, config: BenchConfig, ranks: Ranks) -> None:
    """The machine's limits, given or measured (the slowest rank's), and each row's distance to them."""

    def limit(given: float, measured: Callable[[], float]) -> float:
        return given * 1e12 if given else float(min(value for (value,) in ranks.gather([int(measured())])))

    dtype = DTYPES[record["dtype"]]
    bandwidth = limit(config.bandwidth, lambda: measure_bandwidth(ranks.device))
    flops = limit(config.flops, lambda: measure_flops(ranks.device, dtype))
    record |= {"bandwidth": bandwidth, "flops": flops}
    record["measured"] = [key for key in ("bandwidth", "flops") if not getattr(config, key)]

    def step_ms(nbytes: float, prompt: int) -> float:
        return 1e3 * max(nbytes / bandwidth, prompt * floor.prefill_flops() / flops)

    contexts = range(config.prompt_tokens + config.lengths[0], config.prompt_tokens + config.lengths[1])
    for row in record["decode"]:
        row["floor_bytes"] = floor.step_bytes(row["batch"], contexts)
        row["floor_ms"] = step_ms(row["floor_bytes"], 0)
        row["of_floor"] = row["ms"] / row["floor_ms"]
    if record["prefill"]:
        record["prefill"]["limit_tokens_per_s"] = flops / floor.prefill_flops()
    for row in record["first"]:
        row["floor_ms"] = step_ms(floor.step_bytes(0, prompt=row["tokens"]), row["tokens"])
        row["of_floor"] = row["ms"] / row["floor_ms"]
    if mixed := record["mixed"]:
        nbytes = floor.step_bytes(mixed["sequences"], [config.prompt_tokens], prompt=mixed["tokens"])
        mixed["floor_ms"] = step_ms(nbytes, mixed["tokens"])
