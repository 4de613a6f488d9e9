"""A large step in two halves: cut where nothing changes for attention, the same bits on any number of ranks, and the
rows of one half on their way while the other computes.

The limit from which steps are halved is brought down to a few tokens, so that prompts of some dozen tokens are cut.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitwise_run import Run, run
from hypothesis import given, settings
from hypothesis import strategies as st
from spawn import run_ranks
from steps import make_step

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.layers.attention import Attention
from epmoe.layers.owed import Owed
from epmoe.models.decoder import Decoder, Limits
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES, Choices
from epmoe.weights.load import load
from epmoe.weights.synthetic import make_checkpoint

FEW = 6  # tokens from which steps are halved here


def spans_of(step: Step) -> list[tuple[int, list[int], list[int], int]]:
    """(sequence, tokens, positions, cached) of each sequence."""
    assert step.spans is not None
    return [
        (sequence, step.token_T[begin:end].tolist(), step.position_T[begin:end].tolist(), cached)
        for begin, end, cached, sequence in step.spans
    ]


@given(counts=st.lists(st.integers(1, 90), min_size=1, max_size=12), seed=st.integers(0, 99), least=st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_halves_are_the_step(counts: list[int], seed: int, least: int) -> None:
    """Every token once and in its place; about half each; small steps stay."""
    rng = random.Random(seed)
    cached = [rng.randrange(50) for _ in counts]
    ids = [[rng.randrange(1000) for _ in range(count)] for count in counts]
    step = make_step([(10 + i, ids[i], cached[i]) for i in range(len(counts))])
    halves = step.halves(least)
    tokens = sum(counts)
    if tokens < least:
        assert halves == (step,)
        return
    assert len(halves) == 2 or tokens <= 3
    joined: dict[int, tuple[list[int], int]] = {}
    for half in halves:
        for sequence, token, position, before in spans_of(half):
            assert position == list(range(before, before + len(token)))
            joined.setdefault(sequence, ([], before))[0].extend(token)
        assert half.token_T.data_ptr() % 16 == 0
    begin = 0
    for half in halves:  # each half wants as many rows as the step, and its own are right
        end = begin + len(half.token_T)
        assert half.output_O is not None and step.output_O is not None
        wanted = [(row, of - begin) for row, of in zip(half.output_O.tolist(), step.output_O.tolist(), strict=True)]
        assert all(0 <= row < end - begin and (row == of or not 0 <= of < end - begin) for row, of in wanted)
        begin = end
    assert joined == {10 + i: (ids[i], cached[i]) for i in range(len(counts))}
    if len(halves) == 2:
        assert abs(len(halves[0].token_T) - tokens / 2) <= 65


@pytest.mark.parametrize("tokens", [4096, 4097, 5000, 8191, 8192])
def test_real_steps_are_cut_at_multiples_of_64(tokens: int) -> None:
    step = make_step([(0, [0] * tokens, 0)])
    first, second = step.halves(4096)
    assert len(first.token_T) % 64 == 0 and 0 <= len(first.token_T) - tokens / 2 < 64
    assert second.spans == ((0, len(second.token_T), len(first.token_T), 0),)
    assert len(first.token_T) + len(second.token_T) == tokens
    assert len(make_step([(0, [0] * 4095, 0)]).halves(4096)) == 1


@pytest.mark.parametrize(("rows", "new"), [(3, 90), (60, 9), (60, 1)])
def test_all_rows_are_in_the_first_half(rows: int, new: int) -> None:
    """Sequences that decode stand before the prompts, and may be most of a step."""
    prompt = make_step([(99, list(range(new)), 4)])
    token_T = torch.cat((torch.arange(500, 500 + rows), prompt.token_T))
    position_T = torch.cat((torch.arange(rows) + 7, prompt.position_T))
    output_O = torch.tensor([*range(rows), rows + new - 1])
    step = Step(token_T, position_T, torch.arange(rows), spans=((rows, rows + new, 4, 99),), output_O=output_O)
    first, second = step.halves(10)
    assert torch.equal(first.sequence_B, step.sequence_B) and not len(second.sequence_B)
    assert torch.equal(torch.cat((first.token_T, second.token_T)), token_T)
    assert torch.equal(torch.cat((first.position_T, second.position_T)), position_T)
    pieces = [(end - begin, cached) for half in (first, second) for begin, end, cached, _ in half.spans or ()]
    assert sum(count for count, _ in pieces) == new and sum(pieces[-1]) == new + 4


# Real ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("halves"), experts=11, top_k=3, layers=3))


def run_halved(mine: Ranks, place: str, options: dict[str, Any], least: int) -> tuple[Run, int]:
    """bitwise_run's requests, in prefills of 16 tokens; and how many steps were halved."""
    halved: list[int] = []
    real = Step.halves

    def halves(step: Step, limit: int) -> tuple[Step, ...]:
        found = real(step, limit)
        halved.append(len(found) - 1)
        return found

    steps: Any = Step
    steps.halves = halves
    return run(mine, place, options, Limits(halves_from=least)), sum(halved)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_halved_steps_give_the_same_bits_on_any_number_of_ranks(checkpoint: str, dtype: str) -> None:
    """Tokens and all logits, of prompts that are cut within and between sequences, with a window and without.

    One rank has nothing to wait for: its steps go whole.
    """
    options = {"combine": "slots", "dtype": dtype}
    (((ids, logits), halved),) = run_ranks(run_halved, 1, checkpoint, options, FEW)
    assert not halved and logits.isfinite().all()
    for size in (2, 4):
        for (found_ids, found_logits), count in run_ranks(run_halved, size, checkpoint, options, FEW, timeout=120):
            assert count > 5 and found_ids == ids
            assert torch.equal(found_logits, logits)


def test_halving_changes_no_bit(checkpoint: str) -> None:
    """On the same ranks, where sums over them depend on their number too."""
    (whole, none), _ = run_ranks(run_halved, 2, checkpoint, {"combine": "all_reduce"}, 10**6)
    (halved, some), _ = run_ranks(run_halved, 2, checkpoint, {"combine": "all_reduce"}, FEW)
    assert none == 0 and some > 5 and halved[0] == whole[0] and torch.equal(halved[1], whole[1])


def prefill(mine: Ranks, place: str, least: int, spans: list[list[tuple[int, int]]]) -> tuple[torch.Tensor, list[str]]:
    """Logits of steps of (sequence, tokens), the sequences growing; and the order of what happened in the last one."""
    model, report = load(Checkpoint.open(place), mine, Choices(combine="slots"), progress=False)
    assert isinstance(model, Decoder)
    model.limits = replace(model.limits, halves_from=least)
    config, most = model.config, 1 + max(sequence for step in spans for sequence, _ in step)
    lengths, wanted = [0] * most, [0] * most
    for sequence, count in (each for step in spans for each in step):
        wanted[sequence] += count
    shape, size = (config.windows, config.kv_heads, config.head_dim), sum(wanted) + 4 * most
    cache = Cache(CacheConfig(*shape, tokens=size, sequences=most, page=4, dtype=DTYPES[report.dtype]), mine.device)
    handles = [cache.admit(count) for count in wanted]
    log: list[str] = []
    spy(log)
    rng, found = random.Random(3), []
    for step in spans:
        chunks = []
        for sequence, count in step:
            chunks.append((handles[sequence], [rng.randrange(config.vocab) for _ in range(count)], lengths[sequence]))
            lengths[sequence] += count
        log.clear()
        with torch.inference_mode():
            found.append(model(make_step(chunks, every=mine.device.type == "cpu", device=mine.device), cache).cpu())
    return torch.cat(found), log


def spy(log: list[str]) -> None:
    """Write down, in order, each layer's attention, each sending of rows and each waiting for rows under way."""
    attend, send, wait = Attention.attended, dist.all_reduce, Owed.wait

    def attending(*args: Any) -> Any:
        log.append("attend")
        return attend(*args)

    def sending(*args: Any, **keys: Any) -> Any:
        log.append("send" if keys.get("async_op") else "send and wait")
        return send(*args, **keys)

    def waiting(owed: Owed) -> Any:
        if owed.work is not None:
            log.append("wait")
        return wait(owed)

    classes: Any = (Attention, Owed)
    classes[0].attended, classes[1].wait, dist.all_reduce = attending, waiting, sending


SPANS = [[(0, 13), (1, 9)], [(1, 30), (0, 2), (2, 8)], [(0, 5), (2, 21)]]


def test_rows_travel_while_the_other_half_computes(checkpoint: str) -> None:
    """Each half's rows of a layer are waited for only after the other half's attention and experts of that layer."""
    (one, alone), *_ = run_ranks(prefill, 1, checkpoint, FEW, SPANS)
    assert alone == ["attend"] * 3
    for logits, log in run_ranks(prefill, 2, checkpoint, FEW, SPANS):
        assert torch.equal(logits, one)
        turn = ["wait", "attend", "send"]
        assert log == [*turn[1:] * 2, *turn * 4, "wait", "wait"]  # three layers
    for _, log in run_ranks(prefill, 2, checkpoint, 10**6, SPANS):
        assert log == ["attend", "send and wait"] * 3


# On GPUs: real layer shapes, steps as large as they are there.


@pytest.fixture(scope="module")
def real_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("shapes"), "20b", layers=4, vocab=8192, shards=1)


LARGE = [[(0, 4096)], [(0, 1500), (1, 6692)], [(2, 3001), (0, 2), (1, 1120), (3, 1)], [(3, 8192)], [(2, 8191)]] * 3


@pytest.mark.multigpu
@pytest.mark.timeout(900)
def test_large_prefills_have_the_same_bits_on_any_number_of_gpus(real_shapes: Path) -> None:
    """Three times over, with other tokens: rows that were used before they had come would show."""
    ((one, _),) = run_ranks(prefill, 1, str(real_shapes), 4096, LARGE, timeout=240, device="cuda")
    assert one.isfinite().all() and len(one) == 27
    for size in (2, 4):
        if size <= torch.cuda.device_count():
            for logits, log in run_ranks(prefill, size, str(real_shapes), 4096, LARGE, timeout=240, device="cuda"):
                assert torch.equal(logits, one) and log.count("send") == log.count("wait") == 8
