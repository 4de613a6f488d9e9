"""Answers in messages, from the command and from Python: checkpoints that say a fixed row of tokens (scripted.py)."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import scripted
from spawn import run_ranks

from epmoe import generate
from epmoe.config.compose import from_keys
from epmoe.engine.request import SamplingParams
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks

USER = "<|start|>user<|message|>Capital of France?<|end|><|start|>assistant"
THINKING = f"{USER}<|channel|>analysis<|message|>thinking"
CHAINS = {
    "call": [
        "t",
        " to=functions.rain",
        "<|channel|>",
        "commentary",
        "<|constrain|>",
        "json",
        "<|message|>",
        "{}",
        "<|call|>",
    ],
    "answer": ["<|channel|>", "final", "<|message|>", "Hello.", "<|return|>"],
    "both": [
        "g",
        " I know.",
        "<|end|>",
        "<|start|>",
        "assistant",
        "<|channel|>",
        "final",
        "<|message|>",
        " Paris.",
        "<|return|>",
    ],
    "no header": ["t", "<|channel|>", "final", " The answer", " is 42.", "<|return|>"],
    "after an end": ["t", "<|channel|>", "??", "<|end|>", " The answer", " is 42.", "<|return|>"],
}

Run = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scripted")
    made = {name: scripted(folder / name.replace(" ", "_"), chain) for name, chain in CHAINS.items()}
    return made | {"not marked": scripted(folder / "unmarked", CHAINS["both"], marked=False)}


@pytest.fixture
def run(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """The command, in this process: what it printed, and its record."""

    def of(name: str, *keys: str) -> tuple[str, dict[str, Any]]:
        file = tmp_path / "o.jsonl"
        keys = (f"checkpoint={checkpoints[name]}", "runtime.device=cpu", f"output={file}", *keys)
        monkeypatch.setattr(sys, "argv", ["generate", *keys])
        generate.generate()
        (line,) = file.read_text(encoding="utf-8").splitlines()
        return capsys.readouterr().out, json.loads(line)

    return of


CASES: dict[str, tuple[str, tuple[str, ...], str, list[tuple[Any, ...]], str]] = {
    "a call's header is no text": (
        "call",
        ("prompt=Rain? at",),
        "{}\n",
        [("commentary", "functions.rain", "<|constrain|>json", "{}", True)],
        "eos",
    ),
    "the prompt began the header": (
        "answer",
        ("chat=off", f"prompt={USER}<|channel|>"),
        "Hello.\n",
        [("final", None, None, "Hello.", True)],
        "eos",
    ),
    "the prompt began a body": (
        "both",
        ("chat=off", f"prompt={THINKING}"),
        " I know.\n\n Paris.\n",
        [("analysis", None, None, " I know.", True), ("final", None, None, " Paris.", True)],
        "eos",
    ),
    "control tokens that are not marked special": (
        "not marked",
        ("chat=off", f"prompt={THINKING}"),
        " I know.\n\n Paris.\n",
        [("analysis", None, None, " I know.", True), ("final", None, None, " Paris.", True)],
        "eos",
    ),
    "the blank line between messages is no text of the model's": (
        "both",
        ("chat=off", f"prompt={THINKING}", "sampling.stop=\n\n", "sampling.stop=\n"),
        " I know.\n\n Paris.\n",
        [("analysis", None, None, " I know.", True), ("final", None, None, " Paris.", True)],
        "eos",
    ),
    "analysis is not the answer": (
        "both",
        ("chat=off", f"prompt={THINKING}", "sampling.stop=know", "sampling.stop=ris"),
        " I know.\n\n Pa\n",
        [("analysis", None, None, " I know.", True), ("final", None, None, " Pa", False)],
        "stop",
    ),
    "a special token": (
        "both",
        ("chat=off", f"prompt={THINKING}", "sampling.stop=<|end|>"),
        " I know.\n",
        [("analysis", None, None, " I know.", True)],
        "stop",
    ),
    "a header that never ends": (
        "no header",
        ("chat=off", f"prompt={USER} at"),
        " The answer is 42.\n",
        [("final", None, None, " The answer is 42.", True)],
        "eos",
    ),
    "a garbled header": (
        "after an end",
        ("chat=off", "prompt=at"),
        " The answer is 42.\n",
        [("??", None, None, "", True), (None, None, None, " The answer is 42.", True)],
        "eos",
    ),
    "on after the end of the text": (
        "no header",
        ("chat=off", "prompt=at", "sampling.ignore_eos=true", "max_new_tokens=6"),
        " The answer is 42.\n\n\0\n",  # no token follows <|return|>: of equal logits the lowest id is taken
        [("final", None, None, " The answer is 42.", True), (None, None, None, "\0", False)],
        "length",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_command(run: Run, case: str) -> None:
    name, keys, printed, messages, reason = CASES[case]
    out, record = run(name, *keys)
    fields = ("channel", "recipient", "content_type", "text", "complete")
    assert out == printed and record["text"] == printed[:-1] and record["finish_reason"] == reason
    assert [tuple(message[field] for field in fields) for message in record["messages"]] == messages
    assert all(message["role"] == "assistant" for message in record["messages"])


def test_a_line_of_prompts_sets_stop_token_ids(run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    _, whole = run("both", "chat=off", f"prompt={THINKING}")
    stop = whole["ids"][4]  # within the header, where a string finds nothing
    prompts.write_text(json.dumps({"prompt": THINKING, "stop_token_ids": [stop, 0], "ignore_eos": True}) + "\n")
    out, record = run("both", "chat=off", f"prompts={prompts}")
    assert record["ids"] == whole["ids"][:5] and record["finish_reason"] == "stop" and out == " I know.\n"


def completions(ranks: Ranks, checkpoint: str) -> list[Any]:
    """Completions and streams of several parameters, on one of the ranks."""
    llm = LLM.opened(from_keys({"checkpoint": checkpoint, "chat": "off", "runtime": {"device": "cpu"}}), ranks)
    llm.load()
    found: list[Any] = []
    for params in (
        SamplingParams(),
        SamplingParams(stop=("know", "ris")),
        SamplingParams(stop=("<|end|>",)),
        SamplingParams(stop_token_ids=(ord("z"), llm.tokenizer.special_names["<|channel|>"])),
        SamplingParams(max_new_tokens=5, ignore_eos=True),
    ):
        (each,) = llm.generate(THINKING, params)
        assert "".join(llm.stream(THINKING, params)) == each.text
        found.append((each.ids, each.text, each.messages, each.finish_reason))
    return found


def test_every_rank_ends_a_text_at_the_same_id(checkpoints: dict[str, Path]) -> None:
    zero, one = run_ranks(completions, 2, str(checkpoints["both"]))
    assert zero == one
    assert [(text, reason) for _, text, _, reason in zero] == [
        (" I know.\n\n Paris.", "eos"),
        (" I know.\n\n Pa", "stop"),
        (" I know.", "stop"),
        (" I know.", "stop"),
        (" I know.", "length"),
    ]
    assert [len(messages) for _, _, messages, _ in zero] == [2, 2, 1, 1, 1]
