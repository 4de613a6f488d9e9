"""What is done to an input: a kind and a seed say it all, so that a case can be run again.

header     a safetensors file's header, as JSON or as bytes
config     config.json                index        model.safetensors.index.json
tokenizer  tokenizer.json             beside       tokenizer_config, generation_config, special tokens
template   the chat template          prompts      a file of prompts, JSON lines or not
keys       the command line
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmoe.config.keys import keys_of
from epmoe.config.schema import Config

INDEX = "model.safetensors.index.json"
BESIDE = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
CONVERSATION = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}
LINES: tuple[dict[str, Any], ...] = (
    {"prompt": "Hello, you"},
    {"prompt": "é ü 中", "temperature": 0.7, "seed": 3, "stop": ["a", "bb"]},
    {**CONVERSATION, "max_new_tokens": 3, "logprobs": 2},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "top_p": 0.5},
)

# JSON texts, not values: among them are some that Python cannot write.
HOSTILE = (
    *("0", "-1", "1", "2", "7", "31", "-0.0", "0.5", "1e-320", "1e308", "1e999", "4294967296", "2147483647"),
    *("9223372036854775808", "1" * 400, "9" * 5000, "NaN", "-Infinity", "null", "true", "false", '""', '"x"'),
    *('"\\ud800"', '"\\u0000"', '"../../x"', '"NaN"', '"1"', '"{{"', '"*"', "[]", "{}", "[[]]", "[0]", "[null]"),
    *('"' + "x" * 100_000 + '"', "[" * 3000 + "]" * 3000, "[" + "0," * 50_000 + "0]", '"' + "*a" * 40 + '"'),
)
JINJA = (
    *("{% for m in messages %}", "{% endfor %}", "{{ messages[0].content }}", "{{ x }}", "{% if", "}}", "{{ '' * 9 }}"),
    *("{% for a in range(10**9) %}{% endfor %}", "{{ 'x' * 10**9 }}", "{{ 9 ** 9 ** 9 }}", "{{ messages | tojson }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('no') }}", "{{ ''.__class__ }}", "{#"),
    *("{{ '%1000000000d' % 1 }}", "{% set ns = namespace(x=[]) %}", "{{ [1] * 10**9 }}", "{{ cycler }}", "{{ 1 / 0 }}"),
)


@dataclass(frozen=True)
class Damage:
    """What was done, in words, and the keys of the command that runs on it."""

    words: str
    keys: tuple[str, ...]
    may_change: bool  # whether other text than the clean run's can be right


def do(kind: str, seed: int, folder: Path) -> Damage:
    """Damage the checkpoint in `folder`, a copy of one's own."""
    rng = random.Random(f"{kind} {seed}")
    return {**KINDS, "nothing": _nothing}[kind](rng, folder)


def _run(folder: Path, *more: str, chat: str = "off") -> tuple[str, ...]:
    """A sampled text tells what a greedy one would not: the last bits of a logit."""
    return (f"checkpoint={folder}", f"chat={chat}", "max_new_tokens=12", "sampling.temperature=1", *more)


def _header(rng: random.Random, folder: Path) -> Damage:
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        words, damaged = changed_bytes(rng, data[: 8 + length])
        file.write_bytes(damaged + data[8 + length :])
    else:
        words, text = changed_json(rng, data[8 : 8 + length].decode())
        header = text.encode("utf-8", "surrogatepass")
        size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 1 << 40, length))
        file.write_bytes(size.to_bytes(8, "little") + header + data[8 + length :])
    # Two tensors of one shape that change places are another checkpoint, as sound as the first.
    return Damage(words, _run(folder, "prompt=Hello, you"), may_change="swap" in words)


def _file(name: str, *, may_change: bool, chat: str = "off") -> Callable[[random.Random, Path], Damage]:
    def damage(rng: random.Random, folder: Path) -> Damage:
        words = _spoil(rng, folder / name)
        prompt = "prompt=Hello, you" if chat == "off" or rng.random() < 0.5 else _lines(folder, LINES)
        return Damage(f"{name}: {words}", _run(folder, prompt, chat=chat), may_change)

    return damage


def _beside(rng: random.Random, folder: Path) -> Damage:
    file = folder / rng.choice(BESIDE)
    if not file.exists():
        file.write_text('{"bos_token": "<|startoftext|>", "eos_token": {"content": "<|return|>"}}')
    words = _spoil(rng, file)
    return Damage(f"{file.name}: {words}", _run(folder, _lines(folder, LINES), chat="on"), may_change=True)


def _spoil(rng: random.Random, file: Path) -> str:
    if rng.random() < 0.2:
        words, data = changed_bytes(rng, file.read_bytes())
        file.write_bytes(data)
        return words
    words, text = changed_json(rng, file.read_text(encoding="utf-8"))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    return words


def _template(rng: random.Random, folder: Path) -> Damage:
    file = folder / "chat_template.jinja"
    text = file.read_text()
    at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    pieces = [rng.choice(JINJA) for _ in range(rng.randrange(1, 4))]
    way = rng.randrange(4)
    if way == 0:
        text = text[:at] + text[end:]
    elif way == 1:
        text = text[:at] + "".join(pieces) + text[at:]
    elif way == 2:
        text = "".join(pieces)
    else:
        text = text[:end] + text[at:]
    file.write_text(text)
    return Damage(f"template {text[:200]!r}", _run(folder, _lines(folder, LINES), chat="on"), may_change=True)


def _prompts(rng: random.Random, folder: Path) -> Damage:
    lines = [json.dumps(each) for each in rng.sample(LINES, rng.randrange(1, 4))]
    where = rng.randrange(len(lines))
    if rng.random() < 0.15:
        words, data = changed_bytes(rng, "\n".join(lines).encode())
    else:
        words, lines[where] = changed_json(rng, lines[where])
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    file = folder / rng.choice(("p.jsonl", "p.JSONL", "p.ndjson", "p.txt"))
    file.write_bytes(data)
    chat = "off" if file.suffix == ".txt" else rng.choice(("on", "auto"))
    return Damage(f"{file.name}: {words}", _run(folder, f"prompts={file}", chat=chat), may_change=True)


def _keys(rng: random.Random, folder: Path) -> Damage:
    known = [name for name in keys_of(Config) if name not in ("checkpoint", "runtime.device", "runtime.profile")]
    values = [*HOSTILE[:35], "auto", "on", "a b", "[1,2]", "{a: 1}", "null", "", "-", "/nowhere/x", "${x}", "'"]
    chosen = {rng.choice(known): rng.choice(values) for _ in range(rng.randrange(1, 4))}
    chosen = {
        name: folder.name if name == "output" and value.startswith("/") else value for name, value in chosen.items()
    }
    more = [f"{name}={value}" for name, value in chosen.items()]
    if rng.random() < 0.15:
        more.append(
            rng.choice(("x=1", "runtime=", "=", "+a=1", "~runtime", "--version", "sampling", "prompt", "\udcff=1"))
        )
    keys = ("prompt=Hello, you", f"checkpoint={folder}", "max_new_tokens=4", *more)
    return Damage(" ".join(more)[:300], keys, may_change=True)


def _lines(folder: Path, lines: tuple[dict[str, Any], ...]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return f"prompts={file}"


def changed_bytes(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    ways = {
        "cut off": data[:at],
        "a piece lost": data[:at] + data[end:],
        "a piece twice": data[:end] + data[at:],
        "bytes put in": data[:at] + noise + data[at:],
        "bytes overwritten": data[:at] + noise + data[at + len(noise) :],
        "zeros": data[:at] + bytes(min(end - at, 64)) + data[at + min(end - at, 64) :],
    }
    words = rng.choice(sorted(ways))
    return f"{words} at {at} of {len(data)}", ways[words]


def changed_json(rng: random.Random, text: str) -> tuple[str, str]:
    """One or two changes to a JSON text, spelled by hand where Python would not write them."""
    value, marks, words = json.loads(text), {}, []
    for number in range(1 if rng.random() < 0.8 else 2):
        mark = f"@@{number}@@"
        done = _change(rng, value, mark)
        marks[f'"{mark}"'], said = done
        words.append(said)
    changed = json.dumps(value)
    for mark, spelled in marks.items():
        changed = changed.replace(mark, spelled)
    return "; ".join(words), changed


def _change(rng: random.Random, value: Any, mark: str) -> tuple[str, str]:
    """Change `value` in place; what `mark` stands for in its text, and words."""
    places: list[tuple[Any, Any, str]] = []

    def walk(at: Any, path: str) -> None:
        items = list(at.items()) if isinstance(at, dict) else list(enumerate(at)) if isinstance(at, list) else []
        for key, inner in items[:400]:
            places.append((at, key, f"{path}.{key}"))
            walk(inner, f"{path}.{key}")

    walk(value, "")
    if not places:
        return "0", "nothing to change"
    # A large vocabulary must not take all the choices.
    depth = rng.choice(sorted({path.count(".") for _, _, path in places}))
    holder, key, path = rng.choice([each for each in places if each[2].count(".") == depth])
    old, hostile = holder[key], rng.choice(HOSTILE)
    way = rng.choice(("set", "set", "set", "lose", "again", "rename", "swap"))
    if way == "lose":
        del holder[key]
    elif way == "again" and isinstance(holder, dict):
        holder[key] = mark
        return f"{json.dumps(old)}, {json.dumps(key)}: {hostile}", f"{path} again as {hostile[:40]}"
    elif way == "rename" and isinstance(holder, dict) and len(key) > 1:
        at = rng.randrange(len(key) - 1)
        holder[key[:at] + key[at + 1] + key[at] + key[at + 2 :]] = holder.pop(key)
    elif way == "swap":
        other, place, _ = rng.choice(places)
        if place in (other if isinstance(other, dict) else range(len(other))):
            holder[key], other[place] = json.loads(json.dumps(other[place])), json.loads(json.dumps(old))
    else:
        holder[key] = mark
        return hostile, f"{path} = {hostile[:60]}"
    return "0", f"{way} {path}"


def _nothing(rng: random.Random, folder: Path) -> Damage:
    return Damage("nothing", _run(folder, "prompt=Hello, you"), may_change=False)


KINDS: dict[str, Callable[[random.Random, Path], Damage]] = {
    "header": _header,
    "config": _file("config.json", may_change=True),
    "index": _file(INDEX, may_change=False),
    "tokenizer": _file("tokenizer.json", may_change=True),
    "beside": _beside,
    "template": _template,
    "prompts": _prompts,
    "keys": _keys,
}
