"""Inputs: output= takes the place of nothing that a run reads, under no name of it."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from epmoe.config.compose import conf_dir, parse
from epmoe.errors import UserError
from epmoe.text.inputs import check_output_is_no_input
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.synthetic import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = make_checkpoint(tmp_path_factory.mktemp("made"), shards=2)
    (path / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tool_use.jinja", "special_tokens_map.json", "old.jsonl"):
        (path / name).write_text("{}")
    return Checkpoint.open(path)


def check(checkpoint: Checkpoint, output: Path | str, prompts: Path | str = "") -> None:
    arguments = [f"prompts={prompts}"] if prompts else ["prompt=Hi"]
    check_output_is_no_input(parse([f"output={output}", *arguments]), checkpoint)


def by_itself(file: Path, place: Path) -> Path:
    return file


def by_a_link(file: Path, place: Path) -> Path:
    (place / "link").symlink_to(file)
    return place / "link"


def by_a_hard_link(file: Path, place: Path) -> Path:
    os.link(file.resolve(), place / "hard")
    return place / "hard"


def by_a_detour(file: Path, place: Path) -> Path:
    (place / "there").symlink_to(file.parent)
    return place / "there" / ".." / file.parent.name / file.name


NAMES = [by_itself, by_a_link, by_a_hard_link, by_a_detour]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_of_prompts(checkpoint: Checkpoint, tmp_path: Path, name: Callable[[Path, Path], Path]) -> None:
    (tmp_path / "in").mkdir()
    prompts = tmp_path / "in" / "p.jsonl"
    prompts.write_text('{"prompt": "Hi"}')
    output = name(prompts, tmp_path)
    with pytest.raises(
        UserError, match=r"^output=.* is the file of prompts, which this run reads: choose another file$"
    ):
        check(checkpoint, output, prompts)
    with pytest.raises(UserError, match="the file of prompts"):
        check(checkpoint, prompts, output)
    check(checkpoint, tmp_path / "other.jsonl", prompts)
    os.link(prompts, tmp_path / "other.jsonl.unfinished")
    with pytest.raises(UserError, match="is written by way of the file of prompts"):
        check(checkpoint, tmp_path / "other.jsonl", prompts)
    check(checkpoint, output)
    check(checkpoint, "", prompts)
    check(checkpoint, output, tmp_path / "missing")  # for `read` to say


@pytest.mark.parametrize("name", NAMES)
def test_the_file_of_tools(checkpoint: Checkpoint, tmp_path: Path, name: Callable[[Path, Path], Path]) -> None:
    (tmp_path / "in").mkdir()
    (tools := tmp_path / "in" / "t.json").write_text("[]")
    output = name(tools, tmp_path)
    with pytest.raises(UserError, match=r"^output=.* is the file of tools, which this run reads"):
        check_output_is_no_input(parse([f"output={output}", "prompt=Hi", f"tools={tools}"]), checkpoint)
    check_output_is_no_input(parse([f"output={output}", "prompt=Hi", "tools=/missing"]), checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoints_files(checkpoint: Checkpoint, tmp_path: Path, name: Callable[[Path, Path], Path]) -> None:
    read = [file for file in checkpoint.path.rglob("*") if file.is_file() and file.name != "old.jsonl"]
    assert len(read) == 10
    for number, file in enumerate(read):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(UserError, match=rf"is the checkpoint's {file.name}, which this run reads"):
            check(checkpoint, name(file, tmp_path / str(number)))
    check(checkpoint, checkpoint.path / "old.jsonl")
    odd = replace(checkpoint, files=(checkpoint.path / "old.jsonl",))  # an index may give its files any name
    with pytest.raises(UserError, match=r"is the checkpoint's old\.jsonl"):
        check(odd, checkpoint.path / "old.jsonl")


def test_names_that_the_next_run_would_read(checkpoint: Checkpoint) -> None:
    for name in ("chat_template.json", "model.safetensors", "additional_chat_templates/rag.jinja"):
        with pytest.raises(UserError, match="has the name of a checkpoint's file: choose another"):
            check(checkpoint, checkpoint.path / name)
    check(checkpoint, checkpoint.path / "answers.jsonl")
    check(checkpoint, checkpoint.path / "config.json.jsonl")


def test_the_configurations_files(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"is the configuration's config\.yaml"):
        check(checkpoint, conf_dir() / "config.yaml")


def test_standard_input(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("Hi")
    with (tmp_path / "p.txt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        with pytest.raises(UserError, match="is standard input, which this run reads"):
            check(checkpoint, tmp_path / "p.txt", "-")
        check(checkpoint, tmp_path / "q.txt", "-")
        check(checkpoint, tmp_path / "p.txt")
    for nothing in (None, file):  # closed, by the shell or by the program
        monkeypatch.setattr(sys, "stdin", nothing)
        check(checkpoint, tmp_path / "p.txt", "-")
