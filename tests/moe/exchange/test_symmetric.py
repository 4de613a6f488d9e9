"""Slot rows in symmetric memory: who takes it, on all ranks alike; whose turn; and on GPUs the bits, again and again.

On the CPU the memory is that of files which the ranks' processes share, and torch's version waits and writes, so that
everything around the kernels is real.

Letters: T tokens · K experts per token · H hidden.
"""

import io
import time
from contextlib import redirect_stderr
from dataclasses import replace
from itertools import pairwise
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
from epmoe.kernels.symmetric import MARKS
from epmoe.layers import push
from epmoe.layers.norm import AddNorm, add_rows
from epmoe.models.decoder import Decoder
from epmoe.moe.exchange.slots import Slots
from epmoe.moe.exchange.symmetric import MOST_RANKS, PLACES, Places, connect, unsuitable
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.load import load


def routed(top_k: int, row_S: torch.Tensor | None = None) -> Any:
    """A routing for an exchange, of which only these slots matter."""
    return SimpleNamespace(top_k=top_k, route=lambda logits_TE: SimpleNamespace(row_S=row_S))


def pretend(folder: str, *, failing: str = "", rank: int = 1, mine: int = 0) -> None:
    """In a rank's process: memory of files that all ranks map; one step fails on one rank."""

    def fail(*_: Any) -> Any:
        raise RuntimeError(f"{failing} is broken\nand a second line")

    def mapped(rank: int, count: int) -> torch.Tensor:
        return torch.from_file(f"{folder}/{rank}", shared=True, size=count, dtype=torch.uint8)

    def rendezvous(buffer: torch.Tensor, group: dist.ProcessGroup) -> tuple[list[torch.Tensor], Any]:
        return [mapped(peer, len(buffer)) for peer in range(group.size())], None

    memory.possible = lambda device: True
    memory.allocate = lambda count, ranks: mapped(ranks.expert_rank, count).fill_(255)
    memory.rendezvous = rendezvous
    if failing and rank == mine:
        setattr(memory, failing, fail)


def choose(ranks: Ranks, folder: str, failing: str, rank: int) -> tuple[bool, str, int]:
    """Whether this rank took symmetric memory, what it said, and what is closed at the end."""
    pretend(folder, failing=failing, rank=rank, mine=ranks.rank)
    with redirect_stderr(io.StringIO()) as said:
        taken = connect(ranks) is not None
    ranks.barrier()
    return taken, said.getvalue(), len(ranks.until_end)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("failing", ["allocate", "rendezvous"])
def test_one_rank_that_fails_while_nobody_waits_decides_for_all(failing: str, rank: int, tmp_path: Path) -> None:
    """All go by the process group; rank 0 says it, in one line that names the rank and its reason."""
    line = "epmoe: combine=slots goes by the process group, not by symmetric memory: "
    line += f"rank {rank}: {failing} is broken\n"
    assert run_ranks(choose, 4, str(tmp_path), failing, rank) == [(False, line, 0), *[(False, "", 0)] * 3]


@pytest.mark.parametrize("size", [2, 3])
def test_all_take_it_where_all_can(size: int, tmp_path: Path) -> None:
    assert run_ranks(choose, size, str(tmp_path), "", 0) == [(True, "", 1)] * size


def plain(ranks: Ranks) -> tuple[bool, str]:
    with redirect_stderr(io.StringIO()) as said:
        slots = Slots(ranks)
    nowhere = slots.dispatch(torch.ones(2, 8), torch.ones(2, 8), routed(4)).rows_XKH is None
    return slots.symmetric is None and nowhere, said.getvalue()


@pytest.mark.parametrize("size", [1, 2])
def test_cpus_go_by_the_process_group_without_a_word(size: int) -> None:
    assert run_ranks(plain, size) == [(True, "")] * size


def test_devices_whose_nans_nobody_knows_are_not_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [torch.device(each) for each in ("cuda", "cpu", "xpu")]
    assert [memory.possible(each) for each in kinds] == [True, False, False]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not any(memory.possible(each) for each in kinds)


def test_several_nodes_are_not_for_it() -> None:
    two = Ranks(0, 2, 0, 2, torch.device("cuda", 0), expert_size=2)
    assert unsuitable(two) == "the ranks are on 2 nodes"
    assert all(not unsuitable(rank_of(0, size, "cuda")) for size in (2, 3, 8, MOST_RANKS))
    assert unsuitable(rank_of(0, 65, "cuda")) == "65 ranks, and it serves 64"


def test_each_layer_has_its_turn() -> None:
    """No two in a row have the same place, the last of a pass and the first of the next included; only what fits, in a
    dtype that the kernels know."""
    room = 4096
    byte_N = [torch.full((PLACES * (room + MARKS),), 255, dtype=torch.uint8) for _ in range(2)]
    places = Places(1, byte_N)
    few_TH = torch.ones(1, 33)
    assert places.lend(few_TH, 3) is None, "nothing has begun"
    for layers in range(2, 7):
        turns = []
        for _ in range(2):
            places.begin(layers)
            for _ in range(layers):
                lent = places.lend(few_TH, 3)
                assert lent is not None
                turns.append(places.places.index(lent[0]))
        assert turns[:layers] == turns[layers:] and all(a != b for a, b in pairwise(turns))
    places.begin(9)
    for dtype, tokens in ((torch.bfloat16, 5), (torch.float32, 3), (torch.bfloat16, 1)):
        lent = places.lend(torch.ones(tokens, 33, dtype=dtype), 3)
        assert lent is not None
        place, rows_TKH = lent
        assert rows_TKH.shape == (tokens, 3, 33) and rows_TKH.dtype == dtype and rows_TKH.is_contiguous()
        assert rows_TKH.data_ptr() == place.byte_N[1].data_ptr() + MARKS == int(place.address_N[1]) + MARKS
        assert place.mark_N.data_ptr() == place.byte_N[1].data_ptr() and place.mark_N.tolist() == [-1, -1]
    assert places.lend(torch.ones(0, 33), 3) is None and places.lend(torch.ones(1, 33, dtype=torch.float16), 3) is None
    assert places.lend(torch.ones(4, 512, dtype=torch.bfloat16), 1) is not None  # the whole place
    assert places.lend(torch.ones(4, 513, dtype=torch.bfloat16), 1) is None
    places.begin(1)
    assert places.lend(few_TH, 3) is None, "a layer alone would follow itself"
    places.begin(2)
    places.close()
    assert places.lend(few_TH, 3) is None
    with pytest.raises(AssertionError, match="for granted"):  # vectors of 16 bytes
        Places(1, [each[8:] for each in byte_N])


SHAPES = [(1, 4, 33), (2, 1, 1), (7, 3, 96), (64, 4, 40), (3, 4, 31)]  # tokens, experts per token, hidden


def rows_of_all(ranks: Ranks, folder: str, large: int) -> list[torch.Tensor]:
    """Each shape's rows after the combine, and in turn one that a place does not hold."""
    pretend(folder)
    slots, found, lent = Slots(ranks, room=64 << 10), [], 0
    for seed, (tokens, top_k, hidden) in enumerate([*SHAPES, (large, 4, 40), *SHAPES]):
        if seed % 3 == 0:
            slots.begin(3)
        rows_TKH, row_S = owned(ranks, seed, tokens, top_k, hidden, torch.bfloat16)
        x_TH = torch.zeros(tokens, hidden, dtype=torch.bfloat16)
        sent = slots.dispatch(x_TH, x_TH, routed(top_k, row_S))
        assert (sent.rows_XKH is None) == (tokens == large)
        lent += sent.rows_XKH is not None
        owed = slots.combine(own(rows_TKH, row_S), sent)
        y_TKH = owed.wait()
        assert y_TKH is not None and (y_TKH is sent.rows_XKH) == (sent.rows_XKH is not None)
        found.append(y_TKH.clone())
        assert torch.equal(y_TKH, rows_TKH)
        norm = AddNorm(hidden, 1e-5).requires_grad_(False)
        assert torch.equal(owed.add_to(x_TH, norm)[0], add_rows(rows_TKH))
    assert lent == 2 * len(SHAPES)
    return found


def owned(
    ranks: Ranks, seed: int, tokens: int, top_k: int, hidden: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows [T, K, H], of very different sizes, subnormal ones and zeros too; and [S], 0 where a slot is a rank's
    own, else -1. With every third seed one rank has none."""
    random = torch.Generator(ranks.device).manual_seed(seed)
    options: Any = {"generator": random, "device": ranks.device}
    rows_TKH = torch.randn(tokens, top_k, hidden, **options)
    rows_TKH *= 2.0 ** torch.randint(-140, 20, (tokens, top_k, hidden), **options)
    rows_TKH = (rows_TKH * (torch.rand(tokens, top_k, hidden, **options) > 0.1)).to(dtype)
    owner_S = torch.randint(int(seed % 3 == 0), ranks.expert_size, (tokens * top_k,), **options)
    return rows_TKH, torch.where(owner_S == ranks.expert_rank, 0, -1).int()


def own(rows_TKH: torch.Tensor, row_S: torch.Tensor) -> torch.Tensor:
    """What a rank's experts make: its own slots' rows, among zeros."""
    return torch.where((row_S >= 0).view(*rows_TKH.shape[:2], 1), rows_TKH, 0)


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_all_ranks(size: int, tmp_path: Path) -> None:
    """Odd shapes, one after the other in the same memory: exact."""
    first, *others = run_ranks(rows_of_all, size, str(tmp_path), 500)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def passes_without_an_end(ranks: Ranks, folder: str) -> list[bool]:
    """Whether the rows were right in each pass of two layers, of which the last has none; rank 1 reads them late."""
    pretend(folder)
    push.LIMIT_S = 5.0
    slots, norm, right = Slots(ranks, room=4 << 10), AddNorm(33, 1e-5).requires_grad_(False), []
    for seed in (1, 2, 4):
        rows_TKH, row_S = owned(ranks, seed, 7, 3, 33, torch.float32)
        x_TH = torch.zeros(7, 33)
        slots.begin(2)
        owed = slots.combine(own(rows_TKH, row_S), slots.dispatch(x_TH, x_TH, routed(3, row_S)))
        assert owed.place is not None
        if ranks.rank == 1:
            time.sleep(0.2)
        right.append(torch.equal(owed.add_to(x_TH, norm)[0], add_rows(rows_TKH)))
        none = slots.combine(rows_TKH[:0], slots.dispatch(x_TH[:0], x_TH[:0], routed(3, row_S[:0])))
        assert none.place is None and none.add_to(x_TH[:0], norm)[0].shape == (0, 33)
    return right


def test_a_place_that_follows_itself_is_read_before(tmp_path: Path) -> None:
    """Of two layers the last has no rows where no logits are wanted: then the ranks meet there."""
    assert run_ranks(passes_without_an_end, 2, str(tmp_path)) == [[True] * 3] * 2


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


def steps_of_a_model(ranks: Ranks, checkpoint: str, folder: str) -> tuple[list[torch.Tensor], list[bool], int]:
    """Each step's logits, whether all places were POISON after it, and how many times rows went by them."""
    if folder:
        pretend(folder)
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
    random, found, left, lent = torch.Generator().manual_seed(1), [], [], 0
    if exchange.symmetric is not None:
        lend = exchange.symmetric.lend

        def counted(x_TH: torch.Tensor, top_k: int) -> Any:
            nonlocal lent
            place = lend(x_TH, top_k)
            lent += place is not None
            return place

        exchange.symmetric.lend = counted  # type: ignore[method-assign]
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
        if exchange.symmetric is not None:
            ranks.barrier()
            own = [place.byte_N[ranks.expert_rank] for place in exchange.symmetric.places]
            left.append(all(bool((each == 255).all()) for each in own))
            ranks.barrier()
    return found, left, lent


def test_a_model_leaves_poison_after_every_step(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of any size, one after the other: the next step and every layer within relies on it. The bits of one rank."""
    ((alone, _, _),) = run_ranks(steps_of_a_model, 1, str(tiny_checkpoint), "")
    for found, left, times in run_ranks(steps_of_a_model, 2, str(tiny_checkpoint), str(tmp_path)):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
        assert all(left) and times > len(STEPS)


# On GPUs

COUNTS = [1, 2, 3, 8, 31, 64, 200, 256, 512]
ROUNDS = 150


def race(ranks: Ranks, dtype: torch.dtype) -> list[int]:
    """How many of the rounds were right, by number of tokens; both transports, ranks at different speeds, no waits."""
    slots = Slots(ranks)
    assert slots.symmetric is not None
    norm = AddNorm(2880, 1e-5).to(ranks.device, dtype).requires_grad_(False)
    right = []
    delay = torch.Generator().manual_seed(100 + ranks.rank)
    for tokens in COUNTS:
        good = torch.zeros((), dtype=torch.int64, device=ranks.device)
        x_TH = torch.zeros(tokens, 2880, dtype=dtype, device=ranks.device)
        for seed in range(ROUNDS):
            rows_TKH, row_S = owned(ranks, seed, tokens, 4, 2880, dtype)
            if seed % 5 == 0:
                slots.begin(5)
            if seed % 7 == 0:
                sent = slots.dispatch(x_TH, x_TH, routed(4, row_S), overlap=True)
                group_TKH = slots.combine(own(rows_TKH, row_S), replace(sent, overlap=bool(seed % 2))).wait()
                assert group_TKH is not None
                good -= (group_TKH != rows_TKH).any().long()
            if seed % 3 == ranks.rank % 3:
                torch.cuda._sleep(int(torch.randint(0, 200_000, (), generator=delay)))  # up to a tenth of a millisecond
            sent = slots.dispatch(x_TH, x_TH, routed(4, row_S))
            assert sent.rows_XKH is not None
            owed = slots.combine(own(rows_TKH, row_S), sent)
            if seed % 4 == 0:
                seen_TKH = owed.wait()
                assert seen_TKH is not None
                good -= (seen_TKH != rows_TKH).any().long()
            good += (bits(owed.add_to(x_TH, norm)[0]) == bits(add_rows(rows_TKH))).all()
        right.append(int(good))
    return right


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def replay(ranks: Ranks) -> list[bool]:
    """Graphs of an odd and an even number of layers, replayed in turn with other values, without a wait."""
    slots, layers, tokens = Slots(ranks), 6, 24
    norm = AddNorm(2880, 1e-5).to(ranks.device, torch.bfloat16).requires_grad_(False)
    x_TH = torch.zeros(tokens, 2880, dtype=torch.bfloat16, device=ranks.device)
    source = torch.zeros(layers, tokens, 4, 2880, dtype=torch.bfloat16, device=ranks.device)
    row = torch.zeros(layers, tokens * 4, dtype=torch.int32, device=ranks.device)
    found = torch.zeros_like(source[:, :, 0])

    def step(count: int) -> None:
        slots.begin(count)
        for layer in range(count):
            sent = slots.dispatch(x_TH, x_TH, routed(4, row[layer]))
            assert sent.rows_XKH is not None
            owed = slots.combine(own(source[layer], row[layer]), sent)
            found[layer] = owed.add_to(x_TH, norm)[0]

    stream, graphs = torch.cuda.Stream(), {}
    stream.wait_stream(torch.cuda.current_stream())
    for count in (layers, layers - 1, 2):
        with torch.cuda.stream(stream):
            step(count)
        graphs[count] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[count], stream=stream, capture_error_mode="thread_local"):
            step(count)
    right = []
    for seed in range(150):
        count = (layers, layers - 1, 2)[seed % 3]
        made = [owned(ranks, 1000 * layer + seed, tokens, 4, 2880, torch.bfloat16) for layer in range(layers)]
        source.copy_(torch.stack([rows for rows, _ in made]))
        row.copy_(torch.stack([each for _, each in made]))
        if seed % 2 == ranks.rank % 2:
            torch.cuda._sleep(100_000)
        graphs[count].replay()
        wanted = torch.stack([add_rows(rows) for rows, _ in made])
        right.append((bits(found[:count]) == bits(wanted[:count])).all())
    done = torch.stack(right).tolist()
    for graph in graphs.values():
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
        assert len(right) == 150 and all(right)
