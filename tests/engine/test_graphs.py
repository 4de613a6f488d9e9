"""Steps in static buffers, as CUDA graphs or not: same tokens, nothing compiled late, no wait without a bound.

On the CPU a step is called where a GPU replays it: the same function, of decodes with the same buckets and spare rows.
"""

import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from signal import SIGKILL, SIGSTOP, Signals
from typing import Any

import pytest
import torch
from absent_gpu import forget
from bitwise_run import requests as bitwise_requests
from sampling import sample
from spawn import commands, run_ranks
from steps import make_step

from epmoe.cache.fit import CacheSettings, fit_cache
from epmoe.engine import sequence
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.graphs import buckets, resolve_graphs
from epmoe.engine.ragged import Ragged
from epmoe.engine.request import Request, Result, SamplingParams, Workload
from epmoe.errors import UserError
from epmoe.kernels import symmetric
from epmoe.layers.twin import switched
from epmoe.models.decoder import Decoder, Limits
from epmoe.ranks.mesh import Ranks
from epmoe.ranks.transfer import Arrival
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES, Choices
from epmoe.weights.load import load
from epmoe.weights.synthetic import make_checkpoint

EOS = range(40, 60)  # a random model seldom says the checkpoint's own
STOP = 7  # the text layer's stop strings are this, to the engine: a token at which the callback says stop


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small, with the head dimension of the published models."""
    shape: dict[str, Any] = {"hidden": 192, "heads": 8, "head_dim": 64, "experts": 8, "top_k": 3, "max_position": 16384}
    return str(make_checkpoint(tmp_path_factory.mktemp("graphs"), **shape))


def rank_on(device: str) -> Ranks:
    return Ranks(0, 1, 0, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))


def build(mine: Ranks, checkpoint: str, asked: Sequence[Request], **limits: Any) -> Engine:
    model, report = load(
        Checkpoint.open(checkpoint), mine, Choices(combine=limits.pop("combine", "slots")), progress=False
    )
    needs = [request.cached(model.config.max_positions) for request in asked]
    assert isinstance(model, Decoder)
    model.limits = replace(model.limits, vocab_chunk=limits.pop("vocab_chunk", model.limits.vocab_chunk))
    config = EngineConfig(**{"eos_ids": EOS, "max_batch": 5, "prefill_chunk": 16, **limits})
    cache = fit_cache(
        model.config, needs, mine, CacheSettings(DTYPES[report.dtype], page=4, max_batch=config.max_batch)
    )
    return Engine(model, cache, mine, config)


def mixed() -> list[Request]:
    """Greedy and sampled, short and beyond the window, more than run at a time; some end by eos, some by length."""
    found = []
    for index, request in enumerate(bitwise_requests(300) * 2):
        kind = request.params
        changed = {"max_new_tokens": 4 + 5 * (index % 5), "logprobs": index % 3, "ignore_eos": index % 4 == 3}
        params = SamplingParams(**{**vars(kind), **changed, "seed": (kind.seed or 0) + index})
        found.append(Request(request.ids[index // 6 :] or (index,), params))
    return found


def stop_at(shown: dict[int, list[int]]) -> Any:
    """A callback that records, and stops some requests as a stop string does."""

    def on_token(index: int, token: int) -> bool:
        shown.setdefault(index, []).append(token)
        return index % 2 == 0 and token % 16 == STOP

    return on_token


def by_hand(engine: Engine, index: int, request: Request) -> tuple[tuple[int, ...], str]:
    """A request alone, a Step a token, the sampler with parameters on the host: what the engine did before."""
    cache, params, ids = engine.cache, request.params, list(request.ids)
    handle, cached = cache.pages.admit()
    new = list(request.ids)
    seen = torch.zeros(1, engine.vocab, dtype=torch.bool)
    while True:
        with torch.inference_mode():
            assert cache.grow(handle, cached, cached + len(new)) == len(new)
            step = make_step([(handle, new, cached)], every=False)
            logits = engine.model.logits(engine.model.hidden(step, cache), None)
        seen[0, ids] = True
        ends = [*params.stop_token_ids, *(() if params.ignore_eos else EOS)]
        token = int(sample(logits, [params], [len(ids)], seen, [ids[len(request.ids) :]], [ends]))
        cached, new = len(ids), [token]
        ids.append(token)
        reason = "length" if len(ids) == request.length(engine.max_positions) else ""
        if token in EOS and not params.ignore_eos:
            reason = "eos"
        elif index % 2 == 0 and token % 16 == STOP:
            reason = "stop"
        if reason:
            cache.release(handle)
            return tuple(ids[len(request.ids) :]), reason


@pytest.mark.parametrize("limits", [{}, {"max_batch": 1}, {"max_batch": 12, "prefill_chunk": 500}], ids=str)
def test_same_tokens_as_one_request_after_the_other(checkpoint: str, limits: dict[str, int]) -> None:
    """Requests join and leave, batches are filled up to buckets, ids are read a step late: no token changes."""
    asked = mixed()
    engine = build(rank_on("cpu"), checkpoint, asked, **limits)
    shown: dict[int, list[int]] = {}
    results = engine.generate(asked, stop_at(shown))
    expected = [by_hand(engine, index, request) for index, request in enumerate(asked)]
    assert [(result.ids, result.finish_reason) for result in results] == expected
    assert {reason for _, reason in expected} == {"eos", "stop", "length"}
    for index, result in enumerate(results):  # not even a callback sees the token of the step after the end
        assert tuple(shown.get(index, ())) == (result.ids[:-1] if result.finish_reason == "eos" else result.ids)
        assert len(result.logprobs) == (len(result.ids) if asked[index].params.logprobs else 0)
    assert not engine.cache.pages.held
    again = engine.generate(asked, stop_at({}))  # the same buffers, with what the first run left in them
    assert [(each.ids, each.logprobs) for each in again] == [(each.ids, each.logprobs) for each in results]


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 65, 100, 256, 1000])
def test_buckets(most: int) -> None:
    sizes = buckets(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    assert all(larger <= max(2 * size, size + size // 4 + 8) for size, larger in pairwise(sizes))
    assert {1, 2, 4, 8, 16, 24, 64} & set(range(most)) <= set(sizes)


def run_greedy(mine: Ranks, checkpoint: str, chunk: int) -> tuple[list[Any], set[Any]]:
    """All greedy, then with others among them; also the parts of the vocabulary that were asked for."""
    greedy = [Request(each.ids, SamplingParams(max_new_tokens=12)) for each in mixed()]
    graphs = mine.device.type != "cpu"
    engine = build(mine, checkpoint, greedy, vocab_chunk=chunk, graphs=graphs)
    parts: set[Any] = set()
    model: Any = engine.model
    real = model.logits

    def spy(norm_OH: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
        parts.add(part)
        found: torch.Tensor = real(norm_OH, part)
        return found

    model.logits = spy
    first = outcome(engine.generate(greedy))
    others = outcome(engine.generate([*greedy[:6], *mixed()[6:]]))
    few, engine.runner.static.most_shared = set(parts), 0
    engine.graphs.close()
    assert outcome(engine.generate([*greedy[:6], *mixed()[6:]])) == others  # of many rows each has all logits
    assert parts == few | {None}
    return [first, others], few


def test_ranks_share_the_vocabulary_and_choose_the_same(checkpoint: str) -> None:
    """Each projects to its chunks; logits are exchanged where rows are not greedy; the tokens are those of one rank."""
    ((one, parts),) = run_ranks(run_greedy, 1, checkpoint, 64)
    assert parts == {None}
    found = run_ranks(run_greedy, 3, checkpoint, 64)
    assert [parts for _, parts in found] == [{(0, 64)}, {(64, 192)}, {(192, 320)}]
    assert all(results == one for results, _ in found)


def test_graphs_are_taken_where_they_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    cuda, cpu = Ranks(0, 1, 0, 1, torch.device("cuda", 0)), rank_on("cpu")
    assert resolve_graphs("auto", cuda, ()) and resolve_graphs("true", cuda, ())
    assert not resolve_graphs("false", cuda, ()) and not resolve_graphs("false", cpu, ())
    assert not resolve_graphs("auto", cpu, ())
    assert not resolve_graphs("auto", cuda, ["experts=reference"])
    assert capsys.readouterr().err.splitlines() == [
        "epmoe: graphs=true (auto)",
        "epmoe: graphs=false (auto: experts=reference)",
    ]
    with pytest.raises(UserError, match=r"runtime\.graphs=true is not possible with router=reference"):
        resolve_graphs("true", cuda, ["router=reference"])
    with pytest.raises(UserError, match=r"with runtime\.device=cpu"):
        resolve_graphs("true", cpu, ())
    with switched(torch_only={"attention", "norm"}):  # a norm waits for nothing
        assert not resolve_graphs("auto", cuda, ())
    assert capsys.readouterr().err == "epmoe: graphs=false (auto: attention's torch version)\n"


# On GPUs


def outcome(results: Sequence[Result]) -> list[Any]:
    return [(each.ids, each.finish_reason, each.logprobs) for each in results]


@pytest.mark.gpu
def test_graphs_change_no_token(checkpoint: str) -> None:
    """Nor a log-probability's last bit: both run the same kernels on the same shapes. Twice, for what is left over."""
    asked = mixed()
    eager = build(rank_on("cuda"), checkpoint, asked)
    expected = outcome(eager.generate(asked, stop_at({})))
    assert {reason for _, reason, _ in expected} == {"eos", "stop", "length"}
    graphs = build(rank_on("cuda"), checkpoint, asked, graphs=True)
    for _ in range(2):
        assert outcome(graphs.generate(asked, stop_at({}))) == expected
    assert graphs.graphs.graphs and not eager.graphs.graphs
    graphs.graphs.close()  # as at the end of a group; the next run captures anew
    assert outcome(graphs.generate(asked, stop_at({}))) == expected


def crowd() -> list[Request]:
    """More prompts than the 64 for which attention's vectors suffice, and tokens for every tile of the experts."""
    lengths = [1, 2, 3, 17, 33, *range(1, 12)] * 10 + [299, 300, 7]
    return [Request(tuple(range(1, count + 1)), SamplingParams(max_new_tokens=5)) for count in lengths]


def large() -> list[Request]:
    """Steps that run as halves (models/decoder.py, Limits), and some just below."""
    lengths = [6001, 4096, 4000, 30, 9000, 4095, 1, 2, 2047, 5000, 17]
    return [Request(tuple(7 * i % 300 for i in range(n)), SamplingParams(max_new_tokens=3)) for n in lengths]


COMPILES = {
    "large": (large, {"max_batch": 4, "prefill_chunk": 8192}),
    "few": (mixed, {}),
    "many": (crowd, {"max_batch": 100, "prefill_chunk": 512}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("case", COMPILES)
def test_nothing_compiles_and_nothing_is_captured_after_prepare(
    checkpoint: str, case: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts kernels that Triton compiles or loads from its cache; another prompt length, batch or end brings none."""
    import triton

    compiled, captured = list[str](), list[str]()
    forget(0)  # what tests before this one have compiled
    begin = torch.cuda.CUDAGraph.capture_begin

    def count(*args: Any, **keys: Any) -> None:
        captured.append(str(keys))
        begin(*args, **keys)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", count)
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *args, **keys: compiled.append(str(keys)))
    make, limits = COMPILES[case]
    asked = make()
    engine = build(rank_on("cuda"), checkpoint, asked, graphs=graphs, **limits)
    engine.prepare(Workload.of(asked, engine.max_batch))
    assert bool(captured) == graphs
    compiled.clear()
    captured.clear()
    engine.generate(asked, stop_at({}))
    by_length = sorted(asked, key=lambda request: len(request.ids))
    for some in (asked[::-1], by_length, asked[3:9], asked[:1], asked[-2:], asked[5::7], asked[::2]):
        engine.generate(some)
    assert not compiled and not captured


@pytest.mark.gpu
def test_a_launch_waits_for_nothing(checkpoint: str) -> None:
    """The host may not wait for the device between two steps, with another batch or a new request neither."""
    asked = mixed()
    engine = build(rank_on("cuda"), checkpoint, asked, graphs=True)
    engine.prepare(Workload.of(asked, engine.max_batch))
    with torch.inference_mode():
        handles = [engine.cache.admit(30) for _ in range(3)]
        for handle, request in zip(handles, asked, strict=False):
            engine.runner.state.admit(handle, request.ids, request.params)
        # No prefill says where these sequences are: they would go on where those of prepare left their handles.
        engine.runner.state.sequences.token_S.zero_()
        engine.runner.state.sequences.position_S.zero_()
        graphs, variants = engine.graphs, sorted({kind.variant for kind in engine.graphs.ready if kind.variant})
        row, *prompts = (  # a sequence's second token, a piece of a prompt, a whole one
            sequence.Sequence(n, Request((3,) * (1, 9, 5)[n], SamplingParams()), 30, 0.0, handles[n]) for n in range(3)
        )
        ragged = Ragged.of([row], [(prompts[0], 8), (prompts[1], 5)])
        assert any(kind.part == "mixed" and kind.size >= 14 for kind in graphs.ready)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for each in asked:
                engine.runner.state.admit(handles[2], each.ids, each.params)
            plain = [(v, n) for v in variants for n in (3, 2, 1) if not v.adjusted]
            arrivals = [Arrival([graphs.decode(handles[:n], v)]) for v, n in plain]
            for v in variants:
                graphs.rows(handles)
                arrivals.append(Arrival([graphs.head(3, v)]))
                graphs.ragged(ragged)
                arrivals.append(Arrival([graphs.head(2, v)]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(int(arrival.wait(10)[0].max()) < engine.vocab for arrival in arrivals)


def run(mine: Ranks, checkpoint: str, graphs: bool) -> list[Any]:
    asked = mixed()
    return outcome(build(mine, checkpoint, asked, graphs=graphs).generate(asked, stop_at({})))


@pytest.mark.multigpu
def test_graphs_on_two_gpus_give_the_bits_of_one(checkpoint: str) -> None:
    """Ids and log-probabilities; the group also ends, which it would not while a graph holds its collectives."""
    (one,) = run_ranks(run, 1, checkpoint, True, timeout=240, device="cuda")
    for graphs in (True, False):
        found = run_ranks(run, 2, checkpoint, graphs, timeout=240, device="cuda")
        assert found[0] == found[1] == one


def run_by_the_group(mine: Ranks, checkpoint: str, combine: str, graphs: bool) -> list[Any]:
    """As `run`, where ranks have no symmetric memory."""
    symmetric.possible = lambda device: False
    asked = mixed()
    return outcome(build(mine, checkpoint, asked, graphs=graphs, combine=combine).generate(asked, stop_at({})))


@pytest.mark.multigpu
def test_graphs_hold_the_process_groups_collectives(checkpoint: str) -> None:
    """Kernels that come in early stand behind NCCL's then (epmoe/kernels/gpu.py): slots give the bits of one GPU."""
    (one,) = run_ranks(run, 1, checkpoint, True, timeout=240, device="cuda")
    assert run_ranks(run_by_the_group, 2, checkpoint, "slots", True, timeout=240, device="cuda") == [one, one]
    found = [
        run_ranks(run_by_the_group, 2, checkpoint, "all_reduce", graphs, timeout=240, device="cuda")
        for graphs in (True, False)
    ]
    assert found[0][0] == found[0][1] == found[1][0] == found[1][1]


def run_large(mine: Ranks, checkpoint: str) -> list[Any]:
    """Prompts that are fed in halves, then graphs, then both again: the two ways of combining take turns."""
    rng, params = random.Random(5), SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=1)
    asked = [Request(tuple(rng.randrange(300) for _ in range(n)), params) for n in (5000, 1, 700, 4200)]
    engine = build(mine, checkpoint, asked, graphs=True, prefill_chunk=0)
    assert engine.prefill_chunk > Limits().halves_from
    return [outcome(engine.generate(asked)) for _ in range(3)]


@pytest.mark.multigpu
def test_halves_and_graphs_take_turns_with_the_bits_of_one_gpu(checkpoint: str) -> None:
    (one,) = run_ranks(run_large, 1, checkpoint, timeout=240, device="cuda")
    assert one[0] == one[1] == one[2]
    assert run_ranks(run_large, 2, checkpoint, timeout=240, device="cuda") == [one, one]


def generate(*keys: str) -> None:
    from epmoe.generate import generate as body

    sys.argv[1:] = list(keys)
    body()


@pytest.mark.multigpu
def test_gpus_share_the_vocabulary_and_choose_the_same(checkpoint: str) -> None:
    ((one, _),) = run_ranks(run_greedy, 1, checkpoint, 64, timeout=240, device="cuda")
    found = run_ranks(run_greedy, 2, checkpoint, 64, timeout=240, device="cuda")
    assert [parts for _, parts in found] == [{(0, 128)}, {(128, 320)}]
    assert all(results == one for results, _ in found)


@pytest.mark.multigpu
@pytest.mark.parametrize("number", [SIGKILL, SIGSTOP])
def test_lost_rank_is_named_while_graphs_run(number: Signals, tmp_path: Path) -> None:
    """The collectives in a graph wait for ever; the watch ends the other rank within the bound."""
    place = make_checkpoint(tmp_path / "long", max_position=65536)
    keys = [f"checkpoint={place}", "prompt=x", "max_new_tokens=60000", "sampling.ignore_eos=true"]
    keys += ["runtime.device=cuda", "runtime.graphs=true", "runtime.timeout_s=20"]
    with commands(generate, 2, *keys, folder=tmp_path, env={"PYTHONUNBUFFERED": "1"}) as started:
        deadline = time.monotonic() + 120
        while len(started[0].stdout) < 20:
            assert time.monotonic() < deadline and started[0].process.is_alive(), started[0].stderr
            time.sleep(0.05)
        assert "kinds of step captured" in started[0].stderr
        begin = time.monotonic()
        started[1].signal(number)
        assert started[0].wait(25) == 1
        assert time.monotonic() - begin < (10 if number == SIGKILL else 20)
        assert any(line.startswith("epmoe: rank 1 ") for line in started[0].stderr.splitlines())


@pytest.mark.gpu
def test_the_command_gives_the_same_text_with_and_without_graphs(checkpoint: str, tmp_path: Path) -> None:
    texts = []
    for graphs in ("true", "false"):
        output = tmp_path / f"{graphs}.jsonl"
        keys = [f"checkpoint={checkpoint}", "prompt=some text", f"output={output}", f"runtime.graphs={graphs}"]
        with commands(generate, 1, *keys, "max_new_tokens=20", folder=tmp_path) as started:
            assert started[0].wait(120) == 0, started[0].stderr
            texts.append(started[0].stdout)
        assert os.path.getsize(output)
    assert texts[0] == texts[1]
