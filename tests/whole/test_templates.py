"""The command with a checkpoint's template: variables from every place, refusals of one line on two ranks."""

import json
import subprocess
from pathlib import Path

import pytest
from forked import python
from scripted import scripted

from epmoe.weights.checkpoint import Checkpoint

# As published ones: a leading system or developer message becomes the instructions, behind the reasoning effort.
TEMPLATE = (
    "{%- if messages[0].role in ['system', 'developer'] -%}{%- set rules, rest = messages[0].content, messages[1:] -%}"
    "{%- else -%}{%- set rules, rest = '', messages -%}{%- endif -%}"
    "{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort | default('medium')) + '<|end|>' -}}"
    "{%- if rules or tools -%}{{- '<|start|>developer<|message|>' + rules + (tools | map(attribute='name') | join)"
    " if tools else rules -}}{{- '<|end|>' -}}{%- endif -%}"
    "{%- for m in rest -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endfor -%}"
    "{{- 't' -}}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = scripted(tmp_path_factory.mktemp("ck"), ["t", "ok", "<|return|>"])
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def command(*keys: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return python("-m", "epmoe.generate", "runtime.device=cpu", *keys, ranks=ranks)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a run that failed."""
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("epmoe: error: ")]
    assert done.returncode != 0 and done.stdout == ""
    assert "Traceback (most recent" not in done.stderr.partition("torch")[0] and "panicked" not in done.stderr
    return line.removeprefix("epmoe: error: ")


def test_variables_on_two_ranks(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"name": "f"}]')
    lines = [{"prompt": "Hi"}, {"prompt": "Hi", "reasoning_effort": "low"}, {"prompt": "Hi", "tools": None}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    keys = [f"prompts={tmp_path}/p.jsonl", "reasoning_effort=high", f"tools={tmp_path}/t.json", f"output={tmp_path}/o"]
    done = command(f"checkpoint={checkpoint}", *keys, "max_new_tokens=1", ranks=2)
    assert done.returncode == 0 and done.stdout == "ok\n\nok\n\nok\n", done.stderr
    made = [json.loads(line)["prompt_tokens"] for line in (tmp_path / "o").read_text().splitlines()]
    # high, with the developer's <|start|>developer<|message|>f<|end|>; low; high without a tool
    assert made[0] - made[1] == len("high") - len("low") and made[0] - made[2] == len("developer") + len("f") + 3
    assert done.stderr.splitlines()[-1].endswith("; all 3 answers were cut by max_new_tokens=1")


def test_a_hostile_template_ends_every_rank(checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path / "ck", chat_template="{{ 7 ** (7 ** 9) % 10 }}")
    said = refusal(command(f"checkpoint={path}", "prompt=Hi", ranks=2))
    assert said.startswith("the checkpoint's chat template runs for more than 1 s: use chat=off")
    assert command(f"checkpoint={path}", "prompt=t", "chat=off").stdout == "ok\n"


def test_a_tokenizer_that_panics_or_repeats_itself(checkpoint: Path, tmp_path: Path) -> None:
    text = json.loads((checkpoint / "tokenizer.json").read_text())
    broken = {**text, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    path = copied(checkpoint, tmp_path / "a", tokenizer=json.dumps(broken))
    assert "tokenizer.json cannot be read as a tokenizer (Precompiled" in refusal(command(f"checkpoint={path}"))
    twice = json.dumps(text).replace('"vocab": {', '"vocab": {"!": 1, ', 1)
    path = copied(checkpoint, tmp_path / "b", tokenizer=twice)
    assert "the key '!' occurs twice" in refusal(command(f"checkpoint={path}", "prompt=Hi"))


def copied(checkpoint: Path, path: Path, *, chat_template: str = TEMPLATE, tokenizer: str = "") -> Path:
    """A checkpoint like another, but for a file."""
    path.mkdir()
    for file in checkpoint.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "chat_template.jinja").write_text(chat_template)
    if tokenizer:
        (path / "tokenizer.json").write_text(tokenizer)
    assert Checkpoint.open(path).tokenizer_file is not None
    return path
