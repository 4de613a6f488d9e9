"""Attention over the mesh: the tokens and log-probabilities of one rank, bit for bit, in each mode."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bitwise_run import Run, assert_same, runs
from drafting import draft_wrongly, try_some
from forked import python
from kinds import KINDS, PROMPTS
from spawn import free_port, run_ranks

from epmoe.config.compose import from_keys
from epmoe.engine.request import SamplingParams
from epmoe.errors import UserError
from epmoe.llm import LLM
from epmoe.ranks.mesh import Ranks
from epmoe.weights.synthetic import make_checkpoint

slow = pytest.mark.slow
SMALL = {"max_batch": 3, "prefill_chunk": 8, "cache_tokens": 240, "page": 4}  # put back now and then
DATA = ("slots", "all_to_all")  # exchanges whose bits do not follow from the ranks
# ranks, mode, combine, runtime, whether drafts are tried, right or wrong: the embedded model has 8 query heads on 2
WAYS: list[tuple[int, str, str, dict[str, Any], bool]] = [
    (2, "tensor", "slots", SMALL, True),
    (2, "data", "all_to_all", SMALL, True),
]
MORE = [
    (4, "tensor", "slots", {}, False),
    (3, "data", "slots", {}, False),  # tests/whole/test_data.py has them
    *(
        (ranks, *way, runtime, True)
        for runtime in ({}, SMALL)
        for way, sizes in ((("tensor", "slots"), (1, 2, 4, 8)), *((("data", each), (1, 2, 3, 4, 8)) for each in DATA))
        for ranks in sizes
    ),
]
Answers = list[tuple[Any, ...]]


def answers(mine: Ranks, keys: dict[str, Any], drafts: bool) -> tuple[Answers, int]:
    """All answers, and some of them again, whose prefixes are there then; and the bytes of keys and values."""
    keys = {"chat": "off", "speculate": "ngram" if drafts else "off", **keys}
    with LLM.opened(from_keys(keys), mine) as llm, pytest.MonkeyPatch.context() as patch:
        llm.load()
        if drafts:
            dice = random.Random(1)
            try_some(patch, dice, 7)
            draft_wrongly(patch, dice, 300, 6 / 7)
        params = [SamplingParams(max_tokens=20, ignore_eos=True, **kind) for kind in KINDS]
        said: list[Answers] = []
        for some in (slice(None), slice(1, 4)):
            found = llm.generate(PROMPTS[some], params[some])
            said.append(
                [
                    (each.text, each.ids, each.finish_reason, each.logprobs, one.prompt_logprobs)
                    for one in found
                    for each in one.outputs
                ]
            )
        assert said[0][1:4] == said[1] and sum(one.cached_tokens for one in found) > 0
        return said[0], llm.cache.nbytes


def keys_of(mode: str, combine: str = "slots", runtime: dict[str, Any] | None = None, device: str = "cpu") -> Any:
    return {"mesh": {"attention": mode}, "combine": combine, "runtime": {"device": device, **(runtime or {})}}


@pytest.fixture(scope="module")
def known() -> tuple[Answers, int]:
    found: tuple[Answers, int] = run_ranks(answers, 1, keys_of("replicate"), False)[0]
    return found


@pytest.mark.parametrize(
    ("ranks", "mode", "combine", "runtime", "drafts"), [*WAYS, *(pytest.param(*each, marks=slow) for each in MORE)]
)
def test_the_same_bits(
    ranks: int, mode: str, combine: str, runtime: dict[str, Any], drafts: bool, known: tuple[Answers, int]
) -> None:
    for said, nbytes in run_ranks(answers, ranks, keys_of(mode, combine, runtime), drafts, timeout=300):
        assert said == known[0]
        if mode == "tensor" and not runtime:
            assert nbytes * min(ranks, 2) == known[1]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 query heads of 10 on 6, of which 2, 3, 4, 6 and 12 ranks can have as many."""
    folder = tmp_path_factory.mktemp("odd")
    return str(make_checkpoint(folder, heads=12, kv_heads=6, head_dim=10, experts=12, top_k=3))


@pytest.fixture(scope="module")
def one_rank(odd: str) -> Run:
    return runs(odd, 1)


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=slow) for size in (2, 6, 12))])
def test_odd_sizes(odd: str, one_rank: Run, size: int) -> None:
    assert_same(runs(odd, size, attention="tensor"), one_rank)


def test_odd_sizes_in_bf16(odd: str) -> None:
    assert_same(runs(odd, 2, attention="tensor", dtype="bfloat16"), runs(odd, 1, dtype="bfloat16"))


def opened(mine: Ranks, keys: dict[str, Any]) -> None:
    LLM.opened(from_keys(keys), mine).load()


def test_heads_that_so_many_ranks_cannot_share() -> None:
    with pytest.raises(UserError, match=r"3 ranks cannot share 8 query and 2 key/value heads evenly; 1, 2, 4, 8 can"):
        run_ranks(opened, 3, keys_of("tensor"))


@pytest.mark.slow  # tests/ranks/test_launch.py has two agents, the tests above have the modes
@pytest.mark.parametrize("mode", ["data", "tensor"])
def test_two_agents_as_two_nodes(mode: str, tmp_path: Path) -> None:
    """torchrun on each of two nodes, two ranks each; the file of answers is that of one rank."""
    prompts = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "one cup, two cups, " * (1 + 9 * index), "temperature": index / 4, "seed": 3} for index in range(5)
    ]
    prompts.write_text("".join(json.dumps(each) + "\n" for each in lines))
    keys = [f"prompts={prompts}", "runtime.device=cpu", "max_new_tokens=12", "sampling.logprobs=2", "chat=off"]
    one, port = tmp_path / "one.jsonl", str(free_port())
    python("-m", "epmoe.generate", *keys, f"output={one}").check_returncode()
    agents: list[subprocess.Popen[str]] = []
    for node in range(2):
        options = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            "--master-port",
            port,
            "-m",
            "epmoe.generate",
        ]
        more = [
            f"mesh.attention={mode}",
            *([] if mode == "data" else ["combine=slots"]),
            f"output={tmp_path / 'four.jsonl'}",
        ]
        agents.append(
            subprocess.Popen([*command, *keys, *more], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        )
    try:
        said = [agent.communicate(timeout=120)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "combine=all_to_all" in said[0] or mode != "data"
    found = [[json.loads(line) for line in file.read_text().splitlines()] for file in (one, tmp_path / "four.jsonl")]
    assert len(found[0]) == 5 and [(each["ids"], each["logprobs"]) for each in found[0]] == [
        (each["ids"], each["logprobs"]) for each in found[1]
    ]


# On GPUs: NCCL's collectives in graphs.


@pytest.fixture(scope="module")
def known_on_a_gpu() -> tuple[Answers, int]:
    found: tuple[Answers, int] = run_ranks(
        answers, 1, keys_of("replicate", device="cuda"), False, timeout=300, device="cuda"
    )[0]
    return found


@pytest.mark.multigpu
@pytest.mark.parametrize("runtime", [{}, SMALL], ids=["large", "small"])
@pytest.mark.parametrize(("mode", "combine"), [("tensor", "slots"), *(("data", each) for each in DATA)])
def test_the_same_bits_on_gpus(
    mode: str, combine: str, runtime: dict[str, Any], known_on_a_gpu: tuple[Answers, int]
) -> None:
    keys = keys_of(mode, combine, runtime, "cuda")
    for said, nbytes in run_ranks(answers, 2, keys, bool(runtime), timeout=300, device="cuda"):
        assert said == known_on_a_gpu[0]
        if mode == "tensor" and not runtime:
            assert nbytes * 2 == known_on_a_gpu[1]


@pytest.mark.multigpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_shapes_on_gpus(dtype: str, tmp_path: Path) -> None:
    """20b's widths and heads, two layers."""
    place = str(make_checkpoint(tmp_path, "20b", layers=2, vocab=8192, shards=1))
    options = {"combine": "slots", "experts": "triton", "router": "triton", "dtype": dtype}
    assert_same(runs(place, 2, "cuda", 240, attention="tensor", **options), runs(place, 1, "cuda", 240, **options))


@pytest.mark.multigpu
def test_two_replicas_on_two_gpus(tmp_path: Path) -> None:
    prompts, found = tmp_path / "p.jsonl", []
    prompts.write_text("".join(json.dumps({"prompt": "one cup, two cups, " * each}) + "\n" for each in range(1, 9)))
    for ranks, replica in ((1, 0), (2, 2)):
        output = tmp_path / f"{ranks}.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        keys = [f"prompts={prompts}", f"output={output}", f"mesh.replica={replica}", "max_new_tokens=24", "chat=off"]
        keys += ["sampling.logprobs=2", "sampling.ignore_eos=true"]
        done = subprocess.run([*command, "-m", "epmoe.generate", *keys], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        found.append([(each["ids"], each["logprobs"]) for each in map(json.loads, output.read_text().splitlines())])
    assert found[0] == found[1] and len(found[0]) == 8
