"""The benchmark of load as users start it: its table, its line of JSON, its figures; mistakes are one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import python

from epmoe.bench import __main__ as command
from epmoe.bench.load.callers import Served
from epmoe.bench.load.run import load, percentiles, waited
from epmoe.bench.options import LoadConfig
from epmoe.config.compose import parse
from epmoe.errors import UserError

DEMO = Path(command.__file__).parents[1] / "demo"
SMALL = ["runtime=cpu", f"checkpoint={DEMO}", "requests=8", "prompt_tokens=uniform:1:30", "answer_tokens=uniform:1:9"]


def run(*keys: str, ranks: int = 1) -> tuple[list[str], dict[str, Any]]:
    """The lines of the table, the JSON."""
    done = python("-m", "epmoe.bench", *keys, ranks=ranks)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


POISSON, CONCURRENT = ["load=poisson", "rate=20"], ["load=concurrent", "users=3"]
SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in ((POISSON, 1), (CONCURRENT, 1), (CONCURRENT, 2))]


@pytest.mark.parametrize(("kind", "ranks"), [(POISSON, 2), *SLOW])
def test_the_command(kind: list[str], ranks: int) -> None:
    lines, record = run(*kind, *SMALL, ranks=ranks)
    told = "\n".join(lines)
    assert (record["bench"], record["model"], record["ranks"], record["requests"]) == ("load", "demo", ranks, 8)
    for key in ("first_token_ms", "between_ms"):
        assert 0 < record[key]["p50"] <= record[key]["p90"] <= record[key]["p99"]
    assert record["tokens_per_s"] == pytest.approx(record["tokens"] / record["seconds"])
    assert record["share"] == pytest.approx(record["tokens_per_s"] / record["generate_tokens_per_s"])
    poisson = record["load"] == "poisson"
    assert record["runtime"]["max_batch"] == (8 if poisson else 3)
    assert ("20 a second at random times" in told, "3 at a time" in told) == (poisson, not poisson)
    assert ((record["message_us"] or 0) > 0) == ("rank 0's orders" in told) == (ranks > 1)
    assert (record["hit_rate"], record["put_back"], record["later_turns"]) == (0, 0, None)
    assert record["serve"] == {"step_tokens": 384} and "the prefix cache had 0.0 % of the prompts' tokens;" in told
    (row,) = (line for line in lines if line.startswith("| first token"))
    assert (
        row
        == "| first token | " + " | ".join(f"{record['first_token_ms'][p]:.2f}" for p in ("p50", "p90", "p99")) + " |"
    )


@pytest.mark.parametrize(
    "kind", [pytest.param(["load=poisson", "rate=40"], marks=pytest.mark.slow), ["load=concurrent", "users=2"]]
)
def test_turns(kind: list[str]) -> None:
    """The default page has 16 tokens: each turn's pages are there for the next one, but the last one's."""
    lengths = ["prompt_tokens=20", "answer_tokens=4", "turns=3", "requests=8", "serve.step_tokens=40"]
    lines, record = run(*kind, "runtime=cpu", f"checkpoint={DEMO}", *lengths)
    assert record["tokens"] == 8 * 4 and record["serve"] == {"step_tokens": 40}
    assert record["first_turns"]["hit_rate"] == 0  # of 3 conversations, the last one of 2 turns
    found, asked = 3 * 16 + 2 * 32, 3 * 44 + 2 * 68
    assert record["later_turns"]["hit_rate"] == pytest.approx(found / asked)
    assert record["hit_rate"] == pytest.approx(found / (asked + 3 * 20))
    assert record["later_turns"]["first_token_ms"]["p50"] > 0
    told = "\n".join(lines)
    assert "| first token, later turns |" in told and f"{100 * found / asked:.1f} % of later turns'" in told
    assert "3 of a conversation" in told and "a step of answers has 40 tokens at most" in told


def test_a_model_without_a_tokenizer() -> None:
    """Random weights of a size: answers are made to text all the same."""
    _, record = run(
        "load=concurrent", "users=2", "runtime=cpu", "size=tiny", "requests=4", "prompt_tokens=5", "answer_tokens=20"
    )
    assert record["model"] == "random-tiny" and record["tokens"] == 4 * 20


def test_figures() -> None:
    """Two requests by hand, the second one waits for half a second before its first token."""
    served = [Served(1.0, [1.25, 1.5, 2.0], 0, 9), Served(2.0, [2.5, 3.0], 0, 9)]
    found = waited(served, generate_s=1.0)
    assert (found["tokens"], found["seconds"], found["tokens_per_s"], found["share"]) == (5, 2.0, 2.5, 0.5)
    assert found["first_token_ms"] == pytest.approx({"p50": 375, "p90": 475, "p99": 497.5})
    assert found["between_ms"] == pytest.approx({"p50": 500, "p90": 500, "p99": 500})
    assert found["generate_tokens_per_s"] == 5 and percentiles([]) is None


def test_figures_of_turns() -> None:
    first, later = Served(0.0, [1.0], 0, 10, 0), Served(2.0, [2.5], 1, 30, 20)
    found = waited([first, later], generate_s=1.0)
    assert (found["hit_rate"], found["first_turns"]["hit_rate"], found["later_turns"]["hit_rate"]) == (0.5, 0, 20 / 30)
    assert (found["first_turns"]["first_token_ms"]["p50"], found["later_turns"]["first_token_ms"]["p50"]) == (1000, 500)


def test_which_benchmark() -> None:
    assert command.chosen(["size=tiny", "load=poisson"]) is command.chosen(["load", "--help"]) is load
    assert command.chosen([]) is command.bench
    assert command.chosen(["start", "size=tiny"]) is command.start and command.chosen(["bits"]) is command.bits


def test_help_has_the_keys_of_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["load", "--help"], ["load=poisson", "--help"]):
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        with pytest.raises(SystemExit):
            load()
        told = capsys.readouterr().out
        assert "serve.step_tokens=0" in told and "serve.queue_requests" not in told and "  turns=1" in told


MISTAKES = {
    "no load": (["load="], "load='' is unknown; known: poisson, concurrent"),
    "another load": (["load=uniform"], "load='uniform' is unknown; known: poisson, concurrent"),
    "no rate": (["load=poisson", "rate=0"], "rate=0.0 is out of range"),
    "no distribution": (["load=poisson", "answer_tokens=zipf:3"], "answer_tokens='zipf:3' is no distribution"),
    "two models": (["load=poisson", "size=tiny", "checkpoint=x"], "exclude each other"),
    "a bound of the queue": (["load=poisson", "serve.queue_requests=9"], "means nothing to a benchmark of load"),
    "no room for prompts": (
        ["load=poisson", "serve.step_tokens=64"],
        "leaves no prompt a place beside runtime.max_batch=64",
    ),
    "no turns": (["load=poisson", "turns=0"], "turns=0 is out of range"),
    "a trace": (["load=poisson", "runtime.profile=x"], "means nothing to a benchmark of load"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    words, message = MISTAKES[case]
    with pytest.raises(UserError) as error:
        parse(words, LoadConfig)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_requests_too_long_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "load=poisson", *SMALL, "prompt_tokens=lognormal:9:1:510"])
    with pytest.raises(UserError, match="can be 519 tokens together, and the model has 512") as error:
        load()
    assert "\n" not in str(error.value)


def test_turns_too_long_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "load=poisson", *SMALL, "turns=14"])
    with pytest.raises(UserError, match=r"turns=14 with .* can be 546 tokens together, and the model has 512"):
        load()


def on_devices(ranks: int) -> None:
    _, record = run("load=poisson", "rate=50", "size=tiny", "requests=30", "prompt_tokens=uniform:1:300", ranks=ranks)
    assert record["device"] != "cpu" and record["ranks"] == ranks and record["tokens"] == 30 * 128


@pytest.mark.gpu
def test_on_a_device() -> None:
    on_devices(1)


@pytest.mark.multigpu
def test_on_two_devices() -> None:
    on_devices(2)
