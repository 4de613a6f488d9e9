"""The command as users start it: what goes to standard output, standard error and the file; mistakes are one line."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import python
from spawn import commands

from epmoe import generate, llm
from epmoe.engine.request import choice_seed
from epmoe.errors import UserError
from epmoe.ranks.launch import Launch
from epmoe.text.tokenizer import Tokenizer
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.synthetic import make_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
CPU = "runtime.device=cpu"


def command(*keys: str, ranks: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """`ranks` 0 is without torchrun."""
    words = ["-m", "epmoe.generate", CPU, *keys]
    if not ranks:
        return python(*words, stdin=stdin)
    return subprocess.run([*TORCHRUN, str(ranks), *words], input=stdin, capture_output=True, text=True, timeout=120)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> str:
    return f"checkpoint={tiny_checkpoint}"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run the command in this process, on one rank: (standard output, standard error)."""

    def run(*keys: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", CPU, *keys])
        generate.generate()
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run through torchrun: the prompt from standard input, sampled, written to a file too."""
    file = tmp_path_factory.mktemp("output") / "o.jsonl"
    keys = ["prompts=-", "sampling=sample", "sampling.logprobs=3", "max_new_tokens=20", f"output={file}"]
    return command(checkpoint, *keys, ranks=2, stdin="What is\n東京?\n"), file


def test_standard_output_has_the_text_alone(two_ranks: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, file = two_ranks
    assert done.returncode == 0, done.stderr
    (line,) = lines(file)
    assert done.stdout == line["text"] + "\n" and line["text"]
    assert "Warning" not in done.stderr


def test_closing_line(two_ranks: tuple[subprocess.CompletedProcess[str], Path], checkpoint: str) -> None:
    done, file = two_ranks
    (line,) = lines(file)
    last = done.stderr.splitlines()[-1]
    for part in (f"{len(line['ids'])} tokens in ", "tokens/s", "first token after", "2 ranks, each read ", "of memory"):
        assert part in last
    took, first = (float(last.split(before)[1].split()[0]) for before in (" tokens in ", "first token after "))
    start = float(last.split("first token after ")[1].split("(")[1].split()[0])
    assert 0 < first <= took + 0.01 and first + 0.5 < start < 120  # importing torch alone takes a second
    low, high = sorted(float(word) for word in last.split("read ")[1].split(" MB")[0].split(" to "))
    used = float(last.split("used ")[1].split(" MB")[0].split(" to ")[0].replace(",", ""))
    assert 100 < used < 10_000  # a process that has imported torch
    size = sum(file.stat().st_size for file in Checkpoint.open(checkpoint.removeprefix("checkpoint=")).files) / 1e6
    assert low < high < size  # five experts: one rank has three of them, none has all


def test_the_file_has_everything(two_ranks: tuple[subprocess.CompletedProcess[str], Path], checkpoint: str) -> None:
    (line,) = lines(two_ranks[1])
    tokenizer = Tokenizer.of(Checkpoint.open(checkpoint.removeprefix("checkpoint=")))
    asked = "<|start|>user<|message|>What is\n東京?<|end|><|start|>assistant<|message|>"
    assert line["prompt_tokens"] == len(tokenizer.encode(asked, special=False))
    assert line["finish_reason"] in ("length", "eos") and 0 < len(line["ids"]) <= 20
    assert 0 < line["first_token_s"] <= line["total_s"]
    assert len(line["logprobs"]) == len(line["ids"])
    for token in line["logprobs"]:
        best = [value for _, value in token["top"]]
        assert len(best) == 3 and best == sorted(best, reverse=True) and token["logprob"] <= best[0] < 0


def test_one_rank_without_torchrun_writes_the_same(
    two_ranks: tuple[subprocess.CompletedProcess[str], Path], checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("What is\n東京?\n", encoding="utf-8")
    keys = [f"prompts={tmp_path / 'p.txt'}", "sampling=sample", "sampling.logprobs=3", "max_new_tokens=20"]
    done = command(checkpoint, *keys, f"output={tmp_path / 'o.jsonl'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == two_ranks[0].stdout
    timeless = [
        {name: value for name, value in line.items() if not name.endswith("_s")}
        for file in (tmp_path / "o.jsonl", two_ranks[1])
        for line in lines(file)
    ]
    assert timeless[0] == timeless[1]


def test_two_replicas_write_the_same(checkpoint: str, tmp_path: Path) -> None:
    """Started by hand; another number of replicas than divides the ranks is refused."""
    kinds: tuple[dict[str, Any], ...] = (
        {},
        {"stop": ["a"]},
        {"n": 2, "temperature": 1.0},
        {"logprobs": 2},
        {"prompt_logprobs": 1},
    )
    asked = [{"prompt": "What is " * (1 + number), "seed": number, **each} for number, each in enumerate(kinds)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    keys = [checkpoint, f"prompts={tmp_path / 'p.jsonl'}", "max_new_tokens=9"]
    runs = {"one": ([], 1), "two": (["mesh.replica=2"], 2)}
    found = []
    for name, (more, ranks) in runs.items():
        file = tmp_path / f"{name}.jsonl"
        done = python("-m", "epmoe.generate", CPU, *keys, f"output={file}", *more, ranks=ranks)
        assert done.returncode == 0, done.stderr
        timeless = [{key: value for key, value in each.items() if not key.endswith("_s")} for each in lines(file)]
        found.append((done.stdout, timeless))
        assert f"; {ranks} rank" in done.stderr
    assert found[0] == found[1] and len(found[0][1]) == 6
    done = python("-m", "epmoe.generate", CPU, *keys, f"output={tmp_path / 'two.jsonl'}", "mesh.replica=3", ranks=2)
    assert done.stderr.count("mesh.replica=3 does not divide the number of ranks, 2: take one of 1, 2, or") == 1


@pytest.mark.slow  # tests/config/test_compose.py has one
def test_a_mistake_is_one_line_from_all_ranks(checkpoint: str) -> None:
    done = command(checkpoint, "prompt=", ranks=2)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("epmoe: error: prompt is empty") == 1 and done.stderr.count("error: ") == 1
    # no traceback of ours; torchrun's own report is beyond us
    assert f"{Path(generate.__file__).parent}/" not in done.stderr


def test_json_lines_with_stop_strings(here: Callable[..., tuple[str, str]], checkpoint: str, tmp_path: Path) -> None:
    """Texts in order, each with its own settings; a stop string cuts the text and ends its request alone."""
    free = {"max_new_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    prompts = [{"prompt": "a", **free, "seed": seed} for seed in range(4)]
    keys = [checkpoint, f"prompts={tmp_path / 'p.jsonl'}", f"output={tmp_path / 'o.jsonl'}"]

    def run(asked: list[dict[str, object]], *more: str) -> tuple[str, list[dict[str, Any]]]:
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
        out, _ = here(*keys, *more)
        return out, lines(tmp_path / "o.jsonl")

    out, before = run(prompts)
    assert out == "\n\n".join(line["text"] for line in before) + "\n"
    assert [line["index"] for line in before] == [0, 1, 2, 3]
    letters = before[2]["messages"][0]["text"]
    stop = letters[len(letters) // 2 :][:2]
    prompts[2]["stop"] = [stop]
    out, after = run(prompts, "runtime.max_batch=2", "runtime.prefill_chunk=3")
    assert after[2]["text"] == letters[: letters.index(stop)] and after[2]["finish_reason"] == "stop"
    assert len(after[2]["ids"]) < 30
    assert [line["ids"] for line in after if line["index"] != 2] == [b["ids"] for b in before if b["index"] != 2]
    assert out == "\n\n".join(line["text"] for line in after) + "\n"


def test_n_answers_are_lines_of_their_own(
    here: Callable[..., tuple[str, str]], checkpoint: str, tmp_path: Path
) -> None:
    """And a run that is begun again makes the same ones."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "n": 3, "max_tokens": 5}\n{"prompt": "b", "max_tokens": 4}\n')
    keys = [checkpoint, f"prompts={tmp_path / 'p.jsonl'}", "sampling=sample", "sampling.ignore_eos=true"]
    here(*keys, f"output={tmp_path / 'o.jsonl'}")
    found = lines(tmp_path / "o.jsonl")
    assert [line["index"] for line in found] == [0, 1, 2, 3]
    assert [(line.get("prompt"), line.get("choice")) for line in found] == [(0, 0), (0, 1), (0, 2), (None, None)]
    assert [len(line["ids"]) for line in found] == [5, 5, 5, 4]
    assert [line["seed"] for line in found] == [0, choice_seed(0, 1), choice_seed(0, 2), 0]
    here(*keys, f"output={tmp_path / 'again.jsonl'}")
    assert [line["ids"] for line in lines(tmp_path / "again.jsonl")] == [line["ids"] for line in found]
    before = (tmp_path / "o.jsonl").read_text()
    here(*keys, f"output={tmp_path / 'o.jsonl'}", "resume=true")
    assert (tmp_path / "o.jsonl").read_text() == before


def test_sampling_comes_from_generation_config(here: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    own = make_checkpoint(tmp_path / "own")
    keys = [f"checkpoint={own}", "prompt=a", "max_new_tokens=9", f"output={tmp_path / 'o.jsonl'}"]

    def ids(*more: str) -> tuple[list[int], str]:
        _, said = here(*keys, *more)
        return lines(tmp_path / "o.jsonl")[0]["ids"], said

    greedy, said = ids()
    assert "generation_config.json" not in said
    warm, _ = ids("sampling.temperature=1.5")
    end = json.loads((own / "generation_config.json").read_text())
    (own / "generation_config.json").write_text(json.dumps({**end, "temperature": 1.5}))
    found, said = ids()
    assert found == warm != greedy and said.count("epmoe: temperature=1.5 (generation_config.json)\n") == 1
    found, said = ids("sampling=greedy")
    assert found == greedy and "generation_config.json" not in said


def test_end_of_text_comes_from_generation_config(here: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    """Make the second greedy token an end-of-text one: the text ends there, unless it is ignored."""
    own = make_checkpoint(tmp_path / "own")
    keys = [f"checkpoint={own}", "prompt=a", "max_new_tokens=9", f"output={tmp_path / 'o.jsonl'}"]
    here(*keys, "sampling.ignore_eos=true")
    (whole,) = lines(tmp_path / "o.jsonl")
    assert whole["finish_reason"] == "length"
    end = whole["ids"][1]
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 300]}))
    here(*keys)
    (cut,) = lines(tmp_path / "o.jsonl")
    assert cut["finish_reason"] == "eos"
    assert cut["ids"] == whole["ids"][: whole["ids"].index(end) + 1]


def generate_with_own_eos(*keys: str) -> None:
    """The real command, on whose rank 1 every id ends a text."""
    sys.argv[1:] = ["runtime.device=cpu", "runtime.timeout_s=10", *keys]
    if Launch.read().rank == 1:
        llm.eos_ids = lambda checkpoint: tuple(range(checkpoint.config["vocab_size"]))
    generate.generate()


def test_all_ranks_end_texts_at_the_same_ids(checkpoint: str, tmp_path: Path) -> None:
    """Each node has its own copy of a checkpoint, and one may lack generation_config.json."""
    keys = [checkpoint, "prompt=a", "max_new_tokens=9"]
    with commands(generate_with_own_eos, 2, *keys, folder=tmp_path) as started:
        assert [command.wait(40) for command in started] == [0, 0], started[0].stderr
        assert "9 tokens in" in started[0].stderr


MISTAKES = {
    "no prompt": ([], "no prompt: give prompt="),
    "resume without output": (["prompt=a", "resume=true"], "resume=true without output=: name the file"),
    "output's directory": (["prompt=a", "output=/nowhere/o.jsonl"], "/nowhere does not exist"),
    "no such file": (["prompts=/nowhere.txt"], "No such file"),
    "longer than the model's positions": (["prompt=" + "a" * 600], "model has 512 positions"),
    "larger than the set cache": (["prompt=aaaaaaaaaa", "runtime.cache_tokens=16"], "raise runtime.cache_tokens"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(here: Callable[..., tuple[str, str]], checkpoint: str, case: str) -> None:
    keys, message = MISTAKES[case]
    with pytest.raises(UserError) as error:
        here(checkpoint, *keys)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_output_never_replaces_the_prompts(
    here: Callable[..., tuple[str, str]], checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match="is the file of prompts, which this run reads"):
        here(checkpoint, f"prompts={tmp_path / 'p.jsonl'}", f"output={tmp_path / 'p.jsonl'}")
    assert (tmp_path / "p.jsonl").read_text() == '{"prompt": "a"}'


def test_a_prompt_is_refused_before_the_weights_are_read(
    here: Callable[..., tuple[str, str]], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading takes minutes on a big checkpoint."""
    monkeypatch.setattr("epmoe.llm.load", lambda *args, **kwargs: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match="model has 512 positions"):
        here(checkpoint, "prompt=" + "a" * 600)


def test_a_device_that_runs_full_is_one_line(
    here: Callable[..., tuple[str, str]], checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr("epmoe.engine.engine.Engine.generate", full)
    with pytest.raises(UserError, match=r"^cpu ran out of memory with \d+\.\d GB left: lower runtime.max_batch"):
        here(checkpoint, "prompt=a")


def test_a_checkpoint_without_tokenizer(here: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        here(f"checkpoint={tmp_path}", "prompt=a")


@pytest.mark.parametrize(("error", "message"), [(BrokenPipeError(), None), (OSError(28, "full"), "cannot be written")])
def test_standard_output_that_fails(
    here: Callable[..., tuple[str, str]],
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
    message: str | None,
) -> None:
    """Without a reader the file is written all the same; a full disk is a mistake, and nothing is left of no answer."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stdout", Gone())
    keys = [checkpoint, "prompt=a", "max_new_tokens=3", f"output={tmp_path / 'o.jsonl'}"]
    if message is None:
        here(*keys)
        assert [len(line["ids"]) for line in lines(tmp_path / "o.jsonl")] == [3]
        return
    with pytest.raises(UserError, match=message):
        here(*keys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "start", [[sys.executable], pytest.param([*TORCHRUN, "2"], marks=pytest.mark.slow)], ids=["python", "torchrun"]
)
def test_with_no_key_the_embedded_model_writes_at_once(start: list[str]) -> None:
    """Streamed, also where nobody types: the text comes in about as many pieces as it has tokens."""
    keys = [] if len(start) == 1 else [CPU]
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps what is written apart
    with here:
        with there:
            process = subprocess.Popen(
                [*start, "-m", "epmoe.generate", *keys],
                stdout=there.fileno(),
                stderr=subprocess.PIPE,
                env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            )
        pieces = list(iter(lambda: here.recv(65536), b""))
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, errors
    assert len(pieces) > 30 and len(b"".join(pieces)) > 50
    assert "no prompt given" in errors
