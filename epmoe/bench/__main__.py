"""The benchmark of a whole model: decode by batch, prefill, loading and memory, against the limits of the machine.

python -m epmoe.bench size=20b                                      random weights, made on the device
torchrun --nproc-per-node 4 -m epmoe.bench checkpoint=DIRECTORY

Everything runs through the engine, as text generation does: random prompts, greedy, the end-of-text token ignored. A
decode step's time is the difference of two runs that differ in their length alone, so prefill, admission and the steps
with part of the batch cancel out:

    ms a step = (t(long) − t(short)) / (long − short)        the median of `repeat` such pairs, after a warm-up

`floor` is what the step's bytes take at the memory's speed (floor.py); `of floor` is time / floor, so 1 is the limit.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from epmoe import strictjson
from epmoe.bench import peer
from epmoe.bench.bits import bits
from epmoe.bench.floor import Floor, measure_bandwidth, measure_flops
from epmoe.bench.options import BenchConfig
from epmoe.bench.weights import RandomCheckpoint
from epmoe.config.compose import parse
from epmoe.engine.engine import Engine, resolve_chunk
from epmoe.engine.request import Request, SamplingParams
from epmoe.errors import UserError
from epmoe.llm import LLM, join
from epmoe.models import ModelConfig
from epmoe.moe.placement import PLACEMENTS
from epmoe.ranks.command import main
from epmoe.ranks.memory import peak_bytes
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.profile import profiled
from epmoe.streams import tell
from epmoe.tables import lookup
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES
from epmoe.weights.hub import resolve
from epmoe.weights.manifest import Manifest

PROFILED_TOKENS = 8  # new tokens of each batch in a trace; a whole run's would be too large to open

Record = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Prompts of random ids."""

    ids_BP: torch.Tensor

    @classmethod
    def of(cls, sequences: int, tokens: int, vocab: int) -> "Batch":
        generator = torch.Generator().manual_seed(sequences)
        return cls(torch.randint(vocab, (sequences, tokens), generator=generator))

    def requests(self, new: int) -> list[Request]:
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        return [Request(tuple(ids), params) for ids in self.ids_BP.tolist()]


def bench() -> None:
    config = parse(sys.argv[1:], BenchConfig)
    with join(config) as ranks:
        chunk = resolve_chunk(config.runtime.prefill_chunk, ranks.device)
        runtime = replace(config.runtime, prefill_chunk=chunk, max_batch=most_sequences(config))
        config = replace(config, runtime=runtime)
        config.check_steps(chunk)
        if config.compare:
            peer.check(ranks.size)
        source = open_source(config, ranks)
        record = conditions(config, ranks, source)
        floor, ours = measure(config, ranks, source)
        record |= ours
        gc.collect()  # the model is gone: its memory is the peer's and that of the arrays that measure the limits
        if ranks.device.type != "cpu":
            torch.accelerator.empty_cache()
        add_limits(record, floor, config, ranks)
        if config.compare:
            add_peer(record, config, source, ranks)
        if ranks.is_main:
            print(table(record))
            print(strictjson.dumps(record))


def open_source(config: BenchConfig, ranks: Ranks) -> Checkpoint:
    """The checkpoint that was asked for, or random weights; says on standard error which size was chosen."""
    if config.checkpoint:
        return Checkpoint.open(resolve(config.checkpoint))
    size = config.size or ("tiny" if ranks.device.type == "cpu" else "20b")
    if not config.size and ranks.is_main:
        tell(f"epmoe: neither checkpoint nor size given: size={size}")
    return RandomCheckpoint.of(size)


def conditions(config: BenchConfig, ranks: Ranks, source: Checkpoint) -> Record:
    """What a reader must know to compare the numbers."""
    accelerated = ranks.device.type != "cpu"
    return {
        "bench": "model",
        "model": source.path.name,
        "device": torch.get_device_module(ranks.device).get_device_name(ranks.device) if accelerated else "cpu",
        "ranks": ranks.size,
        "nodes": ranks.nodes,
        "torch": torch.__version__,
        "triton": _release("triton"),
        "prompt_tokens": config.prompt_tokens,
        "lengths": list(config.lengths),
        "repeat": config.repeat,
        "runtime": asdict(config.runtime),
    }


def most_sequences(config: BenchConfig) -> int:
    """Of all that is measured: what runtime.max_batch is to a benchmark."""
    return max([*config.batches, config.prefill[0] if config.prefill else 1])


def measure(config: BenchConfig, ranks: Ranks, source: Checkpoint) -> tuple[Floor, Record]:
    """Load, decode, prefill. The model and its cache live in here only."""
    llm = LLM.opened(config, ranks, source)
    largest = largest_work(llm.architecture, config)
    llm.load(positions_needed(llm.architecture, config))
    if llm.cache.tokens < largest.positions:
        raise UserError(
            f"{largest.key} needs {largest.positions} positions of the key/value cache, and {llm.cache.tokens} fit: "
            "lower it, or raise runtime.cache_tokens where that was set"
        )
    vocab = llm.architecture.vocab
    batches = [Batch.of(size, config.prompt_tokens, vocab) for size in config.batches]
    begin = time.perf_counter()
    llm.prepare(max(batches, key=lambda batch: len(batch.ids_BP)).requests(config.lengths[1]))
    ready_s = time.perf_counter() - begin

    decode = [measure_decode(llm.engine, ranks, batch, config) for batch in batches]
    prefill = None
    if config.prefill:
        prefill = measure_prefill(llm.engine, ranks, Batch.of(*config.prefill, vocab), config)
    with profiled(config.runtime.profile, ranks):
        for batch in batches if config.runtime.profile else ():
            llm.engine.generate(batch.requests(PROFILED_TOKENS))
    report, cache = llm.report, llm.cache
    load_us, peak, cached = zip(
        *ranks.gather([int(1e6 * report.seconds), peak_bytes(ranks.device), cache.nbytes]), strict=True
    )
    owners = lookup("placement", PLACEMENTS, config.placement)(llm.architecture.num_experts, ranks.expert_size)
    floor = Floor.of(
        Manifest.of(source, llm.model, report.quant),
        llm.architecture,
        DTYPES[report.dtype],
        local=max(map(len, owners.experts)),
        ranks=ranks.expert_size,
    )
    chosen = {key: getattr(report, key) for key in ("dtype", "quant", "experts", "router", "combine")}
    seconds = {"load_s": max(load_us) / 1e6, "ready_s": ready_s, "graphs": llm.engine.config.graphs}
    memory = {"peak_bytes": list(peak), "cache_bytes": list(cached)}
    return floor, chosen | seconds | memory | {"decode": decode, "prefill": prefill}


@dataclass(frozen=True)
class Work:
    """What is measured at a time, and the key that asks for it."""

    sequences: int
    length: int  # of each, in positions
    key: str

    @property
    def positions(self) -> int:
        return self.sequences * self.length


def all_work(model: ModelConfig, config: BenchConfig) -> list[Work]:
    """Raises UserError for a prompt and its new tokens that exceed the model's positions."""
    work = [Work(size, config.prompt_tokens + config.lengths[1], f"batches={size}") for size in config.batches]
    if config.prefill:
        work.append(Work(config.prefill[0], config.prefill[1] + 1, "prefill={}x{}".format(*config.prefill)))
    for each in work:
        if each.length > model.max_positions:
            raise UserError(
                f"{each.key} needs {each.length} positions for a prompt and its new tokens, and the model has "
                f"{model.max_positions}: lower prompt_tokens, lengths or prefill"
            )
    return work


def largest_work(model: ModelConfig, config: BenchConfig) -> Work:
    """What needs the most pages."""
    return max(all_work(model, config), key=lambda work: work.sequences * -(-work.length // config.runtime.page))


def positions_needed(model: ModelConfig, config: BenchConfig) -> list[int]:
    """For room for every batch at once, so that all its sequences do decode together.

    As many requests as the most sequences, together as long as the largest batch.
    """
    largest, longest = largest_work(model, config), max(work.length for work in all_work(model, config))
    others = most_sequences(config) - largest.sequences
    return [longest] * largest.sequences + [config.runtime.page] * others


def seconds(engine: Engine, ranks: Ranks, batch: Batch, new: int) -> tuple[float, float]:
    """Seconds until all sequences have `new` tokens, and until each has its first."""
    ranks.barrier()
    results = engine.generate(batch.requests(new))
    assert all(len(result.ids) == new for result in results)
    return max(result.total_s for result in results), max(result.first_token_s for result in results)


def measure_decode(engine: Engine, ranks: Ranks, batch: Batch, config: BenchConfig) -> Record:
    """One row of the table, without its floor."""
    short, long = config.lengths
    seconds(engine, ranks, batch, short)
    steps, first = [], []
    for _ in range(config.repeat):
        whole, first_token = seconds(engine, ranks, batch, long)
        less, _ = seconds(engine, ranks, batch, short)
        steps.append((whole - less) / (long - short))
        first.append(first_token)
    step, size = statistics.median(steps), len(batch.ids_BP)
    if ranks.is_main:  # a run that is cut short has not been for nothing
        tell(f"epmoe: batch {size}: {1e3 * step:.3f} ms a step")
    return {
        "batch": size,
        "ms": 1e3 * step,
        "tokens_per_s": size / step,
        "first_token_ms": 1e3 * statistics.median(first),
        "ms_of_each": [1e3 * each for each in steps],
    }


def measure_prefill(engine: Engine, ranks: Ranks, batch: Batch, config: BenchConfig) -> Record:
    """Seconds from prompts to the first token of the last of them."""
    seconds(engine, ranks, batch, 1)
    taken = statistics.median(seconds(engine, ranks, batch, 1)[0] for _ in range(config.repeat))
    sequences, tokens = batch.ids_BP.shape
    return {"sequences": sequences, "tokens": tokens, "s": taken, "tokens_per_s": sequences * tokens / taken}


def add_limits(record: Record, floor: Floor, config: BenchConfig, ranks: Ranks) -> None:
    """The machine's limits, given or measured (the slowest rank's), and each row's distance to them."""

    def limit(given: float, measured: Callable[[], float]) -> float:
        return given * 1e12 if given else float(min(value for (value,) in ranks.gather([int(measured())])))

    dtype = DTYPES[record["dtype"]]
    bandwidth = limit(config.bandwidth, lambda: measure_bandwidth(ranks.device))
    flops = limit(config.flops, lambda: measure_flops(ranks.device, dtype))
    record |= {"bandwidth": bandwidth, "flops": flops}
    record["measured"] = [key for key in ("bandwidth", "flops") if not getattr(config, key)]
    contexts = range(config.prompt_tokens + config.lengths[0], config.prompt_tokens + config.lengths[1])
    for row in record["decode"]:
        row["floor_bytes"] = floor.step_bytes(row["batch"], contexts)
        row["floor_ms"] = 1e3 * row["floor_bytes"] / bandwidth
        row["of_floor"] = row["ms"] / row["floor_ms"]
    if record["prefill"]:
        record["prefill"]["limit_tokens_per_s"] = flops / floor.prefill_flops()


def add_peer(record: Record, config: BenchConfig, source: Checkpoint, ranks: Ranks) -> None:
    """The same measurements of transformers; None where its memory ran out."""
    quantised = bool(source.config.get("quantization_config"))
    other = peer.Transformers(source.path, quantised, DTYPES[record["dtype"]], ranks.device)
    facts = {"release": other.release, "experts": other.experts, "load_s": other.load_s}
    record["peer"] = {"name": config.compare, **facts}
    short, long = config.lengths
    vocab = source.config["vocab_size"]

    def difference(ids_BP: torch.Tensor) -> float | None:
        whole, less = other.seconds(ids_BP, long), other.seconds(ids_BP, short)
        return None if whole is None or less is None else (whole - less) / (long - short)

    for row in record["decode"]:
        ids_BP = Batch.of(row["batch"], config.prompt_tokens, vocab).ids_BP
        other.seconds(ids_BP, short)
        steps = [step for step in (difference(ids_BP) for _ in range(config.repeat)) if step is not None]
        row["peer_ms"] = 1e3 * statistics.median(steps) if steps else None
        row["speedup"] = row["peer_ms"] / row["ms"] if steps else None
    if config.prefill:
        ids_BP = Batch.of(*config.prefill, vocab).ids_BP
        other.seconds(ids_BP, 1)
        times = [taken for taken in (other.seconds(ids_BP, 1) for _ in range(config.repeat)) if taken is not None]
        record["prefill"]["peer_tokens_per_s"] = ids_BP.numel() / statistics.median(times) if times else None


def table(record: Record) -> str:
    """Conditions and numbers for people, in Markdown."""
    short, long = record["lengths"]
    source = {key: "measured" if key in record["measured"] else "given" for key in ("bandwidth", "flops")}
    lines = [
        f"{record['model']} on {record['ranks']} x {record['device']} (nodes: {record['nodes']}), {record['dtype']}, "
        f"quant {record['quant']}, experts {record['experts']}, router {record['router']}, "
        f"combine {record['combine']}, graphs {'on' if record['graphs'] else 'off'}; "
        f"torch {record['torch']}, triton {record['triton']}",
        f"prompts of {record['prompt_tokens']} random tokens, a step = (t({long}) - t({short})) / {long - short}, "
        f"median of {record['repeat']}, prefill in chunks of {record['runtime']['prefill_chunk']}",
        f"limits: {record['bandwidth'] / 1e12:.3g} TB/s ({source['bandwidth']}), "
        f"{record['flops'] / 1e12:.3g} TFLOP/s ({source['flops']})",
        f"load {record['load_s']:.2f} s, then ready in {record['ready_s']:.2f} s; memory of a rank at most "
        f"{max(record['peak_bytes']) / 1e9:.2f} GB, cache {max(record['cache_bytes']) / 1e9:.2f} GB of it",
    ]
    if compared := "peer" in record:
        other = record["peer"]
        lines.append(
            f"peer: {other['name']} {other['release']}, experts {other['experts']}, load {other['load_s']:.2f} s"
        )
    lines.append("")
    heads = ["batch", "ms a step", "tokens/s", "first token, ms", "GB to read", "floor, ms", "of floor"]
    heads += ["peer, ms", "speedup"] if compared else []
    lines += ["| " + " | ".join(heads) + " |", "|" + "--:|" * len(heads)]
    for row in record["decode"]:
        cells = [
            f"{row['batch']}",
            f"{row['ms']:.3f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['first_token_ms']:.1f}",
            f"{row['floor_bytes'] / 1e9:.4g}",
            f"{row['floor_ms']:.4g}",
            f"{row['of_floor']:.2f}",
        ]
        if compared:
            cells += ["memory", ""] if row["peer_ms"] is None else [f"{row['peer_ms']:.2f}", f"{row['speedup']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if prefill := record["prefill"]:
        line = (
            f"prefill {prefill['sequences']} x {prefill['tokens']}: {prefill['s']:.3f} s, "
            f"{prefill['tokens_per_s']:,.0f} tokens/s, arithmetic allows {prefill['limit_tokens_per_s']:,.0f}"
        )
        if compared:
            theirs = prefill["peer_tokens_per_s"]
            line += f"; {record['peer']['name']}: " + ("out of memory" if theirs is None else f"{theirs:,.0f}")
        lines += ["", line]
    return "\n".join(lines)


def _release(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main(bits if sys.argv[1:2] == ["bits"] else bench)
