"""Whose bits follow the company: the same prompts run in several ways, compared bit for bit.

python -m epmoe.bench bits size=20b
python -m epmoe.bench bits checkpoint=DIRECTORY prompts=8

Prompts of random ids and lengths, every other one sampled at temperature 1, all with log-probabilities. A row of the
table is a way to run them; it says of how many prompts the tokens are those of the first row, and of how many the
log-probabilities too, in every bit.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from epmoe.bench.weights import RandomCheckpoint
from epmoe.config.compose import parse
from epmoe.config.keys import Names, Range, key
from epmoe.config.schema import ModelKeys
from epmoe.engine.config import EngineConfig
from epmoe.engine.drafts import Costs, Drafter, Drafting, History
from epmoe.engine.engine import Engine
from epmoe.engine.request import Finished, Request, Result, SamplingParams, Workload
from epmoe.errors import UserError
from epmoe.llm import LLM, join
from epmoe.moe.exchange.all_to_all import AllToAll
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.hub import resolve

LOGPROBS = 4


@dataclass(frozen=True)
class BitsConfig(ModelKeys):
    """What one run of `epmoe.bench bits` does."""

    subject: ClassVar[str] = "a comparison of bits"
    ignored: ClassVar[tuple[str, ...]] = ("runtime.max_batch", "runtime.prefill_chunk", "runtime.prefix_cache")
    usage: ClassVar[str] = """\
Run the same prompts alone, in batches, in chunks and in another order, and compare every bit.

  python -m epmoe.bench bits key=value ...
  torchrun --nproc-per-node N -m epmoe.bench bits key=value ...

The table goes to standard output and ends in one line of JSON."""

    size: str | None = key(None, "random weights of this size", Names(table="epmoe.weights.synthetic:SIZES"))
    prompts: int = key(32, "prompts that are compared", Range(low=2))
    longest: int = key(300, "tokens of the longest prompt; the shortest has 1", Range(low=2))
    new: int = key(48, "new tokens of each", Range(low=2))
    company: int = key(
        256, "sequences of the largest batch: the prompts, and others that are not compared", Range(low=2)
    )

    def check(self) -> None:
        super().check()
        if self.size and self.checkpoint:
            raise UserError(f"size={self.size} and checkpoint={self.checkpoint!r} exclude each other: give one")


@dataclass(frozen=True)
class Way:
    """A way to run the prompts."""

    name: str
    batch: int  # the most at a time
    chunk: int = 0  # prompt tokens of a step; 0: the default
    graphs: bool = True  # where there can be any
    reverse: bool = False  # the last prompt comes first
    abort: bool = False  # another prompt comes first and is put away while the others run
    others: int = 0  # prompts beside these, which are not compared
    again: bool = False  # the first half of what was answered is part of the prompt, and only the rest is compared
    found: bool = False  # what the way before has left in the cache is found
    drafts: bool = False  # of the tokens that are known to come, one of eight another one
    own: bool = False  # each rank has prompts of its own (mesh.attention=data)


def ways(prompts: int, company: int, attention: str) -> list[Way]:
    """The first one is what the others are compared with.

    With mesh.attention=tensor a rank has no heads for prompts of its own; with `data` each way's engine finds an empty
    cache.
    """
    found = [
        Way(f"a batch of {prompts}", prompts),
        Way("the same again", prompts),
        Way("without CUDA graphs", prompts, graphs=False),
        Way("in another order", prompts, reverse=True),
        Way("after another's abort", prompts, abort=True),
        Way("a batch of 7", 7),
        Way("alone", 1),
        Way("prompts in chunks of 64", prompts, chunk=64),
        Way("prompts in chunks of 1000", prompts, chunk=1000),
        Way(f"among {company}", company, chunk=2000, others=max(0, company - prompts)),
        Way("half of the answer computed again", prompts, again=True),
        Way("prompts found in the cache", prompts, found=True),
        Way("with drafts", prompts, drafts=True),
        Way("with drafts, alone", 1, chunk=64, drafts=True),
        Way("shared out over the ranks", prompts, own=True),
        Way("shared out, alone on each, with drafts", 1, chunk=64, drafts=True, own=True),
    ]
    return [way for way in found if not ((way.own and attention == "tensor") or (way.found and attention == "data"))]


def requests(config: BitsConfig, vocab: int) -> list[Request]:
    """Half of them greedy, half sampled; lengths from 1 to the longest, and such that a chunk leaves a single token."""
    rng = random.Random(0)
    edges = [1, config.longest, *(length for length in (65, 129, 1001) if length < config.longest)]
    lengths = (edges + [rng.randint(1, config.longest) for _ in range(config.prompts)])[: config.prompts]
    return [
        Request(
            tuple(rng.randrange(vocab) for _ in range(length)),
            SamplingParams(
                max_new_tokens=config.new, ignore_eos=True, logprobs=LOGPROBS, temperature=float(index % 2), seed=index
            ),
        )
        for index, length in enumerate(lengths)
    ]


def continued(asked: Sequence[Request], results: Sequence[Result], new: int) -> list[Request]:
    """The prompts with so many tokens of their answers, and what is left of their lengths."""
    return [
        Request(request.ids + result.ids[:new], replace(request.params, max_new_tokens=len(result.ids) - new))
        for request, result in zip(asked, results, strict=True)
    ]


def rest(result: Result, new: int) -> Result:
    """Without the first so many tokens."""
    return replace(result, ids=result.ids[new:], logprobs=result.logprobs[new:])


def others(count: int, vocab: int) -> list[Request]:
    """Short prompts, some of which end before those that are compared."""
    rng = random.Random(1)
    return [
        Request(
            tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 40))), SamplingParams(max_new_tokens=1 + n % 60)
        )
        for n in range(count)
    ]


class Known(History):
    """Drafts an answer that is known, one of eight tokens wrong: the same ones each time."""

    def __init__(self, ids: Sequence[int], answer: Sequence[int]) -> None:
        super().__init__(ids)
        self.answer, self.begin, self.dice = answer, len(ids), random.Random(len(ids))

    def draft(self, most: int) -> list[int]:
        said = self.count - self.begin
        ids = [*self.answer[said : said + most], *[0] * most][:most]
        return [id if self.dice.random() < 7 / 8 else id ^ 1 for id in ids]


class Told(Drafting):
    """Each sequence drafts 0 to 7 tokens, as far as there is room."""

    def allot(self, drafters: Sequence[Drafter], rows: int, room: int) -> list[int]:
        counts: list[int] = []
        for history, most in drafters:
            counts.append(max(0, min(history.count % 8, most, room - sum(counts))))
        return counts


def run(llm: LLM, way: Way, asked: Sequence[Request], known: Sequence[Result] = ()) -> list[Result]:
    """Results in the prompts' order; a collective. `known` are those of another way, for one with drafts."""
    config = replace(
        llm.engine.config,
        max_batch=way.batch,
        prefill_chunk=way.chunk,
        graphs=way.graphs and llm.engine.config.graphs,
        drafts=Costs.of(1, 1) if way.drafts else None,
        attention="data" if way.own else llm.engine.config.attention,
    )
    if way.own and llm.engine.config.attention != "data":
        exchange, before = AllToAll(llm.ranks), [layer.exchange for layer in llm.model.moe_layers()]
        for layer in llm.model.moe_layers():
            layer.exchange = exchange
        try:
            return _run(llm, way, config, asked, known)
        finally:
            for layer, own in zip(llm.model.moe_layers(), before, strict=True):
                layer.exchange = own
    return _run(llm, way, config, asked, known)


def _run(llm: LLM, way: Way, config: EngineConfig, asked: Sequence[Request], known: Sequence[Result]) -> list[Result]:
    if not way.found:
        llm.cache.pages.forget()
    engine = Engine(llm.model, llm.cache, llm.ranks, config)
    if way.drafts:
        answers = {each.ids: result.ids for each, result in zip(asked, known, strict=True)}
        told = Told(Costs.of(1, 1), engine.most_rows, lambda ids: Known(ids, answers.get(tuple(ids), ())))
        for lane in engine.scheduler.lanes:
            assert lane.speculation
            lane.speculation.drafting = told
    ordered = list(asked)[::-1] if way.reverse else list(asked)
    ordered += others(way.others, llm.architecture.vocab)
    engine.prepare(Workload.of(ordered, way.batch))
    other = engine.add(ordered[-1]) if way.abort else None
    ids = [engine.add(request) for request in ordered]
    found: dict[int, Result] = {}
    steps = 0
    while engine.busy:
        found |= {event.id: event.result for event in engine.step() if isinstance(event, Finished)}
        steps += 1
        if steps == 3 and other is not None:
            engine.abort(other)
    engine.graphs.close()
    results = [found[id] for id in ids[: len(asked)]]
    return results[::-1] if way.reverse else results


def compare(found: Sequence[Result], expected: Sequence[Result]) -> tuple[int, int]:
    """Of how many prompts the tokens are the same, and of how many the log-probabilities too, bit for bit."""
    pairs = list(zip(found, expected, strict=True))
    tokens = [mine.ids == theirs.ids for mine, theirs in pairs]
    bits = [mine.logprobs == theirs.logprobs for mine, theirs in pairs]
    return sum(tokens), sum(a and b for a, b in zip(tokens, bits, strict=True))


def bits() -> None:
    config = parse(sys.argv[2:], BitsConfig)
    most = max(config.prompts, config.company)
    config = replace(config, runtime=replace(config.runtime, max_batch=most))
    with join(config) as ranks:
        source = RandomCheckpoint.of(config.size) if config.size else Checkpoint.open(resolve(config.checkpoint))
        llm = LLM.opened(config, ranks, source)
        asked = requests(config, llm.architecture.vocab)
        llm.check(asked)
        needed = [*asked, *others(most - config.prompts, llm.architecture.vocab)]
        llm.load([request.cached(llm.architecture.max_positions) for request in needed])
        rows: list[dict[str, Any]] = []
        first: list[Result] = []
        for way in ways(config.prompts, most, llm.engine.config.attention):
            half = config.new // 2 if way.again else 0
            results = run(llm, way, continued(asked, first, half) if way.again else asked, first)
            first = first or results
            tokens, same = compare(results, [rest(each, half) for each in first])
            cached = sum(each.cached_tokens for each in results)
            rows.append({**asdict(way), "tokens": tokens, "bits": same, "cached_tokens": cached})
        if ranks.is_main:
            print(table(rows, config.prompts))
            print(json.dumps({"bench": "bits", "model": source.path.name, "ranks": ranks.size, "rows": rows}))
        llm.close()


def table(rows: Sequence[dict[str, Any]], prompts: int) -> str:
    """Markdown."""
    lines = [f"| against {rows[0]['name']} | tokens equal | log-probabilities too, bit for bit |", "|---|--:|--:|"]
    lines += [f"| {row['name']} | {row['tokens']} of {prompts} | {row['bits']} of {prompts} |" for row in rows[1:]]
    return "\n".join(lines)
