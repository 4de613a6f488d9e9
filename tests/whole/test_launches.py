"""How many kernels a decode step is, so that it cannot creep up unseen: a small one costs more than its work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpret import interpreted
from launches import launches
from loading import load_rank, rank_of

from epmoe.cache.cache import Cache
from epmoe.engine import decode_step as decode
from epmoe.engine import sampler as sampling
from epmoe.engine.decode_step import Decoder, State, Variant
from epmoe.engine.request import Level
from epmoe.kernels import greedy as greedy_triton
from epmoe.kernels import norm as norm_triton
from epmoe.kernels import rotary as rotary_triton
from epmoe.kernels import sequence_state as decode_triton
from epmoe.kernels.attention import launch as attention_triton
from epmoe.layers import attention, linear, norm, rotary, vocabulary
from epmoe.models import gpt_oss
from epmoe.moe.exchange import symmetric


def layer(product: str, *attention: str, ranks: int) -> list[str]:
    combine = ranks > 1
    return [
        "add_norm_kernel",  # adds the experts' slots of the layer before
        product,  # queries, keys and values
        *attention,
        product,
        "add_norm_linear_kernel",  # the router's logits, too
        "_few",
        "gate_up_kernel",
        "down_kernel",
        *["neg_"] * combine,  # in the place of the kernel that adds the ranks' rows, which needs them
    ]


BEFORE = ["take_kernel", "arange", "cos_sin_kernel", "embedding"]
AFTER = ["add_norm_kernel", "few_logits_kernel", "largest_kernel", "join_kernel", "advance_kernel", "copy_"]


def share(model: Any, size: int) -> None:
    """Let the model's rows go by symmetric memory, with nobody at the other end."""
    group: Any = SimpleNamespace(size=lambda: size)
    combine = model.moe_layers()[0].combine
    combine.group = group
    combine.symmetric = symmetric.SymmetricRows(torch.zeros(1 << 20, dtype=torch.uint8), group)


def step(path: Path, rows: int, ranks: int) -> list[str]:
    """The launches of a greedy decode step on one of the ranks, with the kernels that a GPU runs."""
    model, _ = load_rank(path, 0, ranks, experts="triton", router="triton", dtype="float32", progress=False)
    if ranks > 1:
        share(model, ranks)
    config = model.config
    shape = (config.windows, config.kv_heads, config.head_dim)
    cache = Cache(*shape, tokens=600, sequences=rows, dtype=torch.float32, device="cpu")

    def take(self: State, sequence_B: torch.Tensor) -> Any:
        return decode_triton.take(sequence_B, self.token_S, self.position_S)

    def angles(self: rotary.Rotary, position_T: torch.Tensor) -> Any:
        return rotary_triton.cos_sin(position_T, self.frequency_F, self.concentration)

    def advance(self: State, id_B: torch.Tensor, sequence_B: torch.Tensor, position_B: torch.Tensor) -> None:
        state = (self.token_S, self.position_S, self.seen_SV)
        decode_triton.advance(id_B, sequence_B, position_B, *state, self.vocab)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "implementation", lambda device: attention_triton.cached_attention)
        patch.setattr(norm, "implementation", lambda device: norm_triton)
        for module in (sampling, decode):
            patch.setattr(module, "largest", greedy_triton.largest)
            patch.setattr(module, "join_largest", greedy_triton.join_largest)
        patch.setattr(rotary.Rotary, "__call__", angles)
        # As on a GPU in bf16, which the interpreter cannot multiply; chunks of the library would be several launches.
        patch.setattr(vocabulary, "suits_kernel", lambda device, dtype, rows: rows <= vocabulary.FEW)
        patch.setattr(linear, "suits_kernel", lambda device, dtype, tokens: tokens <= linear.FEW)
        patch.setattr(gpt_oss, "VOCAB_CHUNK", config.vocab // 4)
        patch.setattr(symmetric, "_two_shot", lambda flat, group: flat.neg_())
        patch.setattr(State, "take", take)
        patch.setattr(State, "advance", advance)
        decoder = Decoder(model, cache, State(cache, config.vocab, rank_of(0, 1)), rows)
        decoder.sequence_M.copy_(torch.tensor([cache.admit(20) for _ in range(rows)]))
        with torch.inference_mode():
            decoder.step(rows, Variant(Level.GREEDY, False))
            with launches() as names:
                decoder.step(rows, Variant(Level.GREEDY, False))
    return names


@pytest.mark.parametrize(("rows", "product"), [(1, "linear_kernel"), (3, "linear")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_launches_of_a_decode_step(tiny_checkpoint: Path, rows: int, product: str, ranks: int) -> None:
    """Eight a layer with a window, nine with full attention (the cache is longer than one split), ten around them.

    Several ranks add one a layer: zeros in other ranks' slots are left there by the norm that read the last rows.
    """
    window = layer(product, "decode_kernel", ranks=ranks)
    full = layer(product, "decode_kernel", "combine_kernel", ranks=ranks)
    assert interpreted(step, tiny_checkpoint, rows, ranks) == [*BEFORE, *window, *full, *AFTER]
