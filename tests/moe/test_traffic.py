"""The bytes of a layer's messages, against those of the collectives that ranks really call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from epmoe.batch import Beside, Step
from epmoe.cache.cache import Cache, CacheConfig
from epmoe.moe.traffic import Message, Sizes, traffic, wanting
from epmoe.ranks.mesh import Ranks
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import Choices
from epmoe.weights.load import load
from epmoe.weights.synthetic import make_checkpoint

# Operations of process groups, by which of their arguments is brought, and which is got.
OPERATIONS = {
    "allreduce_": ("all_reduce", 0, 0),
    "_allgather_base_": ("all_gather", 1, 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 0),
    "alltoall_base_": ("all_to_all", 1, 0),
}
LAYERS, EXPERTS, TOP_K = 3, 8, 3


class Counted(TorchDispatchMode):
    """Whatever the process groups are given within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, brings, gets = OPERATIONS[func._schema.name.partition("::")[2]]
            self.messages.append(Message(name, nbytes(args[brings]), nbytes(args[gets])))
        return func(*args, **(kwargs or {}))


def nbytes(given: torch.Tensor | Sequence[torch.Tensor]) -> int:
    return given.nbytes if isinstance(given, torch.Tensor) else sum(each.nbytes for each in given)


def counted(ranks: Ranks, place: str, attention: str, combine: str, dtype: str, tokens: int) -> list[Message]:
    """Of a prompt of so many tokens, on each rank its own where that is so."""
    choices = Choices(attention=attention, combine=combine, dtype=dtype)
    model, _ = load(Checkpoint.open(place), ranks, choices, progress=False)
    for layer in model.moe_layers():
        if combine == "all_to_all":
            layer.exchange.limits = type(layer.exchange.limits)(parted_from=64)  # type: ignore[attr-defined]
    config, compute = model.config, getattr(torch, dtype)
    shape = config.windows, model.own_kv_heads, config.head_dim
    cache = Cache(CacheConfig(*shape, tokens=256, sequences=1, page=4, dtype=compute), ranks.device)
    handle = cache.admit(tokens)
    generator = torch.Generator().manual_seed(ranks.rank)
    step = Step(
        token_T=torch.randint(0, config.vocab, (tokens,), generator=generator),
        position_T=torch.arange(tokens),
        sequence_B=torch.empty(0, dtype=torch.int64),
        spans=((0, tokens, 0, handle),),
        output_O=torch.tensor([tokens - 1]),
        beside=Beside((tokens,) * ranks.size, (1,) * ranks.size) if attention == "data" else None,
    )
    with torch.inference_mode(), Counted() as found:
        model.hidden(step, cache)
    return found.messages


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("traffic")
    return str(make_checkpoint(folder, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, heads=8, kv_heads=4))


WAYS = [
    ("replicate", "slots"),
    ("replicate", "all_reduce"),
    ("tensor", "slots"),
    *(pytest.param("data", each, marks=pytest.mark.slow) for each in ("slots", "all_reduce")),
]


@pytest.mark.parametrize(("attention", "combine"), WAYS)
@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), pytest.param(4, "bfloat16", marks=pytest.mark.slow)])
def test_messages_and_bytes(ranks: int, dtype: str, attention: str, combine: str, place: str) -> None:
    layer = Sizes(96, 8 * 16, EXPERTS, TOP_K, getattr(torch, dtype).itemsize, ranks)
    wanted = traffic(layer, attention, combine, 20) * (LAYERS - 1) + traffic(layer, attention, combine, 1)
    if attention == "tensor":  # the last layer puts heads of the wanted tokens alone side by side
        assert len(wanted) == 2 * LAYERS
    for found in run_ranks(counted, ranks, place, attention, combine, dtype, 20):
        assert found == wanted


def test_only_wanted_rows_travel(place: str) -> None:
    """All ranks together: what leaves comes, in all its kinds, and about as much as chance lets expect."""
    tokens, layer = 200, Sizes(96, 8 * 16, EXPERTS, TOP_K, 4, 2)
    small = traffic(layer, "data", "all_to_all", 1)
    wanted = traffic(layer, "data", "all_to_all", tokens, parted=True) * (LAYERS - 1) + small
    every = run_ranks(counted, 2, place, "data", "all_to_all", "float32", tokens)
    for messages in zip(wanted, *every, strict=True):
        expected, *found = messages
        assert {each.collective for each in found} == {expected.collective}
        brought, got = sum(each.brings for each in found), sum(each.gets for each in found)
        if expected.collective == "all_to_all":
            assert brought == got == pytest.approx(2 * expected.brings, rel=0.15)
        else:
            assert (brought, got) == (2 * expected.brings, 2 * expected.gets)
    replicated = sum(each.gets for each in traffic(layer, "replicate", "slots", 2 * tokens))
    assert sum(each.gets for each in wanted[:4]) < replicated


def test_one_rank_and_no_tokens_have_no_traffic() -> None:
    assert not traffic(Sizes(96, 128, 8, 3, 4, 1), "data", "slots", 5)
    assert not traffic(Sizes(96, 128, 8, 3, 4, 2), "tensor", "slots", 0)
    assert wanting(Sizes(96, 128, 8, 8, 4, 2)) == 2 and wanting(Sizes(96, 128, 8, 1, 4, 4)) == 1


def test_the_pages_table(place: str) -> None:
    """docs/mesh.md has what `traffic` says of gpt-oss."""
    page = (Path(__file__).parents[2] / "docs" / "mesh.md").read_text()
    for line in rows():
        assert line in page, line


def rows() -> list[str]:
    """Of the page's table: bytes that a rank gets in a layer of gpt-oss-20b, in bf16."""
    found = []
    for ranks in (2, 8):
        layer = Sizes(2880, 64 * 64, 32, 4, 2, ranks)
        for attention, combine, parted in (
            ("replicate", "slots", False), ("tensor", "slots", False), ("data", "slots", False),
            ("data", "all_to_all", True),
        ):  # fmt: skip
            cells = [str(ranks), attention, combine]
            for tokens in (1, 64, 4096):
                each = tokens if attention != "data" else max(1, tokens // ranks)
                messages = traffic(layer, attention, combine, each, parted=parted)
                cells.append(f"{len(messages)}: {sum(each.gets for each in messages) / 1e3:,.1f}")
            found.append("| " + " | ".join(cells) + " |")
    return found


if __name__ == "__main__":
    print("\n".join(rows()))
