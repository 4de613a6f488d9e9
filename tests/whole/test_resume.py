"""output= on whatever way a run ends: no finished answer is lost, and resume=true makes the file of a run that did not.

Runs are the real command, their ranks without an agent.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
from loading import rewrite_tensors
from spawn import Command, commands

from epmoe.weights.synthetic import make_checkpoint

LONG = 60_000  # new tokens: minutes
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "Hello", "max_new_tokens": 5},
    {"prompt": "a long one", "max_new_tokens": 9, "ignore_eos": True},
    {"prompt": "a", "max_new_tokens": 7, "temperature": 1.0, "seed": 3, "logprobs": 2},
    {"prompt": "another", "max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "stop": ["\n"]},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("resumed"), size="tiny", max_position=65536)


def generate(*keys: str) -> None:
    from epmoe.generate import generate as body

    sys.argv[1:] = ["runtime.device=cpu", "chat=off", *keys]
    body()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def timeless(file: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if not name.endswith("_s")} for line in lines(file)]


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """But for last bits of log-probabilities, in float32: another number of rows chooses another product."""
    for mine, theirs in zip(found, wanted, strict=True):
        assert {**mine, "logprobs": None} == {**theirs, "logprobs": None}
        values = [[token["logprob"] for token in line.get("logprobs", [])] for line in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def keys(folder: Path, checkpoint: Path, prompts: list[dict[str, Any]], *more: str) -> list[str]:
    (folder / "p.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    return [f"checkpoint={checkpoint}", f"prompts={folder / 'p.jsonl'}", f"output={folder / 'o.jsonl'}", *more]


def finished(folder: Path, size: int, *given: str) -> tuple[str, str]:
    """Run to the end: standard output and standard error of rank 0."""
    with commands(generate, size, *given, folder=folder) as started:
        assert [each.wait(60) for each in started] == [0] * size, [each.stderr for each in started]
        return started[0].stdout, started[0].stderr


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The file of a run that nothing happened to, without times."""
    folder = tmp_path_factory.mktemp("whole")
    finished(folder, 1, *keys(folder, checkpoint, PROMPTS))
    assert [line["index"] for line in lines(folder / "o.jsonl")] == [0, 1, 2, 3]
    return timeless(folder / "o.jsonl")


def interrupted(folder: Path, checkpoint: Path, size: int, number: Signals, victims: list[int]) -> list[Command]:
    """Run until all but the long prompt are answered; then send the signal."""
    prompts = [{**each, "max_new_tokens": LONG} if index == 1 else each for index, each in enumerate(PROMPTS)]
    with commands(generate, size, *keys(folder, checkpoint, prompts), folder=folder) as started:
        deadline = time.monotonic() + 60
        while len(lines(folder / "o.jsonl.unfinished")) < 3:
            assert time.monotonic() < deadline, [each.stderr for each in started]
            time.sleep(0.05)
        for victim in victims:
            started[victim].signal(number)
        assert all(each.wait(60) for each in started)  # not 0, and not None
    return started


@pytest.mark.parametrize(
    ("size", "number", "victims", "told"),
    [
        pytest.param(2, SIGKILL, [1], "rank 1 ended without a word", id="a-peer-is-killed"),
        pytest.param(2, SIGINT, [0, 1], "interrupted", id="ctrl-c", marks=pytest.mark.slow),
        pytest.param(1, SIGTERM, [0], "ended by SIGTERM", id="terminated-alone"),
        pytest.param(1, SIGKILL, [0], None, id="killed-alone"),
    ],
)
def test_what_is_finished_outlives_the_run(
    size: int,
    number: Signals,
    victims: list[int],
    told: str | None,
    checkpoint: Path,
    whole: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    started = interrupted(tmp_path, checkpoint, size, number, victims)
    unfinished = tmp_path / "o.jsonl.unfinished"
    assert sorted(timeless(unfinished), key=lambda line: line["index"]) == [whole[0], whole[2], whole[3]]
    words = [line for line in started[0].stderr.splitlines() if "auto" not in line and "bounds the" not in line]
    if told:
        assert told in words[0]
        assert words[1:] == [f"epmoe: 3 answers kept in {unfinished}: go on from there with resume=true"]
    given = keys(tmp_path, checkpoint, PROMPTS)
    if told is None:  # once: what is there is not written over
        with commands(generate, 1, *given, folder=tmp_path) as (refused,):
            assert refused.wait(60) == 2
            assert f"error: {unfinished} has answers of a run that did not end" in refused.stderr
        with unfinished.open("ab") as file:
            file.write(b'{"index": 1, "requ')  # killed in mid-write
    out, err = finished(tmp_path, size, *given, "resume=true")
    assert timeless(tmp_path / "o.jsonl") == whole and not unfinished.exists()
    assert out == whole[1]["text"] + "\n" and "; 3 answers were there already" in err.splitlines()[-1]


def test_other_prompts_are_refused_and_a_whole_file_needs_no_weights(
    checkpoint: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    given = keys(tmp_path, checkpoint, PROMPTS, "resume=true")
    finished(tmp_path, 2, *given)  # nothing was there
    assert timeless(tmp_path / "o.jsonl") == whole
    out, err = finished(tmp_path, 2, *given)
    assert out == "" and "has every answer already" in err and " read " not in err
    before = (tmp_path / "o.jsonl").read_bytes()
    others = [PROMPTS[0], {**PROMPTS[1], "prompt": "a longer one"}, *PROMPTS[2:]]
    with commands(generate, 2, *keys(tmp_path, checkpoint, others, "resume=true"), folder=tmp_path) as started:
        assert [each.wait(60) for each in started] == [2, 2]
        assert "o.jsonl:2 answers another prompt 2, or one with other sampling" in started[0].stderr
        assert "another output=" in started[0].stderr and started[1].stderr == ""
    assert (tmp_path / "o.jsonl").read_bytes() == before and not (tmp_path / "o.jsonl.unfinished").exists()


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_prompt_whose_numbers_are_none_harms_no_other(
    size: int, checkpoint: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Its places in the cache go to others, which come after it; then the checkpoint is mended."""
    used = {id for line in whole for id in line["ids"]}
    letter = next(each for each in "QXZ@#%" if ord(each) not in used)
    own = make_checkpoint(tmp_path / "own", size="tiny", max_position=65536)
    mended = (own / "model.safetensors").read_bytes()
    rewrite_tensors(own, lambda tensors: tensors["model.embed_tokens.weight"][ord(letter), 3].fill_(math.nan))
    bad = {"prompt": f"{letter} is bad for everybody", "max_new_tokens": 5}
    prompts = [PROMPTS[0], bad, *PROMPTS[2:]]
    given = keys(tmp_path, own, prompts, "runtime.max_batch=2", "runtime.cache_tokens=64", "runtime.page=4")
    with commands(generate, size, *given, folder=tmp_path) as started:
        assert [each.wait(60) for each in started] == [2] * size
        errors = [line for each in started for line in each.stderr.splitlines() if "auto" not in line]
    assert len(errors) == 2 and "not finite at position" in errors[0] and " of prompt 2; the first" in errors[0]
    assert errors[1] == f"epmoe: {tmp_path / 'o.jsonl'} has the other 3 answers; resume=true tries the rest again"
    found = timeless(tmp_path / "o.jsonl")
    assert_same([found[0], found[2], found[3]], [whole[0], whole[2], whole[3]])
    assert (found[1]["finish_reason"], found[1]["ids"], found[1]["text"]) == ("error", [], "")
    (own / "model.safetensors").write_bytes(mended)
    finished(tmp_path, size, *given, "resume=true")
    again = timeless(tmp_path / "o.jsonl")
    assert_same([again[0], again[2], again[3]], [whole[0], whole[2], whole[3]])
    assert (again[1]["finish_reason"], len(again[1]["ids"])) == ("length", 5)


WATCHED = """
import runpy, sys

class Opens:
    def find_spec(self, name, *_):
        if name == "torch" and not kept:
            kept.append(open(sys.argv.pop(1), "w"))
            print(kept[0].fileno(), file=kept[0], flush=True)

kept = []
sys.meta_path.insert(0, Opens())
runpy.run_module("epmoe.generate", run_name="__main__", alter_sys=True)
"""


def test_a_file_that_an_import_opens_gets_no_standard_streams_number(tmp_path: Path) -> None:
    given = [str(tmp_path / "number"), "no=key"]
    done = subprocess.run(["bash", "-c", '"$0" -c "$@" <&- >&- 2>&-', sys.executable, WATCHED, *given], timeout=100)
    assert done.returncode == 2 and int((tmp_path / "number").read_text()) > 2


@pytest.mark.parametrize(
    "redirect", ["<&- >&- 2>&-", *(pytest.param(each, marks=pytest.mark.slow) for each in ("2>&-", "| head -c 3"))]
)
def test_the_file_is_written_whatever_standard_streams_there_are(redirect: str, tmp_path: Path) -> None:
    """In a fresh interpreter: closed from the start, or with a reader that goes away. Messages go nowhere else."""
    output = tmp_path / "o.jsonl"
    given = ["runtime.device=cpu", "prompt=Hello", "max_new_tokens=12", f"output={output}"]
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -m epmoe.generate "$@" {redirect}', sys.executable, *given],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    (line,) = lines(output)
    assert line["text"] and len(line["ids"]) == 12
    assert done.stdout == {"2>&-": line["text"] + "\n", "| head -c 3": line["text"][:3]}.get(redirect, "")
    assert ("tokens/s" in done.stderr) == ("2>" not in redirect)
