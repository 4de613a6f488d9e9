"""Attention's kernels on a GPU: every case, gpt-oss's real shapes, bits, graphs."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from attention_cases import (
    CASES,
    SHARED,
    Case,
    Drafts,
    Inputs,
    compare,
    compare_parts,
    decode_step,
    new_cache,
    random_inputs,
    random_sinks,
)
from steps import make_step

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.kernels.attention import launch as attention_triton
from epmoe.kernels.capture import Capture
from epmoe.layers.attention import cached_attention

pytestmark = pytest.mark.gpu

# Largest and typical errors. bfloat16 rounds keys, weights and outputs to 8 bits, here around 1 to 4.
TOLERANCE = {torch.float32: (1e-4, 2e-5), torch.bfloat16: (0.03, 0.03)}


def real(window: int | None, tokens: int = 1 << 19) -> Case:
    return Case("gpt-oss", window, (), heads=64, kv_heads=8, head_dim=64, page=16, tokens=tokens)


windows = pytest.mark.parametrize("window", [None, 128])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, dtype: torch.dtype) -> None:
    """Pages, windows, ragged lengths, splits, sinks, groups, spare rows: outputs and caches as the reference's."""
    compare(case, "cuda", dtype, *TOLERANCE[dtype])


STEPS = (((0, 700), (1, 130), (2, 1)), 3, ((2, 300), (0, 1), (1, 64)), 3, Drafts(((0, 4), (2, 9))), 3)
MANY = Case("gpt-oss", None, STEPS, heads=64, kv_heads=8, head_dim=64, page=16, tokens=4096)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_ranks_heads_have_the_bits_of_all(dtype: torch.dtype) -> None:
    """mesh.attention=tensor, also with some of a key/value head's queries on each rank."""
    for case in (each for each in CASES if each.name in SHARED):
        compare_parts(case, SHARED[case.name], "cuda", dtype, fast=True)
    for ranks in (2, 4, 8, 16) if dtype == torch.bfloat16 else (2, 16):  # a case compiles for seconds
        for window in (None, 128):
            compare_parts(replace(MANY, window=window), ranks, "cuda", dtype, fast=True)


def full_cache(case: Case, lengths: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> tuple[Cache, list[int]]:
    """A cache of random keys and values, and the handles of sequences with room for those positions."""
    store = new_cache(case, dtype, "cuda", sequences=len(lengths))
    generator = torch.Generator("cuda").manual_seed(0)
    for stored in store.layers:
        stored.normal_(generator=generator)
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)  # pages of different sequences lie among each other
    handles = {index: store.admit(lengths[index]) for index in order}
    return store, [handles[index] for index in range(len(lengths))]


def pick(inputs: Inputs, rows: slice | list[int]) -> Inputs:
    (q, k, v), (cos, sin) = inputs
    return (q[rows], k[rows], v[rows]), (cos[rows].contiguous(), sin[rows].contiguous())


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


LENGTHS = {
    "one, 1": [1],
    "one, 128": [128],
    "one, 8192": [8192],
    "16 ragged": [1 + 509 * i for i in range(16)],
    "64 of 128": [128] * 64,
    "64 ragged": [1 + (i * 2579) % 8192 for i in range(64)],
}


@windows
@pytest.mark.parametrize("name", LENGTHS)
def test_real_decode(name: str, window: int | None) -> None:
    """gpt-oss's heads in bfloat16 against the reference; both round their weights and outputs to 8 bits."""
    lengths, case = LENGTHS[name], real(window)
    store, handles = full_cache(case, lengths)
    step = decode_step(store, [(handle, length - 1) for handle, length in zip(handles, lengths, strict=True)], spares=1)
    inputs, sink_E = (
        random_inputs(case, len(lengths) + 1, torch.bfloat16, "cuda", 0),
        random_sinks(case, torch.bfloat16, "cuda"),
    )
    plan = store.plan(step)[window]
    got = attention_triton.cached_attention(*inputs, store.layer(0), plan, sink_E)[:-1]
    wanted = cached_attention(*inputs, store.layer(0), plan, sink_E)[:-1]
    assert relative(got, wanted) < 0.01
    # each row by itself: a wrong row among many is seen
    assert max(relative(a, b) for a, b in zip(got, wanted, strict=True)) < 0.03


@windows
@pytest.mark.parametrize(("new", "cached"), [(2048, 0), (777, 5000), (2048, 6144), (16, 1)])
def test_real_prefill(new: int, cached: int, window: int | None) -> None:
    """A chunk of a long prompt beside a short one and a decoding sequence."""
    case = real(window)
    store, handles = full_cache(case, [new + cached, 50, 3000])
    chunks = [(handles[2], [0], 2999), (handles[0], [0] * new, cached), (handles[1], [0] * 50, 0)]
    plan = store.plan(make_step(chunks, device="cuda"))[window]
    inputs, sink_E = (
        random_inputs(case, new + 51, torch.bfloat16, "cuda", 0),
        random_sinks(case, torch.bfloat16, "cuda"),
    )
    key_JRD, value_JRD = store.layer(0)
    reference = key_JRD.clone(), value_JRD.clone()
    got = attention_triton.cached_attention(*inputs, store.layer(0), plan, sink_E)
    wanted = cached_attention(*inputs, reference, plan, sink_E)
    assert relative(got, wanted) < 0.01
    assert max(relative(a, b) for a, b in zip(got, wanted, strict=True)) < 0.03
    for mine, theirs in zip(store.layer(0), reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.01, atol=0.01)


@windows
def test_bits_of_a_decode_do_not_depend_on_the_batch(window: int | None) -> None:
    """A row alone, among 64, in another place, beside spare rows has the same bits; so has a prompt's single token."""
    lengths, case = LENGTHS["64 ragged"], real(window)
    store, handles = full_cache(case, [*lengths, 100])
    inputs, sink_E = random_inputs(case, 64, torch.bfloat16, "cuda", 0), random_sinks(case, torch.bfloat16, "cuda")
    rows = [(handle, length - 1) for handle, length in zip(handles, lengths, strict=False)]

    def run(index: list[int], spares: int = 0) -> torch.Tensor:
        plan = store.plan(decode_step(store, [rows[i] for i in index], spares))[window]
        chosen = pick(inputs, index + [0] * spares)
        return attention_triton.cached_attention(*chosen, store.layer(0), plan, sink_E)[: len(index)]

    whole = run(list(range(64)))
    assert whole.isfinite().all() and whole.any(-1).all()
    backwards = list(range(64))[::-1]
    assert torch.equal(run(backwards), whole[backwards])
    for index in ([0], [63], [5, 40, 41], list(range(17)), list(range(64))):
        assert torch.equal(run(index), whole[index])
        assert torch.equal(run(index, spares=7), whole[index])
    chunks = [(handles[64], [0] * 60, 0), (rows[9][0], [0], rows[9][1])]
    mixed = pick(inputs, [*range(60), 9])
    plan = store.plan(make_step(chunks, device="cuda"))[window]
    beside_TED = attention_triton.cached_attention(*mixed, store.layer(0), plan, sink_E)
    plan = store.plan(make_step(chunks[1:], device="cuda"))[window]
    alone_TED = attention_triton.cached_attention(*pick(inputs, [9]), store.layer(0), plan, sink_E)
    assert torch.equal(beside_TED[60], alone_TED[0])
    assert torch.equal(alone_TED[0], whole[9])  # a decode's


@windows
def test_bits_of_a_prefill_do_not_depend_on_its_chunks(window: int | None) -> None:
    """A prompt at once, in chunks of any size, and beside other prompts has the same bits; so has its cache."""
    case, length = real(window, tokens=1 << 14), 1500
    inputs, sink_E = random_inputs(case, length, torch.bfloat16, "cuda", 0), random_sinks(case, torch.bfloat16, "cuda")

    def run(cuts: list[int], beside: int) -> tuple[torch.Tensor, torch.Tensor]:
        store, (handle, other) = full_cache(case, [length, 2000])
        out, neighbour = [], 0
        for begin, end in pairwise(cuts):
            chunks = [(other, [0] * beside, neighbour)] if beside else []
            plan = store.plan(make_step([*chunks, (handle, [0] * (end - begin), begin)], device="cuda"))[window]
            rows = [*range(beside), *range(begin, end)]
            out.append(attention_triton.cached_attention(*pick(inputs, rows), store.layer(0), plan, sink_E)[beside:])
            neighbour += beside
        (pool,) = store.pools.values()
        position_1C = torch.arange(length - (window or length), length, device="cuda")[None]
        row_C = pool.row(torch.full((1, 1), handle, device="cuda"), position_1C)[0]
        return torch.cat(out), store.layers[0][:, :, row_C]

    whole = run([0, length], 0)
    assert whole[0].isfinite().all()
    for cuts, beside in (
        ([0, length], 77),
        ([0, 1, 2, 64, 65, 300, 1000, length], 0),
        ([*range(0, 1500, 100), length], 33),
    ):
        for got, wanted in zip(run(cuts, beside), whole, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 128, 100, 300])
def test_a_decode_has_the_bits_of_a_prefill(window: int | None, dtype: torch.dtype) -> None:
    """Each position of a prompt, decoded one after the other, beyond several splits; what is cached is the same too."""
    case, length = real(window, tokens=1 << 13), 1100
    inputs, sink_E = random_inputs(case, length, dtype, "cuda", 0), random_sinks(case, dtype, "cuda")

    def run(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        store, (handle, _) = full_cache(case, [length, 2000], dtype)
        done, out = 0, []
        for size in sizes:
            step = decode_step(store, [(handle, done)])
            if size > 1:
                step = make_step([(handle, [0] * size, done)], device="cuda")
            rows = pick(inputs, slice(done, done + size))
            out.append(attention_triton.cached_attention(*rows, store.layer(0), store.plan(step)[window], sink_E))
            done += size
        (pool,) = store.pools.values()
        position_1C = torch.arange(length - (window or length), length, device="cuda")[None]
        row_C = pool.row(torch.full((1, 1), handle, device="cuda"), position_1C)[0]
        return torch.cat(out), store.layers[0][:, :, row_C]

    for got, wanted in zip(run([1] * length), run([length]), strict=True):
        assert wanted.isfinite().all() and torch.equal(got, wanted)
    for got, wanted in zip(run([300, 1, 1, 200, 1, 90, *[1] * (length - 593)]), run([length]), strict=True):
        assert torch.equal(got, wanted)


@windows
def test_a_captured_decode_follows_its_inputs(window: int | None) -> None:
    """No launch waits for the device, and a replay takes new positions, sequences and pages."""
    lengths, case = [300, 4000, 1, 700], real(window)
    store, handles = full_cache(case, [8192] * 4)
    inputs, sink_E = random_inputs(case, 4, torch.bfloat16, "cuda", 0), random_sinks(case, torch.bfloat16, "cuda")
    step = decode_step(store, list(zip(handles, lengths, strict=True)))

    def run() -> torch.Tensor:
        return attention_triton.cached_attention(*inputs, store.layer(0), store.plan(step)[window], sink_E)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for change in range(3):  # up to position 8000 of the 8192 that each sequence has
        step.position_T.copy_(torch.tensor(lengths[change:] + lengths[:change]) + 2000 * change)
        step.sequence_B.copy_(step.sequence_B.roll(1))
        inputs[0][0].copy_(inputs[0][0].roll(1, 0))
        graph.replay()
        assert torch.equal(captured, run())


@windows
def test_one_kernel_for_all_prefills(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of spans and tokens: the engine could not warm up a kernel for each."""
    import triton

    case, compiled = real(window, tokens=1 << 14), list[str]()
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *args, **keys: compiled.append(str(keys)))
    sink_E = random_sinks(case, torch.bfloat16, "cuda")
    store, handles = full_cache(case, [200] * 70)
    for count, tokens in ((1, 16), (1, 33), (2, 100), (32, 2), (33, 5), (70, 3), (64, 16)):
        plan = store.plan(make_step([(handle, [0] * tokens, 0) for handle in handles[:count]], device="cuda"))[window]
        inputs = random_inputs(case, count * tokens, torch.bfloat16, "cuda", 0)
        out = attention_triton.cached_attention(*inputs, store.layer(0), plan, sink_E)
        assert out.isfinite().all()
        if (count, tokens) == (1, 16):
            compiled.clear()
    assert not compiled


def test_far_rows() -> None:
    """Rows beyond 2^31 elements of a cache: offsets are 64 bits wide."""
    case = real(None, tokens=5 << 20)
    store = Cache(CacheConfig([None], 8, 64, tokens=case.tokens, sequences=2, dtype=torch.bfloat16), "cuda")
    assert store.layers[0][0].numel() > 2**31
    store.admit(case.tokens - 4096)
    handle = store.admit(4096)
    inputs, sink_E = random_inputs(case, 700, torch.bfloat16, "cuda", 0), random_sinks(case, torch.bfloat16, "cuda")
    for chunk, cached in ((700, 0), (1, 700)):
        plan = store.plan(make_step([(handle, [0] * chunk, cached)], device="cuda"))[None]
        some = pick(inputs, slice(0, chunk))
        got = attention_triton.cached_attention(*some, store.layer(0), plan, sink_E)
        assert relative(got, cached_attention(*some, store.layer(0), plan, sink_E)) < 0.01


@windows
def test_rows_and_spans_attend_at_the_same_time(window: int | None) -> None:
    """As branches of a graph, layer after layer: the bits, and the cache, that they have one after the other."""
    case, lengths, spans = real(window), [300, 5000, 1, 700, 2000, 4097], ((650, 200), (2800, 90))
    store, handles = full_cache(case, [8192] * (len(lengths) + len(spans)))
    positions, known = [length - 1 for length in lengths], []
    for handle, (cached, count) in zip(handles[len(lengths) :], spans, strict=True):
        known.append((len(positions), len(positions) + count, cached, handle))
        positions += range(cached, cached + count)
    position_T = torch.tensor(positions, device="cuda")
    sequence_B = torch.tensor(handles[: len(lengths)], device="cuda")
    span_P4 = torch.tensor([*known, (0, 0, 0, 0)], dtype=torch.int32, device="cuda")
    step = Step(torch.zeros_like(position_T), position_T, sequence_B, spans=None, span_P4=span_P4, output_O=position_T)
    inputs = random_inputs(case, len(positions), torch.bfloat16, "cuda", 0)
    sink_E = random_sinks(case, torch.bfloat16, "cuda")

    def run(layers: int) -> list[torch.Tensor]:
        plan = store.plan(step)[window]  # a step's: the first layer finds the runs of its spans
        return [attention_triton.cached_attention(*inputs, store.layer(0), plan, sink_E) for _ in range(layers)]

    wanted, stored = run(1)[0], [each.clone() for each in store.layers]
    assert wanted.isfinite().all()
    found: list[torch.Tensor] = []
    graph = Capture(torch.device("cuda", 0))(lambda: found.extend(run(4)))
    for _ in range(50):
        for each in found[-4:]:
            each.zero_()
        graph.replay()
        assert all(torch.equal(each, wanted) for each in found[-4:])
    assert all(torch.equal(got, each) for got, each in zip(store.layers, stored, strict=True))
