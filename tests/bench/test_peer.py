"""compare=: who is measured beside this engine, on the same prompts."""

import json
import sys
from pathlib import Path

import pytest
from hub_kernel import written

from epmoe.bench import peer
from epmoe.bench.model import bench
from epmoe.bench.options import BenchConfig
from epmoe.config.compose import parse
from epmoe.errors import UserError

FEW = [
    "batches=2", "prompt_tokens=5", "lengths=2,4", "prefill=1x8", "repeat=1", "first=1", "mixed=2x6", "samples=2",
    "bandwidth=1", "flops=1",
]  # fmt: skip


def test_the_peer_runs_the_same_checkpoint(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"checkpoint={tiny_checkpoint}", "runtime=cpu", "compare=transformers", *FEW]
    monkeypatch.setattr(sys, "argv", ["bench", *keys])
    bench()
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["peer"]["name"] == "transformers" and record["peer"]["load_s"] > 0
    for row in (*record["decode"], *record["first"]):
        assert row["speedup"] == pytest.approx(row["peer_ms"] / row["ms"])
    assert record["prefill"]["peer_tokens_per_s"] > 0
    assert any("peer, ms | speedup" in line for line in lines)


def test_hub_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The same model with the other experts: all that both measure stands side by side."""
    kernel = written(tmp_path)
    keys = ["size=tiny", "runtime=cpu", "runtime.dtype=bfloat16", "compare=hub", f"hub.kernel={kernel}", *FEW]
    monkeypatch.setattr(sys, "argv", ["bench", *keys, "sampling=top_p"])
    bench()
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["experts"] == "reference" and record["peer"]["measured"]["experts"] == "hub"
    assert record["peer"]["experts"] == str(kernel) and record["peer"]["measured"]["mixed"]["tokens"] == 6
    for row in (*record["decode"], *record["first"]):
        assert row["speedup"] == pytest.approx(row["peer_ms"] / row["ms"])
    assert record["prefill"]["peer_tokens_per_s"] > 0
    assert any(line.startswith("peer: experts=hub ") for line in lines)


def test_hub_is_looked_for_before_anything_is_measured() -> None:
    with pytest.raises(UserError, match=r"^hub\.kernel=nowhere is neither"):
        peer.check(parse(["compare=hub", "hub.kernel=nowhere", "size=tiny"], BenchConfig), 2)


def test_the_peer_takes_one_rank() -> None:
    with pytest.raises(UserError, match="runs on one rank"):
        peer.check(parse(["compare=transformers", "checkpoint=x"], BenchConfig), 2)
