"""The promise of combine=slots: the same tokens and the same logits, bit for bit, on any number of ranks.

Every run loads its own slice of the experts, so it also shows that slices, placement and routing agree.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitwise_run import Run, assert_same, digest, runs

from epmoe.weights.hub import DEMO
from epmoe.weights.synthetic import make_checkpoint

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eleven experts: no number of ranks but 1 divides them."""
    return str(make_checkpoint(tmp_path_factory.mktemp("bitwise"), experts=11, top_k=3))


@pytest.fixture(scope="module")
def one_rank(checkpoint: str) -> Run:
    ids, logits = runs(checkpoint, 1, combine="slots")
    assert len(logits) == sum(map(len, ids)) == 60 and logits.isfinite().all()
    assert len({token for row in ids for token in row}) > 20  # not one token again and again
    return ids, logits


@pytest.mark.parametrize("size", [2, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (4, 8))])
def test_slots_give_the_same_bits_on_any_number_of_ranks(checkpoint: str, one_rank: Run, size: int) -> None:
    assert_same(runs(checkpoint, size, combine="slots"), one_rank)


def test_slots_give_the_same_bits_in_bf16(checkpoint: str) -> None:
    """Rounding to bf16 would show another order of summation at once."""
    assert_same(
        runs(checkpoint, 4, combine="slots", dtype="bfloat16"), runs(checkpoint, 1, combine="slots", dtype="bfloat16")
    )


def test_all_reduce_does_not(checkpoint: str) -> None:
    """These tests can fail: the usual combine's bits depend on the number of ranks; gloo rounds bf16 at every hop."""
    _, one = runs(checkpoint, 1, combine="all_reduce", dtype="bfloat16")
    _, four = runs(checkpoint, 4, combine="all_reduce", dtype="bfloat16")
    steps = 3  # before a different token leads the texts apart
    assert not torch.equal(one[:steps], four[:steps])
    torch.testing.assert_close(four[:steps], one[:steps], atol=0.25, rtol=0)  # yet it computes the same thing


@pytest.mark.parametrize("threads", [*(pytest.param(each, marks=pytest.mark.slow) for each in "12"), None])
def test_omp_num_threads_changes_nothing(checkpoint: str, one_rank: Run, threads: str | None, tmp_path: Path) -> None:
    """Fresh interpreters, since OpenMP reads the variable once; one rank without it, as a user starts it."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads:
        env["OMP_NUM_THREADS"] = threads
    command = [sys.executable, str(HELPERS / "bitwise_run.py"), checkpoint, str(tmp_path / "found")]
    subprocess.run(command, env=env, check=True, timeout=120)
    assert (tmp_path / "found").read_text() == digest(one_rank)


@pytest.mark.slow  # one thread is what all other tests have
def test_torchruns_own_choice_of_threads_changes_nothing(checkpoint: str, one_rank: Run, tmp_path: Path) -> None:
    """torchrun sets OMP_NUM_THREADS=1 for several ranks when it is not set."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, str(HELPERS / "bitwise_run.py"), checkpoint, str(tmp_path / "found")],
        env=env,
        check=True,
        timeout=120,
    )
    assert (tmp_path / "found").read_text() == digest(one_rank)


@pytest.mark.slow  # tests/whole/test_attention_modes.py has it on two and four
def test_embedded_model_on_eight_ranks() -> None:
    assert_same(runs(str(DEMO), 8, combine="slots"), runs(str(DEMO), 1, combine="slots"))


# On GPUs. Real layer shapes: 2880 is no multiple of any tile. The vocabulary is cut to keep the checkpoint small.


@pytest.fixture(scope="module")
def real_shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("shapes"), "20b", layers=2, vocab=8192, shards=1))


@pytest.mark.multigpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_triton_gives_the_same_bits_on_any_number_of_gpus(real_shapes: str, dtype: str) -> None:
    options = {"combine": "slots", "experts": "triton", "router": "triton", "dtype": dtype}
    one = runs(real_shapes, 1, "cuda", 240, **options)
    assert one[1].isfinite().all()
    for size in (2, 4):
        if size <= torch.cuda.device_count():
            assert_same(runs(real_shapes, size, "cuda", 240, **options), one)


@pytest.mark.multigpu
@pytest.mark.timeout(900)
def test_20b_size_checkpoint_on_all_gpus(tmp_path: Path) -> None:
    """The command on every device and on one: the same ids. EPMOE_20B names a checkpoint; else 13.8 GB are written."""
    place = os.environ.get("EPMOE_20B") or str(make_checkpoint(tmp_path / "20b", "20b"))
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "The first one"}\n{"prompt": "Another", "temperature": 1.0, "seed": 3}\n'
        + json.dumps({"prompt": "A long prompt. " * 40})
        + "\n"
    )
    found = []
    for size in (torch.cuda.device_count(), 1):
        output = tmp_path / f"{size}.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        keys = [f"checkpoint={place}", f"prompts={tmp_path / 'p.jsonl'}", f"output={output}", "combine=slots"]
        keys += ["max_new_tokens=32", "sampling.ignore_eos=true"]
        done = subprocess.run([*command, "-m", "epmoe.generate", *keys], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        found.append([json.loads(line)["ids"] for line in output.read_text(encoding="utf-8").splitlines()])
        print(done.stderr.splitlines()[-1])
    assert found[0] == found[1] and all(len(ids) == 32 for ids in found[0])
