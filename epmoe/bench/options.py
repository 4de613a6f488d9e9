"""The benchmark's own keys. All others are epmoe.generate's, with the same checks: `experts=`, `combine=`, `runtime.*`.

A key that the benchmark would ignore is refused.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from epmoe import config
from epmoe.config import GROUPS, KEYS, Config
from epmoe.errors import UserError
from epmoe.weights.synthetic import SIZES

# Keys of epmoe.generate that say nothing to a benchmark, which makes its own prompts and runs as many as it is told.
REFUSED = ("prompt", "prompts", "system", "chat", "output", "max_new_tokens", "sampling", "runtime.max_batch")
PEERS = ("transformers", "hub")


@dataclass(frozen=True)
class Options:
    """What is measured; OWN explains each key."""

    size: str
    batches: tuple[int, ...]
    prompt_tokens: int
    lengths: tuple[int, int]
    prefill: tuple[int, int] | None
    repeat: int
    bandwidth: float
    flops: float
    compare: str


class Own(NamedTuple):
    """A key: its default, what it takes (for messages), how it is read (ValueError: not that), what it means."""

    default: str
    wanted: str
    read: Callable[[str], Any]
    about: str


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _lengths(text: str) -> tuple[int, int]:
    short, long = _counts(text)
    if short >= long:
        raise ValueError
    return short, long


def _prefill(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    batch, tokens = text.split("x")
    return _count(batch), _count(tokens)


def _tera(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def _name(names: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text and text not in names:
            raise ValueError
        return text

    return read


OWN = {
    "size": Own("", f"one of {', '.join(SIZES)}", _name(tuple(SIZES)),
        "random weights of this size, made on the device; with no checkpoint either: 20b, on a CPU tiny"),
    "batches": Own("1,16,64,256", "whole numbers above 0, with commas", _counts, "sequences that decode at a time"),
    "prompt_tokens": Own("128", "a whole number above 0", _count, "random tokens that each sequence begins with"),
    "lengths": Own("32,160", "two whole numbers, the smaller one first", _lengths,
        "new tokens of two runs; a step takes the difference of their times / the difference of their lengths"),
    "prefill": Own("8x2048", "SEQUENCESxTOKENS, or nothing", _prefill, "prompts whose prefill is measured"),
    "repeat": Own("3", "a whole number above 0", _count, "times that each run is repeated; the median counts"),
    "bandwidth": Own("0", "a number from 0", _tera, "TB/s that the floor assumes; 0: measured"),
    "flops": Own("0", "a number from 0", _tera, "TFLOP/s that the prefill's bound assumes; 0: measured"),
    "compare": Own("", f"one of {', '.join(PEERS)}", _name(PEERS), "run this peer on the same checkpoint beside it"),
}  # fmt: skip


def parse(argv: Sequence[str]) -> tuple[Options, Config]:
    """The benchmark's options and the configuration that it shares with epmoe.generate.

    Raises:
        UserError: an unknown key or a value that it does not take; keys that exclude each other.
        SystemExit: after --help and --cfg job.
    """
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(_help())
        raise SystemExit(0)
    text = {name: own.default for name, own in OWN.items()}
    shared = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name in OWN and equals:
            text[name] = value
        else:
            _check_shared(name)
            shared.append(argument)
    values = {name: _read(name, value) for name, value in text.items()}
    options, chosen = Options(**values), config.parse(shared)
    _check(options, chosen)
    return options, chosen


def _read(name: str, text: str) -> Any:
    try:
        return OWN[name].read(text)
    except ValueError:
        raise UserError(f"{name}={text!r} cannot be read: it takes {OWN[name].wanted}") from None


def _check_shared(name: str) -> None:
    """Raises UserError for a key that neither the benchmark nor the configuration has, or that it would ignore."""
    plain = name.lstrip("+~")
    if any(plain == each or plain.startswith(f"{each}.") for each in REFUSED):
        raise UserError(f"{plain} means nothing to a benchmark; its own keys: {', '.join(OWN)}")
    if plain not in KEYS and plain not in GROUPS and not name.startswith("-") and name != "job":
        known = [*OWN, *_shared()]
        close = get_close_matches(plain, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"unknown key {name!r}; known: {', '.join(known)}{hint}")


def _shared() -> list[str]:
    return [name for name in KEYS if not any(name == each or name.startswith(f"{each}.") for each in REFUSED)]


def _check(options: Options, chosen: Config) -> None:
    if options.size and chosen.checkpoint:
        raise UserError(f"size={options.size} and checkpoint={chosen.checkpoint!r} exclude each other: give one")
    if options.compare == "hub":
        raise UserError(
            "compare=hub: the community kernels are one layer, no model: run scripts/bench/moe.py --peer REPOSITORY"
        )
    if options.compare and not chosen.checkpoint:
        raise UserError(f"compare={options.compare} needs files to read: give checkpoint=DIRECTORY")


def check_steps(options: Options, chunk: int) -> None:
    """While prompts are being read, sequences decode in smaller batches. Both runs must come to an end after that.

    Raises:
        UserError: the shorter run ends before.
    """
    most = max(options.batches)
    steps = -(-most * options.prompt_tokens // chunk)
    if steps > options.lengths[0]:
        raise UserError(
            f"batches={most} prompts of {options.prompt_tokens} tokens take {steps} steps of "
            f"runtime.prefill_chunk={chunk}, more than the {options.lengths[0]} of lengths: raise one of the two"
        )


def _help() -> str:
    lines = [
        "Measure decoding and prefill of a model, against what this machine's memory and arithmetic allow.",
        "",
        "  python -m epmoe.bench key=value ...",
        "  torchrun --nproc-per-node N -m epmoe.bench key=value ...",
        "",
        "The table goes to standard output and ends in one line of JSON.",
        "",
        "Keys, each with its default:",
        *(f"  {f'{name}={own.default}':<28} {own.about} ({own.wanted})" for name, own in OWN.items()),
        "",
        "and those of epmoe.generate (see its --help):",
        f"  {', '.join(_shared())}, and presets of mesh and runtime",
    ]
    return "\n".join(lines)
