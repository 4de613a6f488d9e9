"""Prompts: every source, every mistake with its place, the same requests on every rank."""

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tokenizers
from spawn import run_ranks

from epmoe.config.compose import parse
from epmoe.config.schema import Config
from epmoe.engine.request import Request, SamplingParams
from epmoe.errors import UserError
from epmoe.ranks.mesh import Ranks
from epmoe.text.prompts import DEFAULT_PROMPT, encode, get_requests, read
from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.checkpoint import Checkpoint


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, *lines: object) -> str:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    """Ids 0 to 255 are bytes; its template is <|start|>role<|message|>content<|end|> …"""
    return Tokenizer.of(Checkpoint.open(tiny_checkpoint))


def config(*arguments: str) -> Config:
    return parse(["checkpoint=somewhere", *arguments])


def test_command_line_is_taken_as_it_is() -> None:
    (prompt,) = read(config("prompt= a,b=${c} 'd'\n"))
    assert prompt.content == " a,b=${c} 'd'\n"


def test_a_text_file_is_one_prompt(file: Callable[..., str]) -> None:
    (prompt,) = read(config(f"prompts={file('p.txt', 'two', 'lines', '')}"))
    assert prompt.content == "two\nlines\n"  # only the newline that ends the last line is dropped


def test_standard_input_is_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("東京\nline\n".encode())))
    (prompt,) = read(config("prompts=-"))
    assert prompt.content == "東京\nline"


def test_json_lines_have_their_own_sampling(file: Callable[..., str]) -> None:
    name = file(
        "p.jsonl",
        {"prompt": "a\u2028b"},
        "",
        {"prompt": "", "temperature": 1, "top_k": 3, "stop": ["x"], "max_new_tokens": 7, "ignore_eos": True},
        {"messages": [{"role": "user", "content": "hi"}], "seed": 5},
    )
    base = config(f"prompts={name}", "sampling.seed=9", "max_new_tokens=20", "sampling.stop=END")
    one, two, three = read(base)
    assert one.content == "a\u2028b" and one.params == SamplingParams(seed=9, max_new_tokens=20, stop=("END",))
    assert two.params == SamplingParams(seed=9, max_new_tokens=7, stop=("x",), temperature=1, top_k=3, ignore_eos=True)
    assert three.content == [{"role": "user", "content": "hi"}] and three.params.seed == 5
    assert two.origin.endswith("p.jsonl:3")


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL", "p.ndjson", "p.NdJson"])
def test_names_of_files_of_lines(file: Callable[..., str], name: str) -> None:
    assert len(read(config(f"prompts={file(name, {'prompt': 'a'}, {'prompt': 'b'})}"))) == 2
    (whole,) = read(config(f"prompts={file('p.json', {'prompt': 'a'})}"))
    assert whole.content == '{"prompt": "a"}'


BAD_LINES = {
    "not JSON (the key 'prompt' occurs twice)": '{"prompt": "a", "prompt": "b"}',
    "the key 'seed' occurs twice": '{"seed": 1, "prompt": "a", "seed": 1}',
    "the key 'content' occurs twice": '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
    "content[0] is of type 'image_url', but only text is read": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]
    },
    "messages[1] (user): content is neither text nor a list of parts": {
        "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}]
    },
    "messages must be a list of objects, each": {"messages": "Hi"},
    "not JSON": "{",
    "list, expected an object": "[1]",
    "unknown key 'promt'; known: prompt, messages, max_new_tokens, temperature": {"promt": "a"},
    "either prompt or messages": {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
    "give either prompt": {"seed": 1},
    "prompt=3 is not text": {"prompt": 3},
    "messages must be a list": {"messages": []},
    "each with a text `role`": {"messages": [{"content": "a"}]},
    "temperature='hot' is not a number": {"prompt": "a", "temperature": "hot"},
    "temperature=1e-09 is out of range": {"prompt": "a", "temperature": 1e-9},
    "seed=True is not": {"prompt": "a", "seed": True},
    "top_p": {"prompt": "a", "top_p": 1.5},
    "top_p=0.0 is out of range": {"prompt": "a", "top_p": 0.0},
    "stop=": {"prompt": "a", "stop": 3},
    "max_tokens=2 and max_new_tokens=3 are one key in two spellings": {
        "prompt": "a",
        "max_tokens": 2,
        "max_new_tokens": 3,
    },
    "max_new_tokens=2.5 is not": {"prompt": "a", "max_new_tokens": 2.5},
    "max_new_tokens=0 is out of range": {"prompt": "a", "max_new_tokens": 0},
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_a_bad_line_is_named(file: Callable[..., str], message: str) -> None:
    name = file("p.jsonl", {"prompt": "good"}, BAD_LINES[message])
    with pytest.raises(UserError) as error:
        read(config(f"prompts={name}"))
    assert f"{name}:2: " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_is_checked_like_the_command_line(file: Callable[..., str]) -> None:
    """Its keys change a copy of the configuration's, and a mistake says what would be right."""
    name = file("p.jsonl", {"prompt": "a", "top_k": 5, "temperature": 1, "stop": ["${x}", "a"]}, {"prompt": "b"})
    changed, unchanged = (prompt.params for prompt in read(config(f"prompts={name}", "sampling=sample")))
    assert changed == replace(unchanged, top_k=5, temperature=1, stop=("${x}", "a"))
    assert unchanged == SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    for wrong, says in {
        "top_k": "a whole number",
        "ignore_eos": "true or false",
        "stop": "a list of texts",
        "top_p": "=1.5 is out of range",
    }.items():
        with pytest.raises(UserError, match=f"p.jsonl:1: .*{wrong}.*{says.replace('?', '.')}"):
            read(config(f"prompts={file('p.jsonl', {'prompt': 'a', wrong: 1.5})}"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, message in {
        "missing": "No such file",
        ".": "directory",
        "latin": r"not UTF-8 text \(byte 3\)",
        "empty.jsonl": "has no lines",
    }.items():
        with pytest.raises(UserError, match=message):
            read(config(f"prompts={tmp_path / name}"))


def test_without_a_prompt_only_the_embedded_model_runs() -> None:
    with pytest.raises(UserError, match="no prompt"):
        read(config())
    (prompt,) = read(parse([]))
    assert prompt.content == DEFAULT_PROMPT


def text(tokenizer: Tokenizer, *arguments: str) -> str:
    base = config(*arguments)
    (prompt,) = read(base)
    return tokenizer.decode(encode(prompt, tokenizer, base.chat, base.system))


def test_chat_template_is_applied_when_there_is_one(tokenizer: Tokenizer, tiny_checkpoint: Path) -> None:
    chat = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>"
    assert text(tokenizer, "prompt=Hi") == text(tokenizer, "prompt=Hi", "chat=on") == chat
    assert text(tokenizer, "prompt=Hi", "chat=off") == "Hi"
    assert text(tokenizer, "prompt=Hi", "system=Be kind") == "<|start|>system<|message|>Be kind<|end|>" + chat
    plain = Tokenizer(tiny_checkpoint / "tokenizer.json")
    assert text(plain, "prompt=Hi") == "Hi"
    for wrong in ("chat=on", "system=Be kind"):
        with pytest.raises(UserError, match="chat template"):
            text(plain, "prompt=Hi", wrong)


def test_parts_and_nulls_of_a_line(tokenizer: Tokenizer, tiny_checkpoint: Path, file: Callable[..., str]) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    name = file("p.jsonl", {"messages": [{"role": "user", "content": parts, "name": None, "tool_calls": None}]})
    assert text(tokenizer, f"prompts={name}") == text(tokenizer, "prompt=Hi")
    whatever = Tokenizer(tiny_checkpoint / "tokenizer.json", "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    name = file("p.jsonl", {"messages": [{"role": "user", "content": None}]})
    assert text(whatever, f"prompts={name}") == "<>"


def test_a_broken_template_stops_only_who_needs_it(tiny_checkpoint: Path, file: Callable[..., str]) -> None:
    broken = Tokenizer(tiny_checkpoint / "tokenizer.json", "{% for %}")
    assert text(broken, "prompt=Hi", "chat=off") == "Hi"
    lines = file("p.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    for arguments in (["prompt=Hi"], ["prompt=Hi", "chat=on"], [f"prompts={lines}"]):
        with pytest.raises(UserError, match=r"chat template is no valid jinja .*: use chat=off"):
            text(broken, *arguments)


def test_the_developers_words_stay_beside_the_key_system(tiny_checkpoint: Path, file: Callable[..., str]) -> None:
    """A template of one instruction, as gpt-oss has it; a line that it would cut is refused by its number."""
    first = (
        "{% set own = messages[0].role in ['system', 'developer'] %}{% if own %}[{{ messages[0].content }}]{% endif %}"
        "{% for m in messages[1:] if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    one = Tokenizer(tiny_checkpoint / "tokenizer.json", first)
    messages = [{"role": "developer", "content": "Answer in Latin."}, {"role": "user", "content": "Hi"}]
    name = file("p.jsonl", {"messages": messages})
    assert text(one, f"prompts={name}") == "[Answer in Latin.]Hi"
    assert text(one, f"prompts={name}", "system=Be polite.") == "[Be polite.\n\nAnswer in Latin.]Hi"
    name = file("p.jsonl", {"messages": [{"role": "system", "content": "Be polite."}, *messages]})
    with pytest.raises(UserError, match=r"p\.jsonl:1: messages\[1\] \(developer\): .* drops these words"):
        text(one, f"prompts={name}")


def test_a_prompt_that_the_vocabulary_cannot_spell(tmp_path: Path, file: Callable[..., str]) -> None:
    """On the command line, in a line, and in a conversation."""
    vocab = {letter: id for id, letter in enumerate("Hi<user>")}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])).save(str(tmp_path / "tokenizer.json"))
    few = Tokenizer(tmp_path / "tokenizer.json", "<user>{{ messages[0].content }}")
    (prompt,) = read(config("prompt=Hi"))
    assert len(encode(prompt, few, "on", None)) == 8
    for chat, place in (("on", 8), ("off", 2)):
        with pytest.raises(UserError, match=rf"^prompt: the vocabulary .* for '!' \(U\+0021, character {place}"):
            text(few, "prompt=Hi!", f"chat={chat}")
        with pytest.raises(UserError, match=r"p\.jsonl:2: the vocabulary has no token for '!'"):
            for prompt in read(config(f"prompts={file('p.jsonl', {'prompt': 'Hi'}, {'prompt': 'Hi!'})}")):
                encode(prompt, few, chat, None)


def test_messages_need_a_template_and_keep_their_own_system(tokenizer: Tokenizer, file: Callable[..., str]) -> None:
    messages = [{"role": "system", "content": "Mine"}, {"role": "user", "content": "Hi"}]
    name = file("p.jsonl", {"messages": messages})
    assert "Yours" not in text(tokenizer, f"prompts={name}", "system=Yours")
    with pytest.raises(UserError, match=r"p\.jsonl:1: messages need"):
        text(tokenizer, f"prompts={name}", "chat=off")


def test_what_the_template_or_the_tokenizer_refuses_is_named(tokenizer: Tokenizer, file: Callable[..., str]) -> None:
    for content in ({"messages": [{"role": "user"}]}, '{"prompt": "\\ud800"}'):
        with pytest.raises(UserError, match=r"p\.jsonl:1: "):
            text(tokenizer, f"prompts={file('p.jsonl', content)}")
    with pytest.raises(UserError, match="prompt is empty"):
        text(tokenizer, "prompt=")


def requests_of_rank(ranks: Ranks, checkpoint: str, arguments: list[str]) -> list[Request]:
    """Rank 1 has no such file."""
    if not ranks.is_main:
        arguments = [argument.replace("p.jsonl", "missing.jsonl") for argument in arguments]
    return get_requests(parse(arguments), Tokenizer.of(Checkpoint.open(checkpoint)), ranks)


def test_all_ranks_get_rank_zeros_requests(tiny_checkpoint: Path, file: Callable[..., str]) -> None:
    name = file("p.jsonl", {"prompt": "東京", "stop": ["\n", "é"], "temperature": 0.1}, {"prompt": "b", "seed": 2**62})
    first, second = run_ranks(requests_of_rank, 2, str(tiny_checkpoint), [f"prompts={name}", "checkpoint=x"])
    assert first == second
    assert [len(request.ids) > 3 for request in first] == [True, True]
    assert asdict(first[0].params)["stop"] == ("\n", "é") and first[1].params.seed == 2**62


def said_of_chat(ranks: Ranks, tokenizer_file: str, template: str | None, arguments: list[str]) -> list[str]:
    with redirect_stderr(io.StringIO()) as said:
        get_requests(parse(arguments), Tokenizer(Path(tokenizer_file), template), ranks)
    return said.getvalue().splitlines()


def test_auto_says_what_it_chose_for_the_chat_template(tiny_checkpoint: Path) -> None:
    """In one line, on rank 0, for any number of prompts; what was asked for needs no telling."""
    file = str(tiny_checkpoint / "tokenizer.json")
    none = "epmoe: chat=off (auto: the checkpoint has no chat template)"
    for template, chat, says in (
        ("{{ messages[0].content }}", "auto", ["epmoe: chat=on (auto)"]),
        (None, "auto", [none]),
        ("{{ messages[0].content }}", "on", []),
        (None, "off", []),
    ):
        arguments = ["prompt=Hi", f"chat={chat}"]
        assert run_ranks(said_of_chat, 2, file, template, arguments) == [says, []]
