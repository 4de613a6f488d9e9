"""Chat templates and special tokens: from the files that transformers reads, of which the same one wins."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from epmoe.errors import UserError
from epmoe.text.chat_files import chat_of, chat_sources, special_tokens
from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.synthetic import make_checkpoint

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
NAMES = ["bos_token", "eos_token", "pad_token", "unk_token", "think_token", "image_token"]
SHOW = "".join(f"{{{{ {name} | default('none') }}}} " for name in NAMES)


@dataclass(frozen=True)
class Case:
    """What stands in a checkpoint's files, and what comes of it where transformers says nothing."""

    name: str
    files: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # of tokenizer_config.json; None takes a key away
    special: dict[str, Any] | None = None  # special_tokens_map.json


def object_of(text: str, **more: Any) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **more}


LIST = [{"name": "default", "template": "D{{ messages[0].content }}"}, {"name": "tool_use", "template": "T"}]
JINJA = {"chat_template.jinja": "J"}
MORE = {"additional_chat_templates/tool_use.jinja": "A", "additional_chat_templates/rag.jinja": "R"}

TEMPLATES = [
    Case("a file", JINJA),
    Case("text in the config", config={"chat_template": "C"}),
    Case("a list in the config", config={"chat_template": LIST}),
    Case("a list without default", config={"chat_template": LIST[1:]}),
    Case("a name twice", config={"chat_template": [*LIST, {"name": "default", "template": "second"}]}),
    Case("the file before the config", JINJA, {"chat_template": LIST}),
    Case("more files", JINJA | MORE),
    Case("more files before the config", MORE, {"chat_template": "C"}),
    Case("none"),
    Case("null", config={"chat_template": None}),
    Case("empty", {"chat_template.jinja": ""}),
    Case("a mark of the byte order", {"chat_template.jinja": "\ufeff{{ messages[0].content }}"}),
    Case("line ends", {"chat_template.jinja": "a\r\nb\r\n{% if true %}\r\nc{% endif %}\r\n\r\n"}),
]

SPECIALS = [
    Case("texts"),
    Case("an object", config={"bos_token": object_of("<|start|>", __type="AddedToken")}),
    Case("null", config={"bos_token": None}),
    Case("the map wins", special={"bos_token": "<|start|>", "unk_token": "<|end|>"}),
    Case("the map's object wins", special={"bos_token": object_of("<|start|>")}),
    Case("the map's null wins", special={"bos_token": None}),
    Case("the map's own name", special={"think_token": "<|start|>"}),
    Case("the config's own name", config={"think_token": "<|start|>"}),
    Case("the config's own name wins", config={"think_token": "<|start|>"}, special={"think_token": "<|end|>"}),
    Case("names of extra tokens", config={"extra_special_tokens": {"image_token": "<|end|>"}}),
    Case("a list of extra tokens", config={"additional_special_tokens": ["<|end|>"]}),
    Case(
        "the map's extra tokens win",
        config={"extra_special_tokens": {"image_token": "<|end|>", "think_token": "<|end|>"}},
        special={"extra_special_tokens": {"image_token": "<|start|>"}},
    ),
    Case(
        "a decoder of added tokens shuts the map out",
        config={"added_tokens_decoder": {"256": object_of("<|startoftext|>", special=True)}},
        special={"bos_token": "<|start|>", "think_token": "<|start|>"},
    ),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("made"))
    (path / "chat_template.jinja").unlink()
    return path


@pytest.fixture
def laid_out(made: Path, tmp_path: Path) -> Callable[[Case], Path]:
    """The checkpoint with a case's files."""

    def lay_out(case: Case) -> Path:
        for file in made.iterdir():
            (tmp_path / file.name).symlink_to(file)
        config = json.loads((made / "tokenizer_config.json").read_text()) | case.config
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for name, text in case.files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(text.encode())
        if case.special is not None:
            (tmp_path / "special_tokens_map.json").write_text(json.dumps(case.special))
        return tmp_path

    return lay_out


@pytest.mark.parametrize("case", TEMPLATES, ids=lambda case: case.name)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_the_template_is_the_one_that_transformers_takes(
    laid_out: Callable[[Case], Path], case: Case, tools: list[dict[str, Any]] | None
) -> None:
    path = laid_out(case)
    theirs: str | None
    try:
        oracle = AutoTokenizer.from_pretrained(path)
        theirs = oracle.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
    except ValueError:  # it has none, or none for this
        theirs = None
    chat = chat_of(Checkpoint.open(path))
    if chat is None:
        assert theirs is None
    elif theirs is None:
        with pytest.raises(UserError, match=r"chat templates \(.*tool_use\) have none named 'default': use chat=off"):
            chat.render(MESSAGES, tools=tools)
    else:
        assert chat.render(MESSAGES, tools=tools) == theirs


@pytest.mark.parametrize("case", SPECIALS, ids=lambda case: case.name)
def test_special_tokens_are_those_of_transformers(laid_out: Callable[[Case], Path], case: Case) -> None:
    path = laid_out(Case(case.name, {"chat_template.jinja": SHOW}, case.config, case.special))
    theirs = AutoTokenizer.from_pretrained(path).apply_chat_template(MESSAGES, tokenize=False)
    chat = chat_of(Checkpoint.open(path))
    assert chat is not None and chat.render(MESSAGES) == theirs


def test_the_other_spelling_of_an_object(laid_out: Callable[[Case], Path]) -> None:
    """Older checkpoints have it; transformers 5 does not read it."""
    path = laid_out(Case("", config={"bos_token": {"content": "<|start|>"}, "eos_token": {"x": 1}, "pad_token": 3}))
    assert special_tokens(Checkpoint.open(path)) == {"bos_token": "<|start|>"}


def test_a_processors_file_is_the_last_resort(laid_out: Callable[[Case], Path]) -> None:
    last = {"chat_template.json": json.dumps({"chat_template": "P"})}
    path = laid_out(Case("", last))
    assert chat_sources(Checkpoint.open(path)) == {"default": "P"}
    (path / "chat_template.jinja").write_text("J")
    assert chat_sources(Checkpoint.open(path)) == {"default": "J"}


BROKEN = {
    "chat_template.jinja cannot be read as UTF-8": Case("", {"chat_template.jinja": "\udcff"}),
    "no valid jinja": Case("", {"chat_template.jinja": "{% for %}"}),
    "no valid jinja .*unknown": Case("", {"chat_template.jinja": "{% unknown %}"}),
    "chat_template is neither text nor a list": Case("", config={"chat_template": 3}),
    r"tokenizer_config\.json: chat_template is neither": Case("", config={"chat_template": [{"name": "default"}]}),
    r"tokenizer_config.json: chat_template": Case("", config={"chat_template": {"default": "x"}}),
    r"special_tokens_map.json is not valid JSON": Case("", JINJA | {"special_tokens_map.json": "{"}),
    r"chat_template.json is not valid JSON": Case("", {"chat_template.json": "{"}),
}


@pytest.mark.parametrize("says", BROKEN)
def test_a_broken_template_stops_only_who_needs_it(laid_out: Callable[[Case], Path], says: str) -> None:
    case = BROKEN[says]
    path = laid_out(Case("", {}, case.config))
    for name, text in case.files.items():
        (path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    tokenizer = Tokenizer.of(Checkpoint.open(path))
    assert tokenizer.encode("Hi", special=True)
    for _ in range(2):
        with pytest.raises(UserError, match=says) as caught:
            assert tokenizer.chat
        assert "\n" not in str(caught.value)
