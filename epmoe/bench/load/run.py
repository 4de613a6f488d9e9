"""python -m epmoe.bench load=…: requests that come and go, and what their users wait for.

    first token      from the time when a request is due to the time at which a listener on rank 0 hears its first token
    between tokens   the time from one token of an answer to its next, of all answers together
    tokens/s         of all answers, from the first request's time to the last token
    share            of what `LLM.generate` makes of requests of the same lengths and other ids, given all at once (of
                     conversations all first turns, then all second ones), as many at a time as here; it runs before
                     and after, and the faster one counts
    found            tokens of prompts whose keys and values the prefix cache had

Nothing compiles meanwhile. Text is made of every answer, as `generate` does.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from epmoe import strictjson
from epmoe.bench.conditions import Record, conditions, heading, markdown, open_model
from epmoe.bench.load.callers import Served
from epmoe.bench.load.schedule import Due, Traffic, after, at_length, conversations_of, schedule
from epmoe.bench.load.serve import Timed, serve
from epmoe.bench.options import LoadConfig
from epmoe.bench.options import Traffic as Keys
from epmoe.config.compose import parse
from epmoe.config.keys import keys_of
from epmoe.engine.service import Service
from epmoe.errors import UserError
from epmoe.llm import LLM, join
from epmoe.streams import tell

PERCENTS = (50, 90, 99)


def load() -> None:
    words = sys.argv[1:]
    config = parse(words[1:] if words[:1] == ["load"] else words, LoadConfig)
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
    longest = config.turns * (config.prompts.most + config.answers.most)
    if longest > max_positions:
        turns = f"turns={config.turns} with " if config.turns > 1 else ""
        raise UserError(
            f"{turns}prompt_tokens={config.prompt_tokens} and answer_tokens={config.answer_tokens} can be {longest} "
            f"tokens together, and the model has {max_positions} positions: lower one of them"
        )


def measure(llm: LLM, config: LoadConfig) -> Record:
    """The record of a run, on rank 0; a collective."""
    rate = config.rate if config.load == "poisson" else None
    due = schedule(Traffic(config.requests, config.turns, config.prompts, config.answers), rate, config.seed)
    conversations = conversations_of(due, llm.architecture.vocab, config.seed)
    lengths = [at_length(turns) for turns in conversations]
    llm.load([each.cached(llm.architecture.max_positions) for turns in lengths for each in turns])
    service = Service(llm.engine, replace(config.serve, queue_requests=sys.maxsize, queue_tokens=sys.maxsize))
    llm.control = control = Timed(llm.ranks, config.runtime.timeout_s)
    begin = time.perf_counter()
    service.prepare()
    for turn in range(config.turns):
        llm.prepare([turns[turn] for turns in lengths if turn < len(turns)])
    ready_s = time.perf_counter() - begin
    before_s = generate(llm, due, config.seed + 1)  # warms up, too
    if llm.ranks.is_main:
        tell(f"epmoe: ready, {config.requests} requests come")
    llm.ranks.barrier()
    put_back = llm.engine.scheduler.put_back
    served = serve(llm, service, conversations, [each.at_s for each in due] if rate else None, config.users)
    put_back = llm.engine.scheduler.put_back - put_back
    message_us = control.cost_us()
    generate_s = min(before_s, generate(llm, due, config.seed + 2))
    if not llm.ranks.is_main:
        return {}
    return {
        **conditions("load", llm),
        **{name: getattr(config, name) for name in keys_of(Keys)},
        "serve": {"step_tokens": service.step_tokens},
        "load_s": llm.report.seconds,
        "ready_s": ready_s,
        **waited(served, generate_s),
        "put_back": put_back,
        "message_us": message_us if llm.ranks.size > 1 else None,
    }


def generate(llm: LLM, due: Sequence[Due], seed: int) -> float:
    """Seconds of `LLM.generate` for conversations of these lengths, a call for each turn of all; a collective."""
    conversations = conversations_of(due, llm.architecture.vocab, seed)
    llm.ranks.barrier()
    begin = time.perf_counter()
    said: list[tuple[int, ...]] = [()] * len(conversations)
    for turn in range(max(map(len, conversations))):
        asked = {at: after(said[at], turns[turn]) for at, turns in enumerate(conversations) if turn < len(turns)}
        requests = list(asked.values())
        answers = llm.generate([list(each.ids) for each in requests], [each.params for each in requests])
        for at, answer in zip(asked, answers, strict=True):
            said[at] = (*answer.prompt_ids, *answer.ids)
    return time.perf_counter() - begin


def waited(served: Sequence[Served], generate_s: float) -> Record:
    """What the users of these requests waited for; `generate_s` is how long all of them take at once."""
    tokens = sum(len(each.token_s) for each in served)
    seconds = max(each.token_s[-1] for each in served) - served[0].due_s
    later = [each for each in served if each.turn]
    return {
        **first_tokens(served),
        "first_turns": first_tokens([each for each in served if not each.turn]) if later else None,
        "later_turns": first_tokens(later) if later else None,
        "between_ms": percentiles(gap for each in served for gap in each.between_s),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "generate_tokens_per_s": tokens / generate_s,
        "share": generate_s / seconds,
    }


def first_tokens(served: Sequence[Served]) -> Record:
    """Of some requests: their first tokens, and the share of their prompts' tokens that the cache had."""
    cached, all_of_them = sum(each.cached_tokens for each in served), sum(each.prompt_tokens for each in served)
    return {"first_token_ms": percentiles(each.first_s for each in served), "hit_rate": cached / all_of_them}


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
    turns = f"{record['turns']} of a conversation, " if record["turns"] > 1 else ""
    lines = [
        heading(record),
        f"{record['requests']} requests, {come}, {turns}prompts of {record['prompt_tokens']} random tokens, answers of "
        f"{record['answer_tokens']}, seed {record['seed']}; at most {record['runtime']['max_batch']} run at a time, "
        f"a step of answers has {record['serve']['step_tokens']} tokens at most",
        f"load {record['load_s']:.2f} s, then ready in {record['ready_s']:.2f} s",
        "",
    ]
    names = [f"p{each}" for each in PERCENTS]
    measured = [("first token", record["first_token_ms"]), ("between tokens", record["between_ms"])]
    for what in ("first", "later"):
        if part := record[f"{what}_turns"]:
            measured.append((f"first token, {what} turns", part["first_token_ms"]))
    rows = [[what, *(f"{found[name]:.2f}" for name in names)] for what, found in measured if found]
    lines += markdown(["ms", *names], rows)
    lines += [
        "",
        f"{record['tokens']:,} tokens in {record['seconds']:.2f} s: {record['tokens_per_s']:,.0f} tokens/s, "
        f"{100 * record['share']:.1f} % of LLM.generate's {record['generate_tokens_per_s']:,.0f}",
        f"{found_line(record)}; {record['put_back']} times a request was put back",
    ]
    if record["message_us"] is not None:
        lines.append(f"rank 0's orders to the others, a turn: {record['message_us']:.0f} µs")
    return "\n".join(lines)


def found_line(record: Record) -> str:
    """What the prefix cache had, in words."""
    told = f"the prefix cache had {100 * record['hit_rate']:.1f} % of the prompts' tokens"
    parts = [
        f"{100 * record[f'{each}_turns']['hit_rate']:.1f} % of {each} turns'"
        for each in ("first", "later")
        if record[f"{each}_turns"]
    ]
    return f"{told} ({', '.join(parts)})" if parts else told
