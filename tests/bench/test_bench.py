"""The benchmark as users start it: table, line of JSON, floor, random weights, peer; mistakes are one line."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import python
from spawn import run_ranks

from epmoe.bench.conditions import open_model
from epmoe.bench.floor import Floor, measure_bandwidth
from epmoe.bench.model import bench
from epmoe.bench.options import WAYS, BenchConfig, Measurement
from epmoe.bench.weights import RandomCheckpoint
from epmoe.config.compose import parse
from epmoe.config.keys import keys_of
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, Result, SamplingParams
from epmoe.errors import UserError
from epmoe.formats.mxfp4 import Mxfp4Matrix
from epmoe.layers.heads import HeadPart, Share
from epmoe.models.gpt_oss import GptOss
from epmoe.moe.placement import contiguous
from epmoe.moe.router import ROUTERS
from epmoe.ranks.mesh import Ranks
from epmoe.weights.experts import ExpertReader
from epmoe.weights.load import load
from epmoe.weights.manifest import Manifest
from epmoe.weights.synthetic import SIZES

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "batches=1,3", "prompt_tokens=5", "lengths=4,12", "prefill=2x16", "repeat=2", "first=1,16", "mixed=2x6", "samples=4"
]  # fmt: skip
QUICK = [*SMALL[:3], "prefill=", "first=", "mixed=", "repeat=1", "bandwidth=1", "flops=1"]  # decodes alone
ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
# What a step of the tiny size must read in float32, counted by hand: 2 layers, hidden 96, 4 heads and 2 key/value heads
# of 16, 5 experts of 64, 2 a token, 320 tokens, windows 8 and none.
DENSE = 2 * 4 * ((64 * 96 + 64) + 2 * (32 * 96 + 32) + (96 * 64 + 96) + 4 + 2 * 96 + (5 * 96 + 5)) + 4 * 96
EXPERT = 2 * ((128 * 96 + 96 * 64) * 17 // 32 + 4 * (128 + 96))
VOCABULARY = 4 * 320 * 96


def step_bytes(batch: int, contexts: range, *, local: int, ranks: int) -> float:
    distinct = local * (1 - (3 / 5) ** batch)
    cache = sum(min(8, c) + c for c in contexts) / len(contexts) * (2 * 2 * 16 * 4)
    return DENSE + distinct * EXPERT + VOCABULARY / ranks + batch * (96 * 4 + cache)


def cells_of(lines: list[str]) -> list[list[str]]:
    """Rows of all tables, their heads included."""
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


def command(*keys: str, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
    return python("-m", "epmoe.bench", *keys, ranks=ranks)


@pytest.fixture(scope="module", params=[1, 2])
def run(request: pytest.FixtureRequest) -> tuple[int, list[str], dict[str, Any]]:
    """Number of ranks, the lines of the table, the JSON."""
    done = command("runtime=cpu", "size=tiny", "bandwidth=0.001", *SMALL, ranks=request.param)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return request.param, lines, json.loads(last)


def test_conditions_are_told(run: tuple[int, list[str], dict[str, Any]]) -> None:
    ranks, lines, record = run
    told = "\n".join(lines)
    assert record["ranks"] == ranks and record["nodes"] == 1 and record["device"] == "cpu"
    assert record["torch"] == torch.__version__ and torch.__version__ in told
    assert (record["model"], record["dtype"], record["quant"]) == ("random-tiny", "float32", "mxfp4")
    assert record["experts"] == record["router"] == "reference" and record["combine"] == "slots"
    assert record["graphs"] is False
    assert record["prompt_tokens"] == 5 and record["lengths"] == [4, 12] and record["sampling"] == "greedy"
    assert record["bandwidth"] == 1e9 and record["measured"] == ["flops"] and record["flops"] > 0
    assert record["runtime"]["max_batch"] == 3 and record["runtime"]["prefill_chunk"] == 2048
    for part in (f"random-tiny on {ranks} x cpu", "float32", "(t(12) - t(4)) / 8", "0.001 TB/s (given)", "(measured)"):
        assert part in told
    assert len(record["peak_bytes"]) == len(record["cache_bytes"]) == ranks
    assert min(record["peak_bytes"]) > min(record["cache_bytes"]) > 0 < record["load_s"]


def test_rows_say_time_and_distance(run: tuple[int, list[str], dict[str, Any]]) -> None:
    """Each row's numbers agree with each other and with the floor counted by hand; the table shows the same."""
    ranks, lines, record = run
    cells = cells_of(lines)
    assert cells[0][:3] == ["batch", "ms a step", "tokens/s"] and len(cells) == (1 + 2) + (1 + 2) + (1 + 1)
    for row, shown, batch in zip(record["decode"], cells[1:3], (1, 3), strict=True):
        assert row["batch"] == batch and len(row["ms_of_each"]) == 2
        assert row["ms"] == pytest.approx(sum(row["ms_of_each"]) / 2)  # the median of two
        assert row["tokens_per_s"] == pytest.approx(batch / row["ms"] * 1e3)
        assert row["first_token_ms"] > 0
        expected = step_bytes(batch, range(5 + 4, 5 + 12), local=math.ceil(5 / ranks), ranks=ranks)
        assert row["floor_bytes"] == pytest.approx(expected)
        assert row["floor_ms"] == pytest.approx(expected / 1e9 * 1e3)
        assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert float(shown[0]) == batch and float(shown[1]) == pytest.approx(row["ms"], abs=1e-3)
        assert float(shown[5]) == pytest.approx(row["floor_ms"], rel=1e-3)
    prefill = record["prefill"]
    assert (prefill["sequences"], prefill["tokens"]) == (2, 16)
    assert prefill["tokens_per_s"] == pytest.approx(32 / prefill["s"])
    values = (DENSE / 4 + 2 / ranks * 2 * (128 * 96 + 96 * 64)) / 2  # one of the two layers
    assert prefill["limit_tokens_per_s"] == pytest.approx(record["flops"] / (2 * values))
    assert any(line.startswith("prefill 2 x 16: ") for line in lines)


def test_first_tokens_and_mixed_steps_are_rows_too(run: tuple[int, list[str], dict[str, Any]]) -> None:
    ranks, lines, record = run
    cells = cells_of(lines)
    assert cells[3][:3] == ["prompt", "first token, ms", "best of 4"] and record["samples"] == 4
    limit = record["prefill"]["limit_tokens_per_s"]
    for row, shown, tokens in zip(record["first"], cells[4:6], (1, 16), strict=True):
        assert row["tokens"] == tokens and len(row["ms_of_each"]) == 4
        assert row["best_ms"] == min(row["ms_of_each"]) <= row["ms"] <= max(row["ms_of_each"])
        # No bytes of the cache: what a prompt's tokens attend to is of the step itself.
        nbytes = step_bytes(tokens, range(1), local=math.ceil(5 / ranks), ranks=ranks)
        assert row["floor_ms"] == pytest.approx(1e3 * max(nbytes / 1e9, tokens / limit))
        assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert [float(cell) for cell in shown[:3]] == pytest.approx([tokens, row["ms"], row["best_ms"]], abs=1e-3)
    mixed = record["mixed"]
    assert (mixed["sequences"], mixed["tokens"]) == (2, 6) and mixed["steps"] >= 1
    assert mixed["best_first_ms"] <= mixed["first_ms"] and mixed["between_ms"] > 0 < mixed["bare_ms"]
    nbytes = step_bytes(2 + 6, range(1), local=math.ceil(5 / ranks), ranks=ranks)
    nbytes += 2 * 2 * 5 * (2 * 2 * 16 * 4)  # two sequences, two layers, five positions
    assert mixed["floor_ms"] == pytest.approx(1e3 * max(nbytes / 1e9, 6 / limit))
    assert cells[6][:2] == ["decoding x prompt", "first token, ms"] and cells[7][0] == "2 x 6"
    assert float(cells[7][1]) == pytest.approx(mixed["first_ms"], abs=1e-3)


def test_floor_of_the_published_size() -> None:
    """gpt-oss-20b in bf16: a layer's attention is 53 MB, an expert 13.2 MB, the projection 1.16 GB, a step 3.7 GB."""
    checkpoint = RandomCheckpoint.of("20b")
    with torch.device("meta"):
        model = GptOss(GptOss.Config.from_json(checkpoint.config))
    manifest = Manifest.of(checkpoint, model, "mxfp4")
    floor = Floor.of(manifest, model, torch.bfloat16, local=32, ranks=1)
    assert floor.dense / 24 == pytest.approx(53e6, rel=0.01)
    assert floor.expert / 24 == pytest.approx(13.2e6, rel=0.01)
    assert floor.vocabulary == pytest.approx(1.16e9, rel=0.01)
    assert floor.step_bytes(1, range(128, 256)) == pytest.approx(3.7e9, rel=0.01)
    assert floor.step_bytes(64, range(128, 256)) == pytest.approx(12.9e9, rel=0.02)
    model.share_heads(Share(HeadPart.of(64, 8, 1, 4), lambda x_TX: x_TX))
    shared = Floor.of(Manifest.of(checkpoint, model, "mxfp4"), model, torch.bfloat16, local=8, ranks=4)
    assert (floor.dense - shared.dense) / 24 == pytest.approx(0.75 * 5120 * 2880 * 2, rel=0.01)  # of q, k and v
    assert shared.position * 4 == floor.position
    assert floor.distinct(1) == pytest.approx(4) and floor.distinct(10**6) == pytest.approx(32)


def test_bandwidth_is_measured() -> None:
    assert 1e8 < measure_bandwidth(torch.device("cpu")) < 1e13  # bytes, not megabytes or bits, of any host


def local_experts(ranks: Ranks) -> dict[int, list[torch.Tensor]]:
    """{expert: its tensors of layer 1} as the loader of this rank gets them, and one that all ranks have under -1."""
    checkpoint = RandomCheckpoint.of("tiny")
    with torch.device("meta"):
        model = GptOss(GptOss.Config.from_json(checkpoint.config))
    gate_up, down = Manifest.of(checkpoint, model, "auto").layers[1]
    ids = contiguous(5, ranks.expert_size).experts[ranks.expert_rank]
    weights = ExpertReader(checkpoint, ids, ranks.device).weights(gate_up, down, torch.float32)
    found = {-1: [checkpoint.read("model.layers.1.self_attn.q_proj.weight", ranks.device)]}
    for index, expert in enumerate(ids):
        assert isinstance(weights.gate_up, Mxfp4Matrix) and isinstance(weights.down, Mxfp4Matrix)
        matrices = [each for matrix in (weights.gate_up, weights.down) for each in vars(matrix).values()]
        tensors = [*matrices, weights.gate_up_bias_LN, weights.down_bias_LH]
        found[expert] = [tensor[index].clone() for tensor in tensors]
    return found


def test_an_expert_is_the_same_on_any_number_of_ranks() -> None:
    whole = local_experts(ONE)
    assert set(whole) == {-1, 0, 1, 2, 3, 4}
    for parts in (run_ranks(local_experts, 2), run_ranks(local_experts, 3)):
        for part in parts:
            for expert, tensors in part.items():
                for mine, theirs in zip(tensors, whole[expert], strict=True):
                    assert torch.equal(mine, theirs)
    first, second = whole[0][0], whole[1][0]
    assert not torch.equal(first, second)  # experts differ


def test_random_weights_have_the_distributions_of_the_synthetic_ones() -> None:
    checkpoint = RandomCheckpoint.of("tiny")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks, scales = checkpoint.read(f"{name}_blocks"), checkpoint.read(f"{name}_scales")
    assert torch.bincount(blocks.flatten().int(), minlength=256).min() > 0.4 * blocks.numel() / 256
    assert set(scales.flatten().tolist()) == {119, 120}
    embedding = checkpoint.read("model.embed_tokens.weight", "cpu", torch.float32)
    assert float(embedding.std()) == pytest.approx(1, rel=0.05)
    assert torch.equal(checkpoint.read("model.norm.weight"), torch.ones(96, dtype=torch.bfloat16))
    assert float(checkpoint.read("lm_head.weight").float().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(
        checkpoint.read("model.layers.0.mlp.router.bias"), checkpoint.read("model.layers.1.mlp.router.bias")
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_a_whole_model(size: str) -> None:
    checkpoint = RandomCheckpoint.of(size)
    with torch.device("meta"):
        model = GptOss(GptOss.Config.from_json(checkpoint.config))
    Manifest.of(checkpoint, model, "auto").check()


@pytest.mark.gpu
def test_20b_is_made_in_seconds() -> None:
    ranks = Ranks(0, 1, 0, 1, torch.device("cuda", 0))
    model, report = load(RandomCheckpoint.of("20b"), ranks)
    assert report.bytes_read == 0 and report.seconds < 20
    assert len(model.moe_layers()) == 24


def on_devices(ranks: int) -> None:
    # A step of this size takes a GPU some 50 µs: only hundreds of them are longer than what else a run's time holds.
    done = command("size=tiny", "bandwidth=1", *SMALL, "lengths=4,260", ranks=ranks)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["device"] == torch.cuda.get_device_name() and record["ranks"] == ranks
    assert (record["dtype"], record["experts"], record["router"]) == ("bfloat16", "triton", "triton")
    assert all(row["ms"] > 0 for row in record["decode"]) and record["prefill"]["s"] > 0
    assert record["graphs"] is True and record["flops"] > 1e13 and len(record["peak_bytes"]) == ranks


@pytest.mark.gpu
def test_on_a_device() -> None:
    on_devices(1)


@pytest.mark.multigpu
def test_on_two_devices() -> None:
    on_devices(2)


@pytest.mark.gpu
def test_benchmark_of_the_routers() -> None:
    script = ROOT / "scripts" / "bench" / "router.py"
    command = [sys.executable, str(script), "--experts", "8/32", "--tokens", "1,300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [(row["experts"], row["tokens"]) for row in record["rows"]] == [("8/32", 1), ("8/32", 300)]
    assert all(set(row["us"]) == set(ROUTERS) and min(row["us"].values()) > 0 for row in record["rows"])


@pytest.mark.slow  # tests/ranks/test_profile.py has a trace
def test_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run of each batch is recorded, beside what is measured."""
    monkeypatch.setattr(sys, "argv", ["bench", "runtime=cpu", "size=tiny", *QUICK, f"runtime.profile={tmp_path}"])
    bench()
    (file,) = tmp_path.iterdir()
    names = [event["name"] for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("sample") == 2 * 8


@pytest.mark.parametrize(
    "sampling", ["top_p", *(pytest.param(each, marks=pytest.mark.slow) for each in ("logprobs", "penalty"))]
)
def test_decodes_of_sampled_tokens(sampling: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    keys = ["batches=2", "prompt_tokens=5", "lengths=2,4", "prefill=", "first=", "mixed=", "repeat=1", "bandwidth=1"]
    monkeypatch.setattr(sys, "argv", ["bench", "runtime=cpu", "size=tiny", *keys, "flops=1", f"sampling={sampling}"])
    chosen: list[SamplingParams] = []
    generate = Engine.generate

    def noted(self: Engine, requests: list[Request]) -> list[Result]:
        chosen.extend(each.params for each in requests)
        return generate(self, requests)

    monkeypatch.setattr(Engine, "generate", noted)
    bench()
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["sampling"] == sampling and any(f"decodes by {sampling}" in line for line in lines)
    (row,) = record["decode"]
    # What log-probabilities take is behind the step.
    assert (
        ("greedy_ms" in row) == (sampling != "logprobs") == any("| greedy, ms | above, % |" in line for line in lines)
    )
    if "greedy_ms" in row:
        assert row["greedy_ms"] > 0 and row["above_greedy"] > -0.9
    assert len(chosen) == 6  # a warm-up, then a long and a short run of two sequences
    for key, value in WAYS[sampling].items():
        assert {getattr(each, key) for each in chosen} == {value} != {getattr(SamplingParams(), key)}
    assert {each.seed for each in chosen} == {0, 1}


MISTAKES = {
    "unknown key": (["batchs=1"], "unknown key 'batchs'; known: size, batches", "did you mean batches?"),
    "no key": (["fast"], "'fast'", "known: size"),
    "size": (["size=21b"], "size='21b'", "known: tiny, 20b, 120b"),
    "batches": (["batches=1,0"], "batches='1,0'", "whole numbers above 0"),
    "lengths": (["lengths=8,8"], "lengths='8,8'", "the smaller one first"),
    "prefill": (["prefill=8"], "prefill='8'", "SEQUENCESxTOKENS"),
    "first": (["first=16,0"], "first='16,0'", "whole numbers above 0"),
    "mixed": (["mixed=64"], "mixed='64'", "SEQUENCESxTOKENS"),
    "bandwidth": (["bandwidth=nan"], "bandwidth=nan is out of range", "a number, at least 0"),
    "a key of no use": (["prompt=a"], "prompt means nothing to a benchmark", "size, batches"),
    "a group of no use": (["sampling.seed=1"], "sampling.seed means nothing", "size, batches"),
    "a shared key's value": (["experts=fast"], "experts='fast' is unknown", "triton"),
    "two models": (["size=tiny", "checkpoint=x"], "exclude each other", "give one"),
    "peer without files": (["size=tiny", "compare=transformers"], "compare=transformers", "give checkpoint=DIRECTORY"),
    "the batch of generation": (
        ["runtime.max_batch=4"],
        "runtime.max_batch means nothing to a benchmark",
        "size, batches",
    ),
    "presets of no use": (["serve=default"], "serve means nothing", "size, batches"),
    "another way to choose": (["sampling=sample"], "sampling='sample' is unknown", "known: greedy, temperature, top_p"),
    "a peer that is greedy": (
        ["checkpoint=x", "compare=transformers", "sampling=top_p"],
        "compare=transformers is greedy, and sampling=top_p",
        "leave one of them out",
    ),
    "repeat": (["repeat=0"], "repeat=0", "a whole number above 0"),
    "several sizes": (["size=tiny,20b"], "size='tiny,20b' holds several values", "one of tiny, 20b, 120b"),
    "another peer": (["compare=vllm"], "compare='vllm' is unknown", "known: transformers, hub"),
    "twice the same": (["experts=hub", "compare=hub"], "compare=hub with experts=hub", "is twice the same"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_on_the_command_line(case: str) -> None:
    keys, *parts = MISTAKES[case]
    with pytest.raises(UserError) as error:
        parse(keys, BenchConfig)
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)


RUN_MISTAKES = {
    "too few steps": (
        ["runtime.prefill_chunk=2"],
        "batches=3 prompts of 5 tokens take 8 steps of runtime.prefill_chunk=2",
    ),
    "too long": (["prefill=1x600"], "prefill=1x600 needs 601 positions"),
    "too long a first prompt": (["first=4,512"], "first=512 needs 513 positions"),
    "too many mixed steps": (["samples=60"], "mixed=2x6 needs 737 positions"),
    "too small a cache": (["runtime.cache_tokens=40"], "raise runtime.cache_tokens"),
}


@pytest.mark.parametrize("case", RUN_MISTAKES)
def test_mistakes_found_with_the_model(case: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, message = RUN_MISTAKES[case]
    monkeypatch.setattr(sys, "argv", ["bench", f"checkpoint={tiny_checkpoint}", "runtime=cpu", *SMALL, *keys])
    with pytest.raises(UserError) as error:
        bench()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_it_measures_one_replica() -> None:
    with pytest.raises(UserError, match=r"^mesh\.replica=2 means nothing to a benchmark, which measures one replica"):
        open_model(BenchConfig(), "tiny", replace(ONE, replicas=2))


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"], BenchConfig)
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(f"{name}=" in shown for name in keys_of(Measurement))
    assert "runtime.prefill_chunk" in shown and "sampling.seed" not in shown and "max_batch" not in shown


def test_own_keys_are_spelled_as_they_are_meant() -> None:
    keys = ["size=tiny", "batches=1,4,16", "prefill=8x2048", "lengths=32,160", "bandwidth=3.35", "runtime=cpu"]
    found = parse(keys, BenchConfig)
    assert (found.size, found.batches, found.prefill, found.lengths) == ("tiny", (1, 4, 16), (8, 2048), (32, 160))
    assert (found.bandwidth, found.flops, found.runtime.dtype) == (3.35, 0.0, "float32")
    nothing = parse(["prefill=", "compare=", "size=", "mixed=", "first="], BenchConfig)
    assert nothing.prefill is nothing.compare is nothing.size is nothing.mixed is None and nothing.first == ()


def test_cfg_job_shows_the_benchmarks_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--cfg", "job", "batches=2,3", "runtime=throughput"], BenchConfig)
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["batches"] == [2, 3] and shown["prefill"] == [8, 2048] and shown["sampling"] == "greedy"
    assert shown["runtime"]["prefill_chunk"] == 16384 and "max_batch" not in shown["runtime"]
