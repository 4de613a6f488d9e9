#!/usr/bin/env python3
"""What drafts give, by kind of work: tokens a second with and without, of answers that are forced to real texts.

    scripts/bench/speculation.py DIRECTORY --users 1,8,64 --tokens 512
    scripts/bench/speculation.py "" --tokens 64 --repeat 1                 the embedded model
    scripts/bench/speculation.py "" --tokens 96 --kinds own --draft-model epmoe/demo/eagle3

The weights may be random: a grammar lets each token of an answer be one alone, so prompt lookup meets the acceptance of
the text at the model's whole cost. The texts are this package's own:

    copy      a file, and the file again
    edit      a file, and the file with a name replaced wherever it stands
    json      a table of the configuration's keys, and a list of objects with the same values
    prose     what a file says of itself, and what others say: little of it was said before
    random    ids of no order, of which nothing is ever accepted
    own       not forced: what the model itself says, greedily; for one that is trained, and its draft model

With a grammar the host must have a step's tokens before it can choose the next ones, with and without drafts; `free` is
the rate without grammar and drafts. Both ways take turns on one engine. The rate is that of all tokens after the first.
Ends in a line of JSON.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

import epmoe
from epmoe import LLM, SamplingParams
from epmoe.config.keys import keys_of
from epmoe.config.schema import Config
from epmoe.engine.request import Request, Result
from epmoe.engine.speculation import Speculation

PACKAGE = Path(epmoe.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"), key=lambda each: (-each.stat().st_size, each.as_posix()))

Encode = Callable[[str], list[int]]
Text = tuple[list[int], list[int]]  # prompt and answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--users", default="1", help="answers at a time, with commas")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of a prompt, at most")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each way; the median counts")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of texts, with commas; all but own")
    parser.add_argument("--draft-model", default="", help="that drafts, too")
    options = parser.parse_args()
    users = [int(each) for each in options.users.split(",")]
    runs: list[dict[str, Any]] = []
    how = {"speculate": "auto" if options.draft_model else "ngram", "draft_model": options.draft_model}
    with LLM(options.checkpoint, runtime={"max_batch": max(users)}, **how) as llm:
        encode: Encode = lambda text: llm.tokenizer.encode(text, special=False)  # noqa: E731
        most = min(options.prompt_tokens, llm.architecture.max_positions - options.tokens) - 24  # of a text
        speculation = llm.engine.scheduler.speculation
        for count in users:
            free = rate(llm, [unforced(encode, each, options.tokens) for each in range(count)], None, options.repeat)
            print(f"{count} at a time, free: {free['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
            for kind in options.kinds.split(","):
                if kind == OWN:
                    requests = [unforced(encode, each, options.tokens) for each in range(count)]
                else:
                    requests = [forced(*KINDS[kind](encode, each, most), options.tokens) for each in range(count)]
                without, found = (rate(llm, requests, each, options.repeat) for each in (None, speculation))
                record = {"kind": kind, "users": count, "free": free["tokens_per_s"], "off": without, "drafts": found}
                record["gain"] = found["tokens_per_s"] / without["tokens_per_s"]
                runs.append(record)
                print(line(record), file=sys.stderr)
    print(json.dumps({"bench": "speculation", **how, "tokens": options.tokens, "runs": runs}))


def copy(encode: Encode, number: int, most: int) -> Text:
    ids = encode(FILES[number].read_text())[:most]
    return [*ids, *encode("\n\n# The same again:\n")], ids


def edit(encode: Encode, number: int, most: int) -> Text:
    text = FILES[number].read_text()
    ids = encode(text)[:most]
    changed = text.replace("self.", "this.").replace("int", "integer").replace("sequence", "conversation")
    return [*ids, *encode("\n\n# With other names:\n")], encode(changed)


def table(encode: Encode, number: int, most: int) -> Text:
    keys = [each for name, each in keys_of(Config).items() if not name.startswith("serve")]
    random.Random(number).shuffle(keys)
    rows = [{"name": each.name, "about": each.about, "default": str(each.default)} for each in keys]
    prompt = "\n".join(" | ".join(row.values()) for row in rows)
    return encode(prompt)[:most], encode(json.dumps(rows, indent=2))


def prose(encode: Encode, number: int, most: int) -> Text:
    said = [text.split('"""')[1] for each in FILES if (text := each.read_text()).startswith('"""')]
    random.Random(number).shuffle(said)
    return encode(said[0])[:most], encode("\n\n".join(said[1:]))


def unordered(encode: Encode, number: int, most: int) -> Text:
    chance, known = random.Random(number), sorted(set(encode("".join(each.read_text() for each in FILES[:40]))))
    return chance.choices(known, k=min(most, 128)), chance.choices(known, k=8192)


OWN = "own"
KINDS = {"copy": copy, "edit": edit, "json": table, "prose": prose, "random": unordered}


def forced(prompt: Sequence[int], answer: Sequence[int], tokens: int) -> Request:
    """A request whose answer can be no other."""
    assert len(answer) >= tokens, "the text is too short"
    grammar = "start: " + " ".join(f"<[{id}]>" for id in answer[:tokens])
    return Request(tuple(prompt), SamplingParams(max_new_tokens=tokens, grammar=grammar))


def unforced(encode: Encode, number: int, tokens: int) -> Request:
    prompt, _ = prose(encode, number, 64)
    return Request(tuple(prompt), SamplingParams(max_new_tokens=tokens, ignore_eos=True))


def rate(llm: LLM, requests: Sequence[Request], speculation: Speculation | None, repeat: int) -> dict[str, float]:
    """Tokens a second after each answer's first, tokens of a step and answer, and which share of drafts was right."""
    engine, rates, steps = llm.engine, [], 0
    drafting = speculation and speculation.drafting
    drafted = (drafting.drafted, drafting.accepted) if drafting else (0, 0)
    step = engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    engine.scheduler.lanes[0].speculation, engine.step = speculation, counted  # type: ignore[method-assign]
    engine.generate(requests)  # whatever compiles
    steps = 0
    for _ in range(repeat):
        results: list[Result] = engine.generate(requests)
        tokens = sum(len(each.ids) - 1 for each in results)
        rates.append(tokens / (max(each.total_s for each in results) - min(each.first_token_s for each in results)))
    del engine.step
    tried, right = (drafting.drafted - drafted[0], drafting.accepted - drafted[1]) if drafting else (0, 0)
    return {
        "tokens_per_s": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "tokens_a_step": repeat * tokens / len(requests) / steps,
        "drafted": tried,
        "accepted": right,
    }


def line(run: dict[str, Any]) -> str:
    off, found = run["off"], run["drafts"]
    return (
        f"{run['users']} at a time, {run['kind']}: {off['tokens_per_s']:,.0f} → {found['tokens_per_s']:,.0f} tokens/s, "
        f"{run['gain']:.2f} times; {found['tokens_a_step']:.2f} tokens a step, "
        f"{found['accepted']:,} of {found['drafted']:,} drafted were right"
    )


if __name__ == "__main__":
    main()
