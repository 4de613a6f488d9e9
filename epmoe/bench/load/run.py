"""python -m epmoe.bench load=…: requests that come and go, and what their users wait for.

    first token      from the time when a request is due to its first token
    between tokens   the time from one token of an answer to its next, of all answers together
    tokens/s         of all answers, from the first request's time to the last token
    share            of what `LLM.generate` makes of requests of the same lengths and other ids, given all at once, as
                     many at a time as here; it runs before and after, and the faster one counts

Nothing compiles meanwhile: `prepare` has been told of all requests. Text is made of every answer, as `generate` does.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from epmoe import strictjson
from epmoe.bench.conditions import Record, conditions, heading, markdown, open_model
from epmoe.bench.load.arrivals import Arrivals, Concurrent, Poisson, Told
from epmoe.bench.load.schedule import Due, requests_of, schedule
from epmoe.bench.load.serve import Served, serve
from epmoe.bench.options import LoadConfig, Traffic
from epmoe.config.compose import parse
from epmoe.config.keys import keys_of
from epmoe.errors import UserError
from epmoe.llm import LLM, join
from epmoe.ranks.memory import told_when_full
from epmoe.streams import tell

PERCENTS = (50, 90, 99)


def load() -> None:
    config = parse(sys.argv[1:], LoadConfig)
    config = replace(config, runtime=replace(config.runtime, max_batch=config.max_batch))
    with join(config) as ranks:
        llm = open_model(config, config.size, ranks)
        check_lengths(config, llm.architecture.max_positions)
        record = measure(llm, config)
        if ranks.is_main:
            print(table(record))
            print(strictjson.dumps(record))


def check_lengths(config: LoadConfig, max_positions: int) -> None:
    """Raises UserError for requests longer than the model's positions."""
    longest = config.prompts.most + config.answers.most
    if longest > max_positions:
        raise UserError(
            f"prompt_tokens={config.prompt_tokens} and answer_tokens={config.answer_tokens} can be {longest} tokens "
            f"together, and the model has {max_positions} positions: lower one of them"
        )


def measure(llm: LLM, config: LoadConfig) -> Record:
    """The record of a run; a collective."""
    rate = config.rate if config.load == "poisson" else None
    due = schedule(config.requests, rate, config.prompts, config.answers, config.seed)
    requests = requests_of(due, llm.architecture.vocab, config.seed)
    llm.load([request.cached(llm.architecture.max_positions) for request in requests])
    begin = time.perf_counter()
    llm.prepare(requests)
    ready_s = time.perf_counter() - begin
    poisson = Poisson([each.at_s for each in due], Told(llm.ranks, config.runtime.timeout_s)) if rate else None
    arrivals: Arrivals = poisson or Concurrent(config.requests, config.users)
    before_s = generate(llm, due, config.seed + 1)  # warms up, too
    if llm.ranks.is_main:
        tell(f"epmoe: ready, {config.requests} requests come")
    llm.ranks.barrier()
    with told_when_full(llm.ranks.device):
        served = serve(llm, requests, arrivals)
    generate_s = min(before_s, generate(llm, due, config.seed + 2))
    traffic = {name: getattr(config, name) for name in keys_of(Traffic)}
    return {
        **conditions("load", llm),
        **traffic,
        "load_s": llm.report.seconds,
        "ready_s": ready_s,
        **waited(served, generate_s),
        "message_us": poisson.told.cost_us() if poisson and llm.ranks.size > 1 else None,
    }


def generate(llm: LLM, due: Sequence[Due], seed: int) -> float:
    """Seconds of `LLM.generate` for requests of these lengths; a collective."""
    requests = requests_of(due, llm.architecture.vocab, seed)
    llm.ranks.barrier()
    begin = time.perf_counter()
    llm.generate([list(request.ids) for request in requests], [request.params for request in requests])
    return time.perf_counter() - begin


def waited(served: Sequence[Served], generate_s: float) -> Record:
    """What the users of these requests waited for; `generate_s` is how long all of them take at once."""
    tokens = sum(len(each.token_s) for each in served)
    seconds = max(each.token_s[-1] for each in served) - served[0].due_s
    return {
        "first_token_ms": percentiles(each.first_s for each in served),
        "between_ms": percentiles(gap for each in served for gap in each.between_s),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "generate_tokens_per_s": tokens / generate_s,
        "share": generate_s / seconds,
    }


def percentiles(values_s: Iterable[float]) -> dict[str, float] | None:
    """{"p50": …, "p90": …, "p99": …} in milliseconds; None of nothing."""
    found = list(values_s)
    if not found:
        return None
    return {f"p{each}": 1e3 * float(np.percentile(found, each)) for each in PERCENTS}


def table(record: Record) -> str:
    """Conditions and numbers for people, in Markdown."""
    come = {
        "poisson": f"{record['rate']:g} a second at random times",
        "concurrent": f"{record['users']} at a time",
    }[record["load"]]
    lines = [
        heading(record),
        f"{record['requests']} requests, {come}, prompts of {record['prompt_tokens']} random tokens, answers of "
        f"{record['answer_tokens']}, seed {record['seed']}; at most {record['runtime']['max_batch']} run at a time",
        f"load {record['load_s']:.2f} s, then ready in {record['ready_s']:.2f} s",
        "",
    ]
    names = [f"p{each}" for each in PERCENTS]
    rows = [
        [what, *(f"{record[key][name]:.2f}" for name in names)]
        for what, key in (("first token", "first_token_ms"), ("between tokens", "between_ms"))
        if record[key]
    ]
    lines += markdown(["ms", *names], rows)
    lines += [
        "",
        f"{record['tokens']:,} tokens in {record['seconds']:.2f} s: {record['tokens_per_s']:,.0f} tokens/s, "
        f"{100 * record['share']:.1f} % of LLM.generate's {record['generate_tokens_per_s']:,.0f}",
    ]
    if record["message_us"] is not None:
        lines.append(f"rank 0's word to the others before a step: {record['message_us']:.0f} µs")
    return "\n".join(lines)
