"""A step over buffers that stay where they are: filled up, it is the step of exactly its tokens, bit for bit."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from interpret import interpreted
from loading import load_rank, rank_of

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.cache.pages import extend
from epmoe.engine.ragged import Ragged
from epmoe.engine.request import Level, Request, SamplingParams, Variant
from epmoe.engine.sequence import Sequence
from epmoe.engine.state import State
from epmoe.engine.step import Sizes, StaticStep, vocabulary_part
from epmoe.layers.twin import switched

GREEDY = Variant(Level.GREEDY, True)


def prompt(number: int, length: int) -> tuple[int, ...]:
    return tuple((7 * number + 3 * index) % 90 for index in range(length))


class Served:
    """Some sequences and the step over them."""

    def __init__(self, path: Path, device: str, names: dict[str, Any], lengths: list[int]) -> None:
        model, _ = load_rank(path, 0, 1, device=device, progress=False, **names)
        self.model, config = model, model.config
        shape = (config.windows, config.kv_heads, config.head_dim)
        dtype = model.embedding.weight.dtype
        self.cache = Cache(CacheConfig(*shape, tokens=1200, sequences=7, page=4, dtype=dtype), device)
        self.static = StaticStep(
            model, self.cache, State(self.cache, config.vocab, rank_of(0, 1, device)), Sizes(7, 64)
        )
        self.static.keep_logits()
        self.keys: list[bytes] = []
        prompts = [prompt(*each) for each in enumerate(lengths)]
        prompts.append((*prompts[SHARED][:20], *range(30, 43)))
        extend(self.keys, lambda begin, end: prompts[SHARED][begin:end], 4, 5)
        requests = [Request(each, SamplingParams()) for each in prompts]
        self.sequences = [
            Sequence(number, each, 400, 0.0, self.cache.pages.admit()[0]) for number, each in enumerate(requests)
        ]

    def grow(self, sequence: Sequence, count: int) -> None:
        """Pages for its next tokens. What begins like another one finds what that has computed."""
        if not sequence.computed and sequence is self.sequences[-1]:
            self.cache.pages.release(sequence.handle)
            sequence.handle, sequence.cached = self.cache.pages.admit(self.keys)
            assert sequence.cached == len(self.keys) * 4
        assert self.cache.pages.grow(sequence.handle, sequence.computed, sequence.computed + count) == count

    def step(self, rows: list[int], work: list[tuple[int, int]], tokens: int | None, alone: bool) -> torch.Tensor:
        """Logits of the outputs; filled up to `tokens`, or as the host knows it (None). `alone`: prompts as such."""
        for at, n in [*((row, 1) for row in rows), *work]:
            self.grow(self.sequences[at], n)
        ragged = Ragged.of([self.sequences[row] for row in rows], [(self.sequences[at], n) for at, n in work])
        count = len(ragged.outputs)
        if tokens is None:
            self.cache.write()
            self.static.order_step(ragged)
            self.static.run(ragged)
        else:
            mixed = bool(rows) or not alone
            room = self.static.changes(tokens, self.static.most(tokens, rows=mixed))
            self.static.order_step(ragged, self.cache.write(leave=room))
            self.static.body(tokens, rows=mixed)
            count = min(count + 2, 7)
        self.static.head(count, GREEDY)
        for at, n in work:
            self.sequences[at].cached += n
        for sequence in ragged.ended:
            sequence.launched += 1
        shared = self.sequences[SHARED]
        self.cache.pages.learn(shared.handle, self.keys, min(shared.cached // 4, len(self.keys)))
        assert self.static.logits_MV is not None
        return self.static.logits_MV[: len(ragged.outputs)].cpu().clone()


# (sequences that decode, pieces of prompts, tokens when filled up)
Steps = list[tuple[list[int], list[tuple[int, int]], int]]
STEPS: Steps = [
    ([], [(0, 5), (1, 9), (2, 1)], 32),  # all of a prompt, part of one, a token of one
    ([0], [(1, 1), (3, 20)], 64),
    ([0, 1], [(2, 30)], 64),
    ([1, 0], [(2, 3), (3, 1), (4, 40)], 64),
    ([0, 1, 2, 3, 4], [(5, 11)], 16),
    ([4, 1], [(6, 13)], 16),  # the 20 before these are those of another one, which still runs
]
FEW: Steps = [STEPS[0], ([0], [(1, 1), (3, 20)], 32)]  # as the interpreter is slow
LENGTHS = [5, 10, 34, 21, 40, 11]
SHARED = 4  # whose first tokens the last sequence has, too


def compare(path: Path, device: str, names: dict[str, Any], steps: Steps = STEPS) -> None:
    exact, filled, mixed = (Served(path, device, names, LENGTHS) for _ in range(3))
    with torch.inference_mode():
        for rows, work, tokens in steps:
            wanted_OV = exact.step(rows, work, None, True)
            assert len(wanted_OV) and wanted_OV.isfinite().all()
            for way, alone in ((filled, True), (mixed, False)):
                assert torch.equal(way.step(rows, work, tokens, alone), wanted_OV)
        for way in (filled, mixed):
            assert torch.equal(way.static.state.sequences.token_S, exact.static.state.sequences.token_S)


def test_filled_up_it_is_the_step(tiny_checkpoint: Path) -> None:
    compare(tiny_checkpoint, "cpu", {"dtype": "float32"})


def test_filled_up_it_is_the_step_in_the_interpreter(tiny_checkpoint: Path) -> None:
    interpreted(interpreted_compare, tiny_checkpoint)


def interpreted_compare(path: Path) -> None:
    with switched(interpreted=True):
        compare(path, "cpu", {"dtype": "float32", "experts": "triton", "router": "triton"}, FEW)


@pytest.mark.gpu
def test_filled_up_it_is_the_step_on_a_gpu(tiny_checkpoint: Path) -> None:
    compare(tiny_checkpoint, "cuda", {})


@pytest.mark.parametrize("size", [1, 2, 3, 5, 13, 14])
def test_parts_of_the_vocabulary(size: int) -> None:
    """They are whole chunks, join without a gap, and differ by a chunk at most; never empty."""
    parts = [vocabulary_part(201_088, 16384, rank, size) for rank in range(size)]
    if size in (1, 14):
        assert parts == [None] * size
        return
    edges = [0, *(part[1] for part in parts if part)]
    assert [part[0] for part in parts if part] == edges[:-1] and edges[-1] == 201_088
    assert all(edge % 16384 == 0 for edge in edges[:-1])
    counts = [-(-(b - a) // 16384) for a, b in pairwise(edges)]
    assert min(counts) >= 1 and max(counts) - min(counts) <= 1


def test_room_for_prompts(tiny_checkpoint: Path) -> None:
    """A quarter of the tokens, at least eight; all beside rows and in the largest; never more than there can be."""
    model, _ = load_rank(tiny_checkpoint, 0, 1, progress=False)
    config = model.config
    cache = Cache(CacheConfig(config.windows, config.kv_heads, config.head_dim, tokens=400, sequences=100), "cpu")
    static = StaticStep(model, cache, State(cache, config.vocab, rank_of(0, 1)), Sizes(100, 512))
    sizes = (4, 16, 64, 256, 500, 512)
    assert [static.most(size, rows=False) for size in sizes] == [4, 8, 16, 64, 100, 100]
    assert [static.most(size, rows=True) for size in sizes] == [4, 16, 64, 100, 100, 100]
