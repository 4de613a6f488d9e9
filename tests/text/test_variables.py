"""Variables: what a template is told, from every place; what it would not read is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epmoe.config.compose import from_keys, parse
from epmoe.errors import UserError
from epmoe.text.prompts import encode, read
from epmoe.text.tokenizer import Tokenizer
from epmoe.text.variables import configured

TEMPLATE = (
    "{{ messages[0].content }}|{{ reasoning_effort | default('medium') }}|{{ tools | tojson }}|{{ documents | tojson }}"
    "|{{ enable_thinking is defined and enable_thinking is false }}|{{ budget | tojson if budget is defined }}|"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
NONE = "medium|null|null|False||"


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint / "tokenizer.json", TEMPLATE, {"bos_token": "<s>"})


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, value: Any) -> str:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return str(tmp_path / name)

    return write


def texts(tokenizer: Tokenizer, *arguments: str) -> list[str]:
    base = parse(["checkpoint=somewhere", *arguments])
    given = configured(base)
    return [tokenizer.decode(encode(each, tokenizer, base.chat, base.system, given)) for each in read(base)]


def test_on_the_command_line(tokenizer: Tokenizer, file: Callable[..., str]) -> None:
    hi = "prompt=Hi"
    assert texts(tokenizer, hi) == [f"Hi|{NONE}"]
    assert texts(tokenizer, hi, "reasoning_effort=high") == ["Hi|high|null|null|False||"]
    assert texts(tokenizer, hi, f"tools={file('t.json', TOOLS)}") == [f"Hi|medium|{json.dumps(TOOLS)}|null|False||"]
    for word, value in {
        "1": "1",
        "-2.5": "-2.5",
        "1e3": "1000.0",
        "true": "true",
        "False": "false",
        "plain text": '"plain text"',
        '"1"': '"1"',
        "[1, 2]": "[1, 2]",
        '{"a": null}': '{"a": null}',
        "é, ${x}=": '"é, ${x}="',
        "": '""',
        "NaN": '"NaN"',
    }.items():
        assert texts(tokenizer, hi, f"template.budget={word}") == [f"Hi|medium|null|null|False|{value}|"], word
    both = "template.enable_thinking=false", 'template.documents=[{"title": "A"}]'
    assert texts(tokenizer, hi, *both) == ['Hi|medium|null|[{"title": "A"}]|True||']
    assert texts(tokenizer, hi, "template.budget=1", "template.budget=2") == ["Hi|medium|null|null|False|2|"]
    assert texts(tokenizer, hi, "template.reasoning_effort=low") == ["Hi|low|null|null|False||"]
    assert texts(tokenizer, hi, f"template.tools={json.dumps(TOOLS)}") == [
        f"Hi|medium|{json.dumps(TOOLS)}|null|False||"
    ]
    assert texts(tokenizer, hi, "template.budget=null", "template.enable_thinking=None") == [f"Hi|{NONE}"]


def test_in_a_line_of_prompts(tokenizer: Tokenizer, file: Callable[..., str]) -> None:
    """In place of the configuration's; null is none of its own and takes the configuration's away."""
    messages = [{"role": "user", "content": "Ho"}]
    lines = [
        {"prompt": "Hi", "reasoning_effort": "high"},
        {"messages": messages, "tools": TOOLS, "temperature": 0.5},
        {"prompt": "Hi", "enable_thinking": False, "budget": {"a": 1}, "documents": [1]},
        {"prompt": "Hi", "reasoning_effort": None, "tools": None, "budget": None},
    ]
    name = file("p.jsonl", "\n".join(json.dumps(line) for line in lines))
    assert texts(tokenizer, f"prompts={name}") == [
        "Hi|high|null|null|False||",
        f"Ho|medium|{json.dumps(TOOLS)}|null|False||",
        'Hi|medium|null|[1]|True|{"a": 1}|',
        f"Hi|{NONE}",
    ]
    base = "reasoning_effort=low", "template.budget=7"
    assert texts(tokenizer, f"prompts={name}", *base) == [
        "Hi|high|null|null|False|7|",
        f"Ho|low|{json.dumps(TOOLS)}|null|False|7|",
        'Hi|low|null|[1]|True|{"a": 1}|',
        f"Hi|{NONE}",
    ]


REFUSED_LINES: dict[str, dict[str, Any]] = {
    "p.jsonl:1: unknown key 'bugdet'; known: prompt, messages, .* (did you mean budget?)": {"bugdet": 1},
    "p.jsonl:1: unknown key 'temprature'; .* (did you mean temperature?)": {"temprature": 1},
    "p.jsonl:1: unknown key 'topk'; .* (did you mean top_k?)": {"topk": 1.5},
    "p.jsonl:1: unknown key 'tool'; .* (did you mean tools?)": {"tool": TOOLS},
    "p.jsonl:1: unknown key 'bos_token'; known": {"bos_token": "x"},
    "p.jsonl:1: unknown key 'add_generation_prompt'; known": {"add_generation_prompt": False},
    "p.jsonl:1: unknown key 'nothing'; known": {"nothing": None},
    "p.jsonl:1: tools are not a list of objects": {"tools": {"type": "function"}},
    "p.jsonl:1: reasoning_effort=3 is not text": {"reasoning_effort": 3},
}


def matches(text: str) -> str:
    """`text` with .* and nothing else as a pattern."""
    for special in "()[]?{}":
        text = text.replace(special, f"\\{special}")
    return f"^.*{text}"


@pytest.mark.parametrize("says", REFUSED_LINES)
def test_a_line_that_is_refused(tokenizer: Tokenizer, file: Callable[..., str], says: str) -> None:
    name = file("p.jsonl", {"prompt": "Hi", **REFUSED_LINES[says]})
    with pytest.raises(UserError, match=matches(says)):
        texts(tokenizer, f"prompts={name}")


REFUSED_WORDS = {
    ("template.nothing=1",): "template.nothing: the checkpoint's chat template reads no variable 'nothing'; it reads: "
    "budget, documents, enable_thinking, reasoning_effort, tools",
    ("template.bos_token=x",): "reads no variable 'bos_token'",
    ("template.messages=[]",): "reads no variable 'messages'",
    ("template.namespace=1",): "reads no variable 'namespace'",
    ("template.add_generation_prompt=false",): "reads no variable 'add_generation_prompt'",
    ("template.budget=[1",): "template.budget='[1' begins like JSON and is none",
    ('template.budget={"a": 1, "a": 2}',): "the key 'a' occurs twice",
    ("template.tools=x",): "the configuration: tools are not a list of objects",
    ("template=x",): "template='x' is not values by name, template.NAME=value",
    ("template.=x",): "unknown key 'template.'",
    ("template.a-b=x",): "unknown key 'template.a-b'",
    ("reasoning_efort=x",): "(did you mean reasoning_effort?)",
    ("reasoning_effort=high", "template.reasoning_effort=low"): "exclude each other",
    ("reasoning_effort=high", "chat=off"): "reasoning_effort needs the checkpoint's chat template: leave it out",
    ("template.budget=1", "chat=off"): "template.budget needs the checkpoint's chat template: leave it out",
    ("tools=/nowhere/t.json",): "tools=/nowhere/t.json cannot be read (No such file or directory)",
}


@pytest.mark.parametrize("words", REFUSED_WORDS)
def test_a_command_line_that_is_refused(tokenizer: Tokenizer, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=matches(REFUSED_WORDS[words])) as caught:
        texts(tokenizer, "prompt=Hi", *words)
    assert "\n" not in str(caught.value)


def test_files_of_tools_that_are_refused(tokenizer: Tokenizer, file: Callable[..., str]) -> None:
    bad = {"{": "is not JSON", '{"a": 1}': "are not a list", "[1]": "are not a list", '[{"a":1,"a":2}]': "occurs twice"}
    for text, says in {**bad, "[{}]": "are not a list"}.items():
        with pytest.raises(UserError, match=rf"^tools=.*t\.json.* {says}"):
            texts(tokenizer, "prompt=Hi", f"tools={file('t.json', text)}")
    tools = f"tools={file('t.json', TOOLS)}"
    with pytest.raises(UserError, match="exclude each other"):
        texts(tokenizer, "prompt=Hi", tools, "template.tools=[]")


def test_a_template_that_reads_none(tiny_checkpoint: Path, file: Callable[..., str]) -> None:
    plain = Tokenizer(tiny_checkpoint / "tokenizer.json", "{{ messages[0].content }}")
    name = file("p.jsonl", {"prompt": "Hi", "tools": TOOLS})
    for words in (["prompt=Hi", "reasoning_effort=high"], [f"prompts={name}"]):
        with pytest.raises(UserError, match=r"reads no variable '(reasoning_effort|tools)'; it reads: none"):
            texts(plain, *words)
    without = Tokenizer(tiny_checkpoint / "tokenizer.json")
    with pytest.raises(UserError, match=r"p\.jsonl:1: tools needs the checkpoint's chat template"):
        texts(without, f"prompts={name}")


def test_a_template_for_tools_reads_its_own(tiny_checkpoint: Path, file: Callable[..., str]) -> None:
    sources = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].function.name }}{{ style }}"}
    two = Tokenizer(tiny_checkpoint / "tokenizer.json", sources)
    tools = f"tools={file('t.json', TOOLS)}"
    assert texts(two, "prompt=Hi", tools, "template.style=x") == ["fx"]
    with pytest.raises(UserError, match="reads no variable 'style'; it reads: none"):
        texts(two, "prompt=Hi", "template.style=x")


def test_in_python() -> None:
    config = from_keys({"reasoning_effort": "high", "template": {"budget": 3, "tags": ["1"]}, "template.more": "1"})
    assert configured(config) == {"budget": 3, "tags": ["1"], "more": "1", "reasoning_effort": "high"}
    for wrong in ({"a b": 1}, {"x": float("inf")}, {"x": object()}, "text"):
        with pytest.raises(UserError, match=r"^template="):
            from_keys({"template": wrong})
    with pytest.raises(UserError, match="tools are not a list of objects"):
        configured(from_keys({"template": {"tools": [1]}}))


def test_the_configuration_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["template.budget=3", 'template.tags=["a"]', "--cfg", "job"])
    assert "template:\n  budget: 3\n  tags:\n  - a\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "template.NAME=value" in capsys.readouterr().out
