"""LLM(ranks=N): a script starts its own ranks, which make its calls, and end with it on every way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import python

from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.weights.synthetic import make_checkpoint

# No `if __name__ == "__main__"`: who starts its ranks by running the script again starts them without end.
EVERY_CALL = """
import sys, threading, time
from safetensors.torch import load_file
from epmoe import LLM, SamplingParams
from epmoe.errors import UserError

def said(llm):
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, logprobs=2, n=2)
    return [[(each.ids, each.logprobs) for each in one.outputs] for one in llm.generate(["a", [1, 2, 3]], params)]

def results(ranks):
    with LLM(sys.argv[1], ranks=ranks, max_tokens=9, runtime=runtime) as llm:
        found = [said(llm), [each.ids for each in llm.chat([{"role": "user", "content": "b"}], tools=[{"name": "f"}])]]
        found.append("".join(llm.stream("c")))
        for prompts in ("", ["a", ""], [[10**9]]):
            try:
                llm.generate(prompts)
            except UserError as error:
                found.append(str(error))
        llm.stream("never begun")
        for number, piece in enumerate(llm.stream("left early")):
            found.append(piece)
            if number == 1:
                break
        one, other = llm.stream("d"), llm.stream("e")
        found += ["".join(other), "".join(one)]
        try:
            llm.update_weights({"model.norm.weight": load_file(f"{sys.argv[2]}/model.safetensors")["lm_head.weight"]})
        except UserError as error:
            found.append(str(error))
        llm.update_weights(load_file(f"{sys.argv[2]}/model.safetensors"))
        found.append(said(llm))
    with LLM(sys.argv[2], runtime=runtime) as llm:
        assert said(llm) == found[-1]
    return found

runtime, numbers = sys.argv[3], map(int, sys.argv[4].split(","))
print("the script runs", flush=True)
one = results(1)
assert len(one) == 12, one
for ranks in numbers:
    assert results(ranks) == one
until = time.monotonic() + 60
while threading.active_count() > 1:
    assert time.monotonic() < until, threading.enumerate()
    time.sleep(0.01)
print("the same")
"""


def run(script: Path, text: str, *arguments: Any, **env: str) -> "subprocess.Popen[str]":
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    ("runtime", "ranks"),
    [
        ("cpu", "2"),
        pytest.param("cpu", "3", marks=pytest.mark.slow),
        pytest.param("default", "2", marks=pytest.mark.multigpu),
    ],
)
def test_every_call_is_that_of_one_rank(runtime: str, ranks: str, tmp_path: Path) -> None:
    for seed in (1, 2):
        path = make_checkpoint(tmp_path / str(seed), seed=seed, experts=5, max_position=64)
        (path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ tools }}")
    (script := tmp_path / "script.py").write_text(EVERY_CALL)
    done = python(str(script), str(tmp_path / "1"), str(tmp_path / "2"), runtime, ranks, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the script runs\nthe same\n" and "rror" not in done.stderr


READY = """
import sys
from epmoe import LLM
llm = LLM(ranks=3, runtime="cpu", max_new_tokens=5)
print("ready", flush=True)
sys.stdin.readline()
llm.generate("a")
llm.generate("a")
print("came through", flush=True)
sys.stdin.readline()
"""


@contextmanager
def ready(folder: Path, text: str = READY) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """A script that waits for a line, and the processes of its ranks from 1 on."""
    (folder / "script.py").write_text(text)
    with subprocess.Popen(
        [sys.executable, str(folder / "script.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as script:
        try:
            assert script.stdout is not None and script.stdout.readline() == "ready\n"
            ranks = [each for each in psutil.Process(script.pid).children() if "epmoe.follow" in each.cmdline()]
            yield script, sorted(ranks, key=lambda each: each.environ()["RANK"])
        finally:
            script.kill()


@pytest.mark.parametrize("at_work", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_rank_that_dies_ends_all(at_work: bool, tmp_path: Path) -> None:
    """While rank 0 is in the caller's hands, and where it waits for the one that has gone."""
    with ready(tmp_path) as (script, ranks):
        assert len(ranks) == 2
        if at_work:
            ranks[1].suspend()
            assert script.stdin is not None
            script.stdin.write("\n")
            script.stdin.flush()
            time.sleep(0.5)
        ranks[1].kill()
        out, errors = script.communicate(timeout=60)
        assert script.returncode == 1 and out == ""
        lines = [line for line in errors.splitlines() if "rank" in line and "auto" not in line]
        assert lines[0].startswith("epmoe: rank 2 ended without a word (killed?); rank")
        assert len(lines) == 2 and len({line.rpartition("; ")[2] for line in lines}) == 2
        assert psutil.wait_procs(ranks, 60)[1] == []


@pytest.mark.slow  # tests/whole/test_served.py has the first two, tests/test_serve.py the third
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_when_the_script_ends_its_ranks_end(number: signal.Signals, code: int, tmp_path: Path) -> None:
    with ready(tmp_path) as (script, ranks):
        script.send_signal(number)
        assert script.wait(60) == code
        assert psutil.wait_procs(ranks, 60)[1] == []
        assert script.stderr is not None
        assert "Traceback" not in script.stderr.read()


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("", 0),
        ("raise ValueError('mine')", 1),
        pytest.param("sys.exit(7)", 7, marks=pytest.mark.slow),
    ],
)
def test_a_script_that_ends_without_close_or_with_an_error(last: str, code: int, tmp_path: Path) -> None:
    text = (
        READY.replace("ranks=3", "ranks=2")
        .replace("sys.stdin.readline()\nllm", "llm")
        .replace("\nsys.stdin.readline()\n", f"\n{last}\n")
    )
    script = run(tmp_path / "script.py", text)
    assert script.stdout is not None and script.stdout.readline() == "ready\n"
    ranks = psutil.Process(script.pid).children()
    out, errors = script.communicate(timeout=60)
    assert (script.returncode, out) == (code, "came through\n"), errors
    assert ("mine" in errors) == ("mine" in last)
    assert psutil.wait_procs(ranks, 60)[1] == []


DIES_EARLY = """
from pathlib import Path
from epmoe import LLM
from epmoe.ranks import local
broken = Path(__file__).with_name("broken")
(broken / "torch").mkdir(parents=True)
(broken / "torch/__init__.py").write_text("raise SystemExit(1)")
local.UNEXPLAINED_S = 0.5
local.Followers.variables = lambda self, rank: {**self.launch, "RANK": str(rank), "PYTHONPATH": str(broken)}
LLM(ranks=2, runtime="cpu")
"""

FAILS_ALONE = """
import os, sys
from epmoe.errors import UserError
from epmoe.moe.experts.reference import ReferenceExperts
from epmoe.ranks.local import Orders

come = Orders.next
Orders.next = lambda self, within_s=None: come(self, within_s and 1.0)  # and not for half of timeout_s

class Alone(ReferenceExperts):
    def forward(self, *args):
        if os.environ.get("RANK", "0") == "1":
            raise UserError("too little of everything")
        return super().forward(*args)

if __name__ == "__main__":
    from epmoe import LLM
    LLM(ranks=2, runtime="cpu", experts="script:Alone", max_new_tokens=3).generate("a")
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        pytest.param(
            DIES_EARLY,
            1,
            "epmoe: rank 1 ended with exit code 1; rank 0 ends too",
            id="before the ranks have met",
            marks=pytest.mark.slow,
        ),
        pytest.param(FAILS_ALONE, 2, "epmoe: error: rank 1: too little of everything", id="in a call"),
    ],
)
def test_a_rank_that_fails_alone(text: str, code: int, says: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    script = run(tmp_path / "script.py", text)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == code and says in errors.splitlines(), errors
    assert time.monotonic() - begin < 50  # less than runtime.timeout_s


def test_mistakes_are_told_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **keys: pytest.fail("a rank was started"))
    wrong: Any
    for wrong in (0, -1, "2", 1.5, None):
        with pytest.raises(UserError, match=r"^ranks=.* is not a whole number, at least 1"):
            LLM(ranks=wrong)
    with pytest.raises(UserError, match="is no directory on this machine"):
        LLM(tmp_path / "nowhere", ranks=2)
    with pytest.raises(UserError, match="unknown key 'expert'"):
        LLM(ranks=2, expert="reference")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^ranks=2, but this process is one of 2 ranks already: leave ranks out"):
        LLM(ranks=2)
