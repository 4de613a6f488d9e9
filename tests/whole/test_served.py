"""AsyncLLM over real ranks: the same answers as one request alone on one rank; ranks that idle, die and come back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from forked import python

from epmoe.weights.synthetic import make_checkpoint

HELPERS = str(Path(__file__).resolve().parents[1] / "helpers")
BEGIN = f"""
import asyncio, os, pickle, random, signal, sys, time
from pathlib import Path
import pytest
sys.path.append({HELPERS!r})
from drafting import draft_known, draft_wrongly, try_some
from storm import PLACE, SERVE, TIGHT, WHERE, alone, storm
from epmoe import AsyncLLM, SamplingParams
from epmoe.engine.drafts import Drafting
begin = Drafting.__init__
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
"""

ITS_OWN_RANKS = """
DRAFTING = []

def known(self, *arguments):
    begin(self, *arguments)
    DRAFTING.append(self)

async def main(ranks, speculate, attention, replica):
    if ranks == 1 and speculate != "off":  # it is in this process: each step has drafts, most of them wrong
        patch, dice = pytest.MonkeyPatch(), random.Random(ranks)
        try_some(patch, dice, 8)
        if os.environ.get("RANDOM_WEIGHTS"):  # whose answers have nothing that was said before
            draft_known(patch, [one[2] for answer in pickle.loads(Path(sys.argv[2]).read_bytes()) for one in answer])
        draft_wrongly(patch, dice, 2000, 0.8)
        patch.setattr(Drafting, "__init__", known)
    parts = {"mesh": {"attention": attention, "replica": replica}, "speculate": speculate}
    async with AsyncLLM(WHERE["checkpoint"], ranks=ranks, runtime=TIGHT, serve=SERVE, **parts) as llm:
        print("ended well:", await storm(llm, sys.argv[2], int(sys.argv[1]), 1.0), flush=True)
        assert len(llm.service.figures()) == max(1, replica)
        scheduler = llm.llm.engine.scheduler
        assert scheduler.put_back > 0
        assert all(lane.added > 0 and lane.pages.unused for lane in scheduler.lanes)
        for each in DRAFTING:
            assert each.drafted > each.accepted > 0, (each.drafted, each.accepted)

asyncio.run(main(int(sys.argv[3]), *sys.argv[4:6], int(sys.argv[6])))
"""

TORCHRUN = """
async def main():
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    async with AsyncLLM(runtime=PLACE, serve=SERVE) as llm:
        if llm.is_main:
            print("ended well:", await storm(llm, sys.argv[2], int(sys.argv[1])), flush=True)
            return
        try:
            await anext(llm.generate("a"))
        except ValueError as error:
            print(error, flush=True)
        if first and os.environ.get("DIES"):
            await asyncio.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each kind of request is, alone on one rank."""
    file = tmp_path_factory.mktemp("known") / "answers.pickle"
    python(f"{HELPERS}/storm.py", "alone", str(file), timeout=200).check_returncode()
    return file


def run(
    folder: Path, text: str, *arguments: object, launcher: tuple[str, ...] = (), limit_s: float = 280, **env: str
) -> tuple[int, str, str]:
    """Exit code, standard output and error of a script."""
    script = folder / "script.py"
    script.write_text(BEGIN + text)
    words = (str(script), *map(str, arguments))
    if launcher:
        command, all_env = [sys.executable, *launcher, *words], {**os.environ, **env}
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=all_env)
    else:
        done = python(*words, timeout=limit_s, env=env)
    return done.returncode, done.stdout, done.stderr


HOW = ("off", "ngram")
STORMS = [
    (1, 50, "ngram", "replicate"),
    # Two ranks have a storm below, with a restart; tests/whole/test_attention_modes.py has the modes.
    *(pytest.param(2, 70, *each, marks=pytest.mark.slow) for each in (("off", "replicate"), ("ngram", "data"))),
    pytest.param(4, 90, "ngram", "replicate", marks=pytest.mark.slow),
    *(pytest.param(ranks, 500, how, "replicate", marks=pytest.mark.slow) for ranks in (1, 2, 4) for how in HOW),
    *(pytest.param(ranks, 500, how, "data", marks=pytest.mark.slow) for ranks in (2, 4) for how in HOW),
]


@pytest.mark.timeout(700)
@pytest.mark.parametrize(("ranks", "count", "speculate", "attention"), STORMS)
def test_every_answer_is_the_one_that_it_is_alone(
    ranks: int, count: int, speculate: str, attention: str, known: Path, tmp_path: Path
) -> None:
    """Requests at random times: priorities, shared prefixes, stop strings, several answers, put-backs; some leave.

    Alone there were no drafts.
    """
    code, out, errors = run(tmp_path, ITS_OWN_RANKS, count, known, ranks, speculate, attention, 0, limit_s=600)
    assert code == 0 and out.startswith("ended well: ") and "rror" not in errors, errors


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize(("ranks", "replica"), [(2, 2), (4, 2)])
def test_every_answer_is_the_one_that_it_is_alone_over_replicas(
    ranks: int, replica: int, known: Path, tmp_path: Path
) -> None:
    code, out, errors = run(tmp_path, ITS_OWN_RANKS, 200, known, ranks, "ngram", "replicate", replica, limit_s=600)
    assert code == 0 and out.startswith("ended well: ") and "rror" not in errors, errors


@pytest.mark.gpu
@pytest.mark.timeout(500)
@pytest.mark.parametrize("count", [120, pytest.param(500, marks=pytest.mark.slow)])
def test_every_answer_is_the_one_that_it_is_alone_on_a_gpu(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers of gpt-oss-20b's shapes."""
    place = make_checkpoint(tmp_path / "20b", "20b", layers=2)
    where = {"checkpoint": str(place), "device": "cuda", "cache_tokens": 400}
    monkeypatch.setenv("EPMOE_STORM", json.dumps(where))
    file = tmp_path / "known"
    subprocess.run([sys.executable, f"{HELPERS}/storm.py", "alone", str(file)], check=True, timeout=200)
    for speculate in ("off", "ngram"):
        how = (1, speculate, "replicate", 0)
        code, out, errors = run(tmp_path, ITS_OWN_RANKS, count, file, *how, RANDOM_WEIGHTS="yes")
        assert code == 0 and out.startswith("ended well: ") and "rror" not in errors, errors


AGENT = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow  # the next one has it twice
def test_under_torchrun_requests_come_to_rank_0(known: Path, tmp_path: Path) -> None:
    code, out, errors = run(tmp_path, TORCHRUN, 40, known, launcher=AGENT)
    assert code == 0, errors
    lines = sorted(out.splitlines())
    assert lines[1] == "generate was called on rank 1: requests come to rank 0 alone" and "ended well" in lines[0]


def test_a_rank_that_dies_ends_the_run_and_torchrun_brings_it_back(known: Path, tmp_path: Path) -> None:
    code, out, errors = run(tmp_path, TORCHRUN, 12, known, launcher=(*AGENT, "--max-restarts=1"), DIES="1")
    assert code == 0 and "ended well" in out, errors
    assert out.count("generate was called on rank 1: requests come to rank 0 alone\n") == 2
    assert "epmoe: rank 1 ended without a word (killed?); rank 0 ends too" in errors.splitlines()


AT_WORK = """
async def main():
    async with AsyncLLM(ranks=3, runtime={"device": "cpu"}) as llm:
        callers = int(sys.argv[1])
        busy = set() if callers else {"idle"}
        async def work(number):
            while True:
                async for _ in llm.generate("In the beginning", LONG):
                    busy.add(number)
        async def say():
            while len(busy) < max(1, callers):
                await asyncio.sleep(0.01)
            print("ready", flush=True)
        await asyncio.gather(*(work(number) for number in range(callers)), say(), asyncio.sleep(10**6))

asyncio.run(main())
"""


@contextmanager
def at_work(folder: Path, callers: int) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """A script with so many callers, each amid its answer, and the processes of its ranks from 1 on."""
    (folder / "script.py").write_text(BEGIN + AT_WORK)
    command = [sys.executable, str(folder / "script.py"), str(callers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        try:
            assert script.stdout is not None and script.stdout.readline() == "ready\n"
            time.sleep(0.5)
            ranks = [each for each in psutil.Process(script.pid).children() if "epmoe.follow" in each.cmdline()]
            yield script, sorted(ranks, key=lambda each: each.environ()["RANK"])
        finally:
            script.kill()


@pytest.mark.alone
@pytest.mark.slow  # tests/test_serve.py and tests/test_follow.py have a rank that dies
@pytest.mark.parametrize("callers", [0, 3], ids=["idle", "at work"])
def test_a_follower_that_dies_ends_all(callers: int, tmp_path: Path) -> None:
    with at_work(tmp_path, callers) as (script, ranks):
        ranks[0].kill()
        _, errors = script.communicate(timeout=60)
        assert script.returncode == 1
        lines = [line for line in errors.splitlines() if "killed?" in line]
        assert len(lines) == 2 and all(
            line.startswith("epmoe: rank 1 ended without a word (killed?); ") for line in lines
        )
        assert psutil.wait_procs(ranks, 60)[1] == []


DEATHS = {
    "killed, idle": (signal.SIGKILL, -9, 0),
    "Ctrl-C, at work": (signal.SIGINT, 130, 3),
    "killed, at work": (signal.SIGKILL, -9, 3),
    "Ctrl-C, idle": (signal.SIGINT, 130, 0),
}
FIRST = ("Ctrl-C, at work",)  # tests/whole/test_failing.py has a rank 0 that is killed


@pytest.mark.alone
@pytest.mark.parametrize(
    "case", [*FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in DEATHS if each not in FIRST)]
)
def test_when_rank_0_dies_all_end(case: str, tmp_path: Path) -> None:
    number, code, callers = DEATHS[case]
    with at_work(tmp_path, callers) as (script, ranks):
        begin = time.monotonic()
        script.send_signal(number)
        assert script.wait(60) == code
        assert psutil.wait_procs(ranks, 60)[1] == [] and time.monotonic() - begin < 40  # less than runtime.timeout_s
        assert script.stderr is not None and "Traceback" not in script.stderr.read()


IDLE = """
async def main():
    async with AsyncLLM(ranks=2, runtime={"device": "cpu", "timeout_s": 6}) as llm:
        found = []
        for seconds in (8, 0):
            async for event in llm.generate("The king", SamplingParams(max_tokens=5)):
                pass
            found.append(event.ids)
            await asyncio.sleep(seconds)
        print(found[0] == found[1])

asyncio.run(main())
"""


@pytest.mark.alone
@pytest.mark.slow  # tests/ranks/test_control.py has an idle group
def test_idle_ranks_stay_for_longer_than_their_timeout(tmp_path: Path) -> None:
    code, out, errors = run(tmp_path, IDLE)
    assert (code, out) == (0, "True\n"), errors


NEW_WEIGHTS = """
from safetensors.torch import load_file
from epmoe.weights.hub import DEMO

async def whole(llm, number):
    async for event in llm.generate(f"The king {number}", SamplingParams(max_tokens=9)):
        pass
    return event.ids

async def main():
    stored = load_file(next(DEMO.glob("*.safetensors")))
    name = "model.norm.weight"
    async with AsyncLLM(ranks=2, mesh={"replica": 2}, runtime=PLACE) as llm:
        before = await asyncio.gather(*(whole(llm, number) for number in range(6)))
        await llm.update_weights({name: -stored[name]})
        between = await asyncio.gather(*(whole(llm, number) for number in range(6)))
        await llm.update_weights({name: stored[name]})
        print(before != between, before == await asyncio.gather(*(whole(llm, number) for number in range(6))))
        while not all(each.steps > 10 for each in llm.service.figures()):  # one is asked when it is up, perhaps late
            assert before == await asyncio.gather(*(whole(llm, number) for number in range(6)))

asyncio.run(main())
"""


def test_every_replica_takes_new_weights(tmp_path: Path) -> None:
    code, out, errors = run(tmp_path, NEW_WEIGHTS)
    assert (code, out) == (0, "True True\n"), errors


FORGETFUL = """
llm = AsyncLLM(ranks=2, runtime=PLACE)
async def main():
    async for event in llm.generate("The king", LONG):
        print("begun", flush=True)
        return
asyncio.run(main())
"""


@pytest.mark.slow  # tests/test_follow.py and tests/test_llm.py have the like
def test_a_script_that_forgets_to_close_ends_well(tmp_path: Path) -> None:
    code, out, errors = run(tmp_path, FORGETFUL)
    assert (code, out) == (0, "begun\n") and "rror" not in errors, errors


SOAK = """
import json
import psutil

async def main(minutes):
    end, rounds = time.monotonic() + 60 * minutes, []
    async with AsyncLLM(ranks=2, runtime=PLACE, serve=SERVE) as llm:
        mine = psutil.Process()
        ranks = [mine, *(each for each in mine.children() if "epmoe.follow" in each.cmdline())]
        while time.monotonic() < end:
            await storm(llm, sys.argv[2], 60, seconds=0.5, seed=len(rounds))
            await asyncio.sleep(0.1)
            rounds.append([[each.num_fds(), each.num_threads(), each.memory_info().rss] for each in ranks])
    print(json.dumps(rounds))

asyncio.run(main(float(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_leaks(known: Path, tmp_path: Path) -> None:
    """Descriptors, threads and memory of both ranks; `storm` looks at the pages after each round.

    Memory may grow by 2 % from the first third's most to the last one's: what the allocator has not given back yet.
    """
    minutes = os.environ.get("EPMOE_SOAK_MINUTES", "3")
    code, out, errors = run(tmp_path, SOAK, minutes, known, limit_s=60 * float(minutes) + 120)
    assert code == 0, errors
    rounds = json.loads(out)
    third = len(rounds) // 3
    assert third > 2
    for rank in (0, 1):
        early, late = (
            list(zip(*(each[rank] for each in part), strict=True)) for part in (rounds[:third], rounds[-third:])
        )
        assert max(late[0]) <= max(early[0]) and max(late[1]) <= max(early[1]), (early, late)
        assert max(late[2]) < 1.02 * max(early[2]), (early[2], late[2])
