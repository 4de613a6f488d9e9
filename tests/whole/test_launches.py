"""How many kernels a decode step is, so that it cannot creep up unseen: a small one costs more than its work."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpret import interpreted
from launches import launches
from loading import load_rank, rank_of

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.engine.request import ALL_KEPT, Level, Variant
from epmoe.engine.state import State
from epmoe.engine.step import Sizes, StaticStep
from epmoe.kernels import symmetric as memory
from epmoe.layers.twin import switched
from epmoe.moe.exchange import symmetric


def layer(*attention: str, ranks: int) -> list[str]:
    combine = ranks > 1
    return [
        "add_norm_kernel",  # adds the experts' slots of the layer before
        "product_kernel",  # queries, keys and values
        *attention,
        "product_kernel",
        "add_norm_linear_kernel",  # the router's logits, too
        "_few",
        "gate_up_kernel",
        "down_kernel",
        *["neg_"] * combine,  # in the place of the kernel that adds the ranks' rows, which needs them
    ]


BEFORE = ["take_kernel", "cos_sin_kernel", "embedding"]
AFTER = ["add_norm_kernel", "product_kernel", "largest_kernel", "join_kernel", "advance_kernel", "copy_"]


def share(model: Any, size: int) -> None:
    """Let the model's rows go by symmetric memory, with nobody at the other end."""
    group: Any = SimpleNamespace(size=lambda: size)
    exchange = model.moe_layers()[0].exchange
    exchange.group = group
    exchange.symmetric = symmetric.SymmetricRows(torch.zeros(1 << 20, dtype=torch.uint8), group)


def step(
    path: Path, rows: int, ranks: int, kept: bool = False, level: Level = Level.GREEDY
) -> tuple[list[str], list[str]]:
    """The launches of a decode step on one of the ranks, with the kernels that a GPU runs.

    Whole, and the same step up to its head. `kept`: the device keeps all that requests may ask for, of others.
    """
    model, _ = load_rank(path, 0, ranks, experts="triton", router="triton", dtype="float32", progress=False)
    if ranks > 1:
        share(model, ranks)
    config = model.config
    shape = (config.windows, config.kv_heads, config.head_dim)
    cache = Cache(CacheConfig(*shape, tokens=600, sequences=rows, dtype=torch.float32), "cpu")

    model.limits = replace(model.limits, vocab_chunk=config.vocab // 4)
    with switched(interpreted=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "two_shot", lambda flat, group: flat.neg_())
        state = State(cache, config.vocab, rank_of(0, 1))
        state.keep(ALL_KEPT if kept else frozenset())
        decode = StaticStep(model, cache, state, Sizes(rows, 16))
        decode.sequence_M.copy_(torch.tensor([cache.admit(20) for _ in range(rows)]))
        with torch.inference_mode():
            decode.decode(rows, Variant(level, False))
            with launches() as names:
                decode.decode(rows, Variant(level, False))
            decode.rows(rows)
            with launches() as body:
                decode.rows(rows)
    return names, body


@pytest.mark.parametrize(
    ("rows", "ranks", "kept"),
    [
        (3, 1, True),
        (1, 2, False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 1, False), (3, 2, True))),
    ],
)
def test_launches_of_a_decode_step(tiny_checkpoint: Path, rows: int, ranks: int, kept: bool) -> None:
    """Eight a layer with a window, nine with full attention (the cache is longer than one split), nine around them.

    Several ranks add one a layer: zeros in other ranks' slots are left there by the norm that read the last rows. A
    step whose rows want no penalty, bias or mask is the same where others' are kept.
    """
    window = layer("decode_kernel", ranks=ranks)
    full = layer("decode_kernel", "combine_kernel", ranks=ranks)
    whole, body = interpreted(step, tiny_checkpoint, rows, ranks, kept)
    assert whole == [*BEFORE, *window, *full, *AFTER]
    assert body == [*BEFORE, *window, *full, AFTER[0], *["copy_"] * 3]  # the norms, sequences and positions for a head


SAMPLED = ["scan_kernel", *["round_kernel"] * 3, "sum_kernel", "border_kernel", "draw_kernel"]


def test_launches_of_a_sampled_step(tiny_checkpoint: Path) -> None:
    """Seven in the place of the greedy choice's two, whatever the rows ask for."""
    whole, _ = interpreted(step, tiny_checkpoint, 3, 1, True, Level.SAMPLE)
    begin = whole.index("scan_kernel")
    assert whole[begin - 2 :] == [*AFTER[:2], *SAMPLED, *AFTER[4:]]
