"""Slot rows in symmetric memory: who takes it, on all ranks alike; padding; and on GPUs the bits, again and again.

On the CPU the memory is ordinary and gloo adds it up, so that everything around torch's kernel is real.

Letters: T tokens · K experts per token · H hidden.
"""

import io
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loading import rank_of
from spawn import run_ranks
from steps import make_step

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.kernels import symmetric as memory
from epmoe.layers.norm import AddNorm, add_rows
from epmoe.layers.owed import Owed
from epmoe.models.decoder import Decoder
from epmoe.moe.exchange.slots import Slots
from epmoe.moe.exchange.symmetric import SIZES, VECTOR, SymmetricRows, connect, unsuitable
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.load import load

SUMMED: list[int] = []  # bytes of each call


def unrouted(top_k: int) -> Any:
    """A routing for an exchange that sends no token anywhere."""
    return SimpleNamespace(top_k=top_k, route=lambda logits_TE: None)


def pretend(*, failing: str = "", rank: int = 1, mine: int = 0) -> None:
    """In a rank's process: ordinary memory, gloo's sum; one step fails on one rank."""

    def fail(*_: Any) -> Any:
        raise RuntimeError(f"{failing} is broken\nand a second line")

    def sum_up(flat: torch.Tensor, group: dist.ProcessGroup) -> None:
        SUMMED.append(flat.nbytes)
        dist.all_reduce(flat, group=group)

    memory.possible = lambda device: True
    memory.allocate = lambda count, ranks: torch.full((count,), 77, dtype=torch.uint8)
    memory.rendezvous = lambda buffer, group: None
    memory.two_shot = sum_up
    if failing and rank == mine:
        setattr(memory, failing, fail)


def choose(ranks: Ranks, failing: str, rank: int) -> tuple[bool, str, int]:
    """Whether this rank took symmetric memory, what it said, and what is closed at the end."""
    pretend(failing=failing, rank=rank, mine=ranks.rank)
    with redirect_stderr(io.StringIO()) as said:
        taken = connect(ranks) is not None
    ranks.barrier()
    return taken, said.getvalue(), len(ranks.until_end)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("failing", ["allocate", "rendezvous"])
def test_one_rank_that_fails_while_nobody_waits_decides_for_all(failing: str, rank: int) -> None:
    """All go by the process group; rank 0 says it, in one line that names the rank and its reason."""
    line = "epmoe: combine=slots goes by the process group, not by symmetric memory: "
    line += f"rank {rank}: {failing} is broken\n"
    assert run_ranks(choose, 4, failing, rank) == [(False, line, 0), *[(False, "", 0)] * 3]


def test_all_take_it_where_all_can() -> None:
    assert run_ranks(choose, 2, "", 0) == [(True, "", 1)] * 2


def test_numbers_of_ranks_that_it_does_not_serve() -> None:
    first, *others = run_ranks(choose, 3, "", 0)
    assert first == (False, first[1], 0) and first[1].endswith(": 3 ranks, and it serves 2, 4, 8\n")
    assert others == [(False, "", 0)] * 2


def plain(ranks: Ranks) -> tuple[bool, str]:
    with redirect_stderr(io.StringIO()) as said:
        slots = Slots(ranks)
    nowhere = slots.dispatch(torch.ones(2, 8), torch.ones(2, 8), unrouted(4)).rows_XKH is None
    return slots.symmetric is None and nowhere, said.getvalue()


@pytest.mark.parametrize("size", [1, 2])
def test_cpus_go_by_the_process_group_without_a_word(size: int) -> None:
    assert run_ranks(plain, size) == [(True, "")] * size


def test_several_nodes_are_not_for_it() -> None:
    two = Ranks(0, 2, 0, 2, torch.device("cuda", 0), expert_size=2)
    assert unsuitable(two) == "the ranks are on 2 nodes"
    assert all(not unsuitable(rank_of(0, size, "cuda")) for size in SIZES)


class Group:
    def size(self) -> int:
        return 4


def test_rows_are_zeros_of_the_shape_that_was_asked_for() -> None:
    """However dirty the last step has left the buffer; and only what fits, in a dtype that the kernel adds."""
    group: Any = Group()
    buffer = torch.full((4096,), 255, dtype=torch.uint8)
    shared = SymmetricRows(buffer, group)
    for dtype, tokens in ((torch.bfloat16, 5), (torch.float32, 3), (torch.bfloat16, 1), (torch.bfloat16, 0)):
        rows_TKH = shared.lend(torch.ones(tokens, 33, dtype=dtype), 3)
        assert rows_TKH is not None and rows_TKH.shape == (tokens, 3, 33) and rows_TKH.dtype == dtype
        assert rows_TKH.is_contiguous() and not rows_TKH.any()
        assert not tokens or rows_TKH.data_ptr() == buffer.data_ptr()
        rows_TKH.fill_(torch.nan)
    with pytest.raises(AssertionError, match="not lent"):
        shared.add(torch.zeros(1, 3, 33))
    assert shared.lend(torch.ones(1, 33, dtype=torch.float16), 3) is None
    assert shared.lend(torch.ones(4, 512, dtype=torch.bfloat16), 1) is not None  # the whole buffer
    assert shared.lend(torch.ones(4, 513, dtype=torch.bfloat16), 1) is None
    # 2046 values are 4092 bytes: they fit, and so does their padding; in a buffer of 4092 bytes the padding would not.
    assert shared.lend(torch.ones(1, 2046, dtype=torch.bfloat16), 1) is not None
    assert SymmetricRows(torch.zeros(4092, dtype=torch.uint8), group).lend(torch.ones(1, 1023), 1) is None
    # Who gives the memory back leaves zeros, which is believed; who only looks at the rows does not.
    looked_TKH = shared.lend(torch.ones(2, 33), 3)
    assert looked_TKH is not None
    Owed(looked_TKH.fill_(1), lender=shared).wait()
    added_TKH = shared.lend(torch.ones(2, 33), 3)
    assert added_TKH is not None and not added_TKH.any()
    x_TH, _ = Owed(added_TKH.fill_(1), lender=shared).add_to(torch.zeros(2, 33), AddNorm(33, 1e-5))
    assert torch.equal(x_TH, torch.full((2, 33), 3.0)) and not added_TKH.any()
    added_TKH.fill_(1)  # behind its back: what was given back is not cleared again
    left_TKH = shared.lend(torch.ones(2, 33), 3)
    assert left_TKH is not None and left_TKH.all()
    last_TKH = shared.lend(torch.ones(1, 33), 3)
    assert last_TKH is not None and last_TKH.data_ptr() == buffer.data_ptr()
    shared.close()
    assert shared.lend(torch.ones(1, 33), 3) is None


SHAPES = [(1, 4, 33), (2, 1, 1), (7, 3, 96), (64, 4, 40), (3, 4, 31)]  # tokens, experts per token, hidden


def sums(ranks: Ranks, large: int) -> list[torch.Tensor]:
    """Each shape's rows after the combine, and in turn one that the buffer does not hold."""
    pretend()
    slots, found = Slots(ranks, room=64 << 10), []
    for seed, (tokens, top_k, hidden) in enumerate([*SHAPES, (large, 4, 40), *SHAPES]):
        rows_TKH, mine_TKH = owned(ranks, seed, tokens, top_k, hidden, torch.bfloat16)
        norm_TH = torch.empty(tokens, hidden, dtype=torch.bfloat16)
        sent = slots.dispatch(norm_TH, norm_TH, unrouted(top_k))
        lent_TKH = sent.rows_XKH
        assert (lent_TKH is None) == (tokens == large)
        y_TKH = slots.combine(mine_TKH.clone() if lent_TKH is None else lent_TKH.copy_(mine_TKH), sent).wait()
        assert y_TKH is not None and (y_TKH is lent_TKH) == (lent_TKH is not None)
        found.append(y_TKH.clone())
        assert torch.equal(y_TKH, rows_TKH)
    assert len(SUMMED) == 2 * len(SHAPES) and all(size % (VECTOR * ranks.size) == 0 for size in SUMMED)
    return found


def owned(
    ranks: Ranks, seed: int, tokens: int, top_k: int, hidden: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows [T, K, H], and those of a rank's own slots; of very different sizes, subnormal ones and zeros too."""
    random = torch.Generator(ranks.device).manual_seed(seed)
    options: Any = {"generator": random, "device": ranks.device}
    rows_TKH = torch.randn(tokens, top_k, hidden, **options)
    rows_TKH *= 2.0 ** torch.randint(-140, 20, (tokens, top_k, hidden), **options)
    rows_TKH = (rows_TKH * (torch.rand(tokens, top_k, hidden, **options) > 0.1)).to(dtype)
    owner_TK = torch.randint(0, ranks.expert_size, (tokens, top_k), **options)
    return rows_TKH, torch.where((owner_TK == ranks.expert_rank)[..., None], rows_TKH, 0)


@pytest.mark.parametrize("size", [2, 4])
def test_sums_in_padded_runs_of_the_buffer(size: int) -> None:
    """Odd shapes, one after the other in the same memory: exact, and the kernel always gets whole vectors."""
    first, *others = run_ranks(sums, size, 500)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# (tokens that each sequence brings, whose logits are wanted): too many for the buffer, in halves, none wanted …
STEPS = [
    ((3, 2), "last"),
    ((9,), "none"),
    ((1, 1, 1, 1), "all"),
    ((30, 2), "last"),
    ((50, 9), "last"),
    ((1,), "all"),
    ((5, 7, 2, 1), "none"),
    ((2, 2), "all"),
    ((38,), "last"),
    ((1, 1), "last"),
]


def steps_of_a_model(ranks: Ranks, checkpoint: str, shared: bool) -> tuple[list[torch.Tensor], list[bool], int]:
    """Each step's logits, whether the buffer was all zeros after it, and how many times rows went by it."""
    if shared:
        pretend()
    model, _ = load(Checkpoint.open(checkpoint), ranks, Choices(combine="slots", dtype="float32"), progress=False)
    assert isinstance(model, Decoder)
    model.limits = replace(model.limits, halves_from=40)
    config, exchange = model.config, Slots(ranks, room=8 << 10)
    for layer in model.moe_layers():
        layer.exchange = exchange
    sizes: dict[str, Any] = {"tokens": 800, "sequences": 4, "page": 4}
    store = Cache(
        CacheConfig(config.windows, config.kv_heads, config.head_dim, **sizes, dtype=torch.float32), ranks.device
    )
    handles, lengths = [store.admit(180) for _ in range(4)], [0] * 4
    random, found, zeros = torch.Generator().manual_seed(1), [], []
    for counts, wanted in STEPS:
        chunks = []
        for index, count in enumerate(counts):
            ids = torch.randint(0, config.vocab, (count,), generator=random).tolist()
            chunks.append((handles[index], ids, lengths[index]))
            lengths[index] += count
        step = make_step(chunks, every=wanted == "all")
        if wanted == "none":
            step = replace(step, output_O=torch.empty(0, dtype=torch.int64))
        with torch.inference_mode():
            found.append(model(step, store).clone())
        buffer = exchange.symmetric.buffer if exchange.symmetric else None
        zeros.append(buffer is not None and not buffer.any())
    return found, zeros, len(SUMMED)


def test_a_model_leaves_zeros_after_every_step(tiny_checkpoint: Path) -> None:
    """Of any size, one after the other: the next step and every layer within relies on them. The bits of one rank."""
    ((alone, _, _),) = run_ranks(steps_of_a_model, 1, str(tiny_checkpoint), False)
    for found, zeros, times in run_ranks(steps_of_a_model, 2, str(tiny_checkpoint), True):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
        assert all(zeros) and times > len(STEPS)


# On GPUs

COUNTS = [1, 2, 3, 8, 31, 64, 200, 256, 512]
ROUNDS = 150


def race(ranks: Ranks, dtype: torch.dtype) -> list[int]:
    """How many of the rounds were right, by number of tokens; both transports, ranks at different speeds, no waits."""
    slots = Slots(ranks)
    assert slots.symmetric is not None
    right = []
    delay = torch.Generator().manual_seed(100 + ranks.rank)
    for tokens in COUNTS:
        good = torch.zeros((), dtype=torch.int64, device=ranks.device)
        x_TH = torch.empty(tokens, 2880, dtype=dtype, device=ranks.device)
        for seed in range(ROUNDS):
            rows_TKH, mine_TKH = owned(ranks, seed, tokens, 4, 2880, dtype)
            sent = slots.dispatch(x_TH, x_TH, unrouted(4), overlap=True)
            group_TKH = slots.combine(mine_TKH.clone(), replace(sent, overlap=bool(seed % 2))).wait()
            if seed % 3 == ranks.rank % 3:
                torch.cuda._sleep(int(torch.randint(0, 200_000, (), generator=delay)))  # up to a tenth of a millisecond
            sent = slots.dispatch(x_TH, x_TH, unrouted(4))
            assert sent.rows_XKH is not None and group_TKH is not None
            y_TKH = slots.combine(sent.rows_XKH.copy_(mine_TKH), sent).wait()
            assert y_TKH is not None
            same = (y_TKH == rows_TKH).all() & (group_TKH == rows_TKH).all()
            good += same & (bits(add_rows(y_TKH)) == bits(add_rows(group_TKH))).all()
        right.append(int(good))
    return right


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def replay(ranks: Ranks) -> list[bool]:
    """A graph of several layers, each writing where the last one did; replayed with other values, without a wait.

    As in the model, a norm reads the rows and leaves zeros, upon which the next layer relies.
    """
    slots, layers, tokens = Slots(ranks), 6, 24
    norm = AddNorm(2880, 1e-5).to(ranks.device, torch.bfloat16).requires_grad_(False)
    x_TH = torch.zeros(tokens, 2880, dtype=torch.bfloat16, device=ranks.device)
    source = torch.zeros(layers, tokens, 4, 2880, dtype=torch.bfloat16, device=ranks.device)
    found = torch.zeros_like(source)

    def step() -> None:
        for layer in range(layers):
            sent = slots.dispatch(source[layer, :, 0], x_TH, unrouted(4))
            assert sent.rows_XKH is not None
            owed = slots.combine(sent.rows_XKH.add_(source[layer]), sent)
            rows_TKH = owed.wait()
            assert rows_TKH is not None and owed.lender is not None
            found[layer] = rows_TKH
            owed.add_to(x_TH, norm)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    right = []
    for seed in range(100):
        pairs = [owned(ranks, 1000 * layer + seed, tokens, 4, 2880, torch.bfloat16) for layer in range(layers)]
        source.copy_(torch.stack([mine for _, mine in pairs]))
        if seed % 2 == ranks.rank % 2:
            torch.cuda._sleep(100_000)
        graph.replay()
        right.append((found == torch.stack([rows for rows, _ in pairs])).all())
    done = torch.stack(right).tolist()
    graph.reset()
    return done


def sizes() -> list[int]:
    return [size for size in (2, 4, 8) if size <= max(2, torch.cuda.device_count())]


@pytest.mark.multigpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", sizes())
def test_both_transports_give_the_same_bits_again_and_again(size: int, dtype: torch.dtype) -> None:
    for right in run_ranks(race, size, dtype, device="cuda", timeout=240):
        assert right == [ROUNDS] * len(COUNTS)


@pytest.mark.multigpu
@pytest.mark.parametrize("size", sizes())
def test_a_graph_of_several_layers_gives_the_same_bits_again_and_again(size: int) -> None:
    for right in run_ranks(replay, size, device="cuda", timeout=240):
        assert len(right) == 100 and all(right)
