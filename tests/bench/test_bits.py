"""The comparison of bits as users start it: its table, what it can see, and on a GPU what it finds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from epmoe.bench.bits import BitsConfig, compare, requests, ways
from epmoe.config.compose import parse
from epmoe.engine.request import Result, TokenLogprobs
from epmoe.errors import UserError
from epmoe.weights.synthetic import make_checkpoint


def command(*keys: str, ranks: int = 1, timeout: float = 120) -> dict[str, Any]:
    """Its line of JSON."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = start if ranks > 1 else [sys.executable]
    done = subprocess.run([*start, "-m", "epmoe.bench", "bits", *keys], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command(ranks: int) -> None:
    """And what it finds: every bit is the same in any company."""
    found = command("runtime=cpu", "size=tiny", "prompts=12", "longest=140", "new=6", ranks=ranks)
    assert found["ranks"] == ranks and found["model"] == "random-tiny"
    assert {row["name"]: row["bits"] for row in found["rows"]} == {way.name: 12 for way in ways(12)}


def test_requests_are_greedy_and_sampled_and_of_every_length() -> None:
    asked = requests(parse(["size=tiny", "prompts=9", "longest=20"], BitsConfig), 320)
    assert [request.params.temperature for request in asked] == [0, 1] * 4 + [0]
    assert {len(request.ids) for request in asked} >= {1, 20} and all(request.params.logprobs for request in asked)


def test_one_bit_is_seen() -> None:
    logprobs = TokenLogprobs(-0.5, ((7, -0.5), (8, -1.0)))
    one = Result((7,), "length", 0.0, 0.0, (logprobs,))
    assert compare([one, one], [one, one]) == (2, 2)
    other = replace(one, logprobs=(replace(logprobs, chosen=-0.5000000000000001),))
    assert compare([one, other], [one, one]) == (2, 1)
    assert compare([one, replace(one, ids=(8,))], [one, one]) == (1, 1)


def test_mistakes() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        parse(["size=tiny", "checkpoint=somewhere"], BitsConfig)
    with pytest.raises(UserError, match="prompts"):
        parse(["prompts=1"], BitsConfig)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("experts", [32, 128])
def test_bits_follow_no_batch_on_a_gpu(tmp_path: Path, experts: int) -> None:
    """gpt-oss's layer shapes."""
    path = make_checkpoint(tmp_path / "shapes", "20b", layers=2, experts=experts, vocab=20_000, shards=1)
    found = command(f"checkpoint={path}", "prompts=40", timeout=500)
    assert {row["name"]: row["bits"] for row in found["rows"]} == {way.name: 40 for way in ways(40)}
