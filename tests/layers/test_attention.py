"""Attention over the paged cache against a dense float64 brute force without pages, windows, chunks or blocks.

Letters: T tokens · H hidden · E query heads · J key/value heads · D head dimension · C positions attended to.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from steps import make_step
from torch.utils._python_dispatch import TorchDispatchMode

from epmoe.batch import Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.cache.plan import QUERIES
from epmoe.layers.attention import Attention, Where, attend
from epmoe.layers.rotary import Rope, Rotary, rotate

HIDDEN = 24
# float32 against float64. Scores reach 30 here, where float32 is off by some 1e-6 after the products; exp turns that
# into a relative error of a weight, and outputs are of size 1 to 10. A wrong position is off by 0.1 and more.
RTOL, ATOL = 1e-5, 5e-5
ROPE = Rope(
    head_dim=8,
    theta=1000.0,
    factor=4.0,
    beta_fast=8.0,
    beta_slow=1.0,
    original_max_position=32,
    truncate=False,
    concentration=1.1,
)


@dataclass(frozen=True)
class Case:
    name: str
    window: int | None
    heads: int = 4
    kv_heads: int = 2
    page: int = 4
    bias: bool = True

    def layer(self) -> Attention:
        torch.manual_seed(0)
        layer = Attention(HIDDEN, self.heads, self.kv_heads, ROPE.head_dim, bias=self.bias, eps=1e-5)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # sharp attention: a wrong position is seen
        return layer.requires_grad_(False)


CASES = [
    Case("full", None),
    Case("full, a page of one", None, page=1),
    Case("full, pages longer than the prompts", None, page=64),
    Case("one head a group", None, heads=3, kv_heads=3),
    Case("all heads in one group", None, heads=6, kv_heads=1),
    Case("no biases", None, bias=False),
    Case("window", 7),
    Case("window of whole pages", 8),
    Case("window of one", 1),
    Case("window shorter than a page", 3, page=16),
    Case("window longer than the prompts", 100),
    Case("window, five heads a group", 5, heads=5, kv_heads=1, page=3),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def brute_force(layer: Attention, x_TH: torch.Tensor, window: int | None) -> torch.Tensor:
    """One whole sequence from position 0, densely, in float64; the rotation as a product of complex numbers."""
    x_TH, tokens = x_TH.double(), len(x_TH)

    def linear(part: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        bias = 0.0 if part.bias is None else part.bias.double()
        return torch.einsum("th,oh->to", x, part.weight.double()) + bias

    half = layer.head_dim // 2
    angle = torch.arange(tokens).double()[:, None] * ROPE.frequency_F().double()
    turn = torch.polar(torch.full_like(angle, ROPE.concentration), angle)[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        number = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
        return torch.cat((number.real, number.imag), dim=-1)

    qkv = linear(layer.qkv, x_TH).view(tokens, -1, layer.head_dim)
    q, k, v = qkv.tensor_split((layer.heads, layer.heads + layer.kv_heads), dim=1)
    q, k = turned(q), turned(k)
    ago = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = (ago < 0) | (ago >= (tokens if window is None else window))
    out = []
    for head in range(layer.heads):
        own = head * layer.kv_heads // layer.heads
        score = (q[:, head] @ k[:, own].T / layer.head_dim**0.5).masked_fill(hidden, -torch.inf)
        sink = layer.sinks[head].double().expand(tokens, 1)
        out.append(torch.cat((score, sink), dim=1).softmax(1)[:, :-1] @ v[:, own])
    return linear(layer.o, torch.cat(out, dim=1))


def new_cache(
    case: Case, dtype: torch.dtype = torch.float32, sequences: int = 5, tokens: int = 320, device: str = "cpu"
) -> Cache:
    """A cache of two layers whose memory holds NaN: what is read before it was written shows."""
    made = Cache(
        CacheConfig(
            [case.window, None],
            case.kv_heads,
            ROPE.head_dim,
            tokens=tokens,
            sequences=sequences,
            page=case.page,
            dtype=dtype,
        ),
        device,
    )
    for stored in made.layers:
        stored.fill_(torch.nan)
    return made


def run(
    layer: Attention, store: Cache, window: int | None, chunks: list[tuple[int, torch.Tensor, int]]
) -> list[torch.Tensor]:
    """One step: each chunk is (handle, the layer's input for its new tokens, positions cached before)."""
    counted = [(handle, [0] * len(x_TH), cached) for handle, x_TH, cached in chunks]
    step = make_step(counted, device=store.device)
    x_TH = torch.cat([x_TH for _, x_TH, _ in chunks])
    y_TH = layer.attended(x_TH, Where(Rotary(ROPE)(step.position_T), store.layer(0), store.plan(step)[window]))
    return list(y_TH.split([len(x_TH) for _, x_TH, _ in chunks]))


def run_all(
    layer: Attention, store: Cache, window: int | None, inputs: list[torch.Tensor], seed: int
) -> list[torch.Tensor]:
    """Sequences of unequal lengths in a random schedule: at each step some of them bring 1 or more tokens."""
    choice = random.Random(seed)
    handles = [store.pages.admit()[0] for _ in inputs]
    done, out = [0] * len(inputs), [x_TH[:0] for x_TH in inputs]
    while any(n < len(x_TH) for n, x_TH in zip(done, inputs, strict=True)):
        counts = [choice.choice((0, 1, 1, 2, 5, 13)) for _ in inputs]
        busy = [i for i, n in enumerate(counts) if n and done[i] < len(inputs[i])]
        choice.shuffle(busy)
        if busy:
            chunks = [(handles[i], inputs[i][done[i] : done[i] + counts[i]], done[i]) for i in busy]
            for handle, x_TH, cached in chunks:
                assert store.grow(handle, cached, cached + len(x_TH)) == len(x_TH)
            for i, y_TH in zip(busy, run(layer, store, window, chunks), strict=True):
                out[i], done[i] = torch.cat((out[i], y_TH)), done[i] + len(y_TH)
    for handle in handles:
        store.release(handle)
    return out


def some_inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, HIDDEN, generator=generator).to(dtype) for length in (37, 1, 20, 5, 64)]


@cases
def test_whole_prompt_equals_brute_force(case: Case) -> None:
    """Protects the numerics: sink in the denominator, unscaled; window with the token itself; grouping; rotation."""
    layer, x_TH = case.layer(), some_inputs()[0]
    store = new_cache(case)
    (y_TH,) = run(layer, store, case.window, [(store.admit(len(x_TH)), x_TH, 0)])
    torch.testing.assert_close(y_TH.double(), brute_force(layer, x_TH, case.window), rtol=RTOL, atol=ATOL)


@cases
def test_ragged_chunked_batches_equal_brute_force(case: Case) -> None:
    """Protects pages, windows and plans: prefill and decode in one step, any chunks, reused handles, no foreign row."""
    layer, store = case.layer(), new_cache(case)
    for seed in range(3):  # rounds share the cache, so the second meets the first one's leftovers
        inputs = some_inputs(seed)
        for x_TH, y_TH in zip(inputs, run_all(layer, store, case.window, inputs, seed), strict=True):
            expected = brute_force(layer, x_TH, case.window)
            torch.testing.assert_close(y_TH.double(), expected, rtol=RTOL, atol=ATOL)


@cases
def test_a_query_has_the_same_bits_in_any_chunk_and_company(case: Case) -> None:
    """Protects the one answer: what a prompt's token attends with follows from its own history alone."""
    layer, inputs = case.layer(), some_inputs()
    store = new_cache(case)
    whole = [run(layer, store, case.window, [(store.admit(len(x_TH)), x_TH, 0)])[0] for x_TH in inputs]
    for seed in range(3):
        found = run_all(layer, new_cache(case), case.window, inputs, seed)
        assert all(torch.equal(got_TH, wanted_TH) for got_TH, wanted_TH in zip(found, whole, strict=True))


@pytest.mark.parametrize("window", [None, 7])
def test_a_decode_has_the_same_bits_in_any_company(window: int | None) -> None:
    """Together with others, longer and shorter, with rows that fill the batch up, and as a prompt's single token."""
    case = Case("", window)
    layer, inputs = case.layer(), some_inputs()
    store = new_cache(case)
    handles = [store.admit(len(x_TH) + 1) for x_TH in inputs]
    for handle, x_TH in zip(handles, inputs, strict=True):
        run(layer, store, window, [(handle, x_TH, 0)])
    positions = torch.tensor([*map(len, inputs), 0])
    sequences = torch.tensor([*handles, store.spare])
    x_BH = torch.randn(len(positions), HIDDEN, generator=torch.Generator().manual_seed(9))

    def decode(rows: list[int]) -> torch.Tensor:
        step = Step(torch.zeros(len(rows), dtype=torch.int64), positions[rows], sequences[rows])
        where = Where(Rotary(ROPE)(step.position_T), store.layer(0), store.plan(step)[window])
        return layer.attended(x_BH[rows], where)

    together_BH = decode([3, 1, 5, 0, 4, 2])
    for at, row in enumerate([3, 1, 5, 0, 4, 2]):
        assert torch.equal(decode([row])[0], together_BH[at]), row
    (again_TH,) = run(layer, store, window, [(handles[0], x_BH[:1], len(inputs[0]))])
    assert torch.equal(again_TH[0], together_BH[3])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("window", [None, 7])
def test_bfloat16(window: int | None, device: str) -> None:
    """Protects the low-precision path: products of bf16 operands, everything between them in float32."""
    case = Case("", window)
    layer, inputs = case.layer().bfloat16(), some_inputs(dtype=torch.bfloat16)
    store = new_cache(case, torch.bfloat16, device=device)
    outputs = run_all(copy.deepcopy(layer).to(device), store, window, [x_TH.to(device) for x_TH in inputs], seed=1)
    for x_TH, y_TH in zip(inputs, outputs, strict=True):
        expected = brute_force(layer, x_TH, window)
        # bf16 rounds by up to 2^-9 relative at q, k, v, the weights, the heads' output and y; scores here reach ~30, so
        # that a rounded key moves a weight by some per cent. A wrong position is off by the size of the outputs.
        error = (y_TH.cpu().double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.03


def test_released_sequence_cannot_poison_its_successor() -> None:
    """Protects isolation: a sequence that overflowed leaves NaN in its pages; the next owner must not see it."""
    case = Case("", 7)
    layer, store, x_TH = case.layer(), new_cache(case, sequences=1, tokens=64), some_inputs()[0]
    handle = store.admit(64)
    run(layer, store, 7, [(handle, torch.full((64, HIDDEN), torch.nan), 0)])
    store.release(handle)
    handle = store.admit(64)
    outs = [run(layer, store, 7, [(handle, x_TH[t : t + 1], t)])[0] for t in range(len(x_TH))]
    torch.testing.assert_close(torch.cat(outs).double(), brute_force(layer, x_TH, 7), rtol=RTOL, atol=ATOL)


def test_attend_takes_extreme_scores() -> None:
    """Protects the softmax's stability: scores and sinks far beyond exp's range, on either side."""
    q, k, v = torch.full((1, 1, 4), 100.0), torch.full((1, 2, 4), 100.0), torch.tensor([[[1.0], [3.0]]])
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    for sink, expected in ((-1e30, 2.0), (1e30, 0.0), (20000.0, 4.0 / 3.0)):  # scores are 20000 each
        out = attend(q, k, v.expand(1, 2, 4), valid, torch.full((1, 1), sink))
        torch.testing.assert_close(out, torch.full((1, 1, 4), expected))


def test_rotation_turns_the_two_halves() -> None:
    """Protects the pairing: dimension i turns with i + D/2 (gpt-oss), not with its neighbour."""
    x_THD = torch.zeros(1, 1, 8)
    x_THD[..., 1] = 1.0
    quarter = torch.tensor([[0.0, torch.pi / 2, 0.0, 0.0]])
    torch.testing.assert_close(rotate(x_THD, quarter.cos(), quarter.sin())[0, 0].argmax(), torch.tensor(5))


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if isinstance(out, torch.Tensor) and alias is None:  # views and in-place operations take no memory
            self.elements = max(self.elements, out.numel())
        return out


def big_layer() -> Iterator[tuple[int | None, list[tuple[int, int]]]]:
    yield None, [(512, 15872)]
    yield 128, [(512, 15872)]
    yield None, [(1024, 0)]
    yield 128, [(1024, 0)]
    yield None, [(1, 131071)] * 2
    yield None, [(1, 16383)] * 8


# Those without a cache before them are slow: the first two have many new tokens, too.
@pytest.mark.parametrize(
    ("window", "sequences"),
    [pytest.param(*each, marks=pytest.mark.slow if each[1] == [(1024, 0)] else ()) for each in big_layer()],
)
def test_memory_is_bounded_at_gpt_oss_sizes(window: int | None, sequences: list[tuple[int, int]]) -> None:
    """Protects long prompts: no tensor beyond the stated bounds; runs the real shapes on the meta device."""
    with torch.device("meta"):
        layer = Attention(2880, 64, 8, 64, bias=True, eps=1e-5).requires_grad_(False)
        tokens = sum(new + cached for new, cached in sequences)
        store = Cache(
            CacheConfig([window], 8, 64, tokens=tokens, sequences=len(sequences), dtype=torch.float32), "meta"
        )
        handles = [store.admit(new + cached) for new, cached in sequences]
        step = make_step(
            [(handle, [0] * new, cached) for handle, (new, cached) in zip(handles, sequences, strict=True)],
            device="meta",
        )
        rope = Rope(64, 150000.0, 32.0, 32.0, 1.0, 4096, False, 1.0)
        with _Largest() as largest:
            plan = store.plan(step)[window]
            where = Where(Rotary(rope)(step.position_T), store.layer(0), plan)
            layer.attended(torch.empty(len(step.token_T), 2880), where)
    chunk = len(step.token_T) * (64 + 8 + 8) * 64  # queries, keys and values of the step
    context = max(new + cached for new, cached in sequences) * 8 * 64  # keys of one sequence
    scores = QUERIES * 64 * max(new + cached for new, cached in sequences)
    if window is not None:  # score blocks follow the window
        context, scores = (len(step.token_T) + window + QUERIES) * 8 * 64, QUERIES * 64 * (window + QUERIES)
    assert largest.elements <= max(chunk, context, scores)
