"""The floor under a decode step's time: the bytes that a rank must read / how many it can read in a second.

For B sequences on N ranks, of which the fullest has L of the E experts, and K experts a token:

    bytes(B) = dense                            every layer's attention, norms and router: each rank runs all of them,
                                                but for q, k and v of heads that ranks share (mesh.attention=tensor)
             + L · (1 − (1 − K/E)^B) · expert   different experts that B tokens choose here, as expected when each token
                                                takes any K with equal chance; `expert` is one of each layer together
             + vocabulary / N                   the projection, which N ranks can share
             + B · row                          the tokens' embeddings
             + B · Σ min(window, C) · position  over the layers: keys and values of C positions that a token attends to

Everything else (activations, what is written) is small and left out, so the floor is a little too low, never too high.
A prompt's tokens are rows of a step like the others, but for what they attend to, which is of the step itself. The
bound of many is arithmetic: 2 · (values of dense + K/N · values of an expert) products and sums a token, in all layers
but the last, without those of attention and the vocabulary. (The last layer is wanted for a prompt's last token only,
and otherwise makes keys and values, which are left out.)
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch

from epmoe.models import Family
from epmoe.weights.manifest import Manifest

EMBEDDING, PROJECTION = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Floor:
    """The numbers of the formulas above; sizes in bytes."""

    dense: int
    expert: int
    expert_values: int
    vocabulary: int
    row: int
    position: int  # a key and a value of one layer
    windows: tuple[int | None, ...]
    num_experts: int
    top_k: int
    local: int  # experts on the fullest rank
    ranks: int
    itemsize: int  # of all but the experts' matrices

    @classmethod
    def of(cls, manifest: Manifest, model: Family, dtype: torch.dtype, *, local: int, ranks: int) -> Self:
        """For a model, its tensors (`manifest`) and the dtype that it computes in."""
        config = model.config
        own = {name: (manifest.rows(name), *shape[1:]) for name, shape in manifest.shapes.items()}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in own.items()}
        embedding = sizes.pop(EMBEDDING)
        vocabulary = sizes.pop(PROJECTION, embedding)
        return cls(
            dense=sum(sizes.values()),
            expert=manifest.bytes_of_weights(1, dtype) - manifest.bytes_of_weights(0, dtype),
            expert_values=sum(rows * columns for _, rows, columns in (each.shape for each in manifest.matrices())),
            vocabulary=vocabulary,
            row=config.hidden * dtype.itemsize,
            position=2 * model.own_kv_heads * config.head_dim * dtype.itemsize,
            windows=tuple(config.windows),
            num_experts=config.num_experts,
            top_k=config.top_k,
            local=local,
            ranks=ranks,
            itemsize=dtype.itemsize,
        )

    def distinct(self, batch: int) -> float:
        """The expected number of experts of one layer that a rank must read."""
        return self.local * (1 - (1 - self.top_k / self.num_experts) ** batch)

    def step_bytes(self, batch: int, contexts: Iterable[int] = (0,), *, prompt: int = 0) -> float:
        """bytes(B), the mean over steps whose sequences attend to these many positions.

        `prompt` tokens of a prompt are in the step too: they choose experts and have embeddings, and what they attend
        to is of the step itself.
        """
        attended = statistics.mean(sum(min(w or c, c) for w in self.windows) for c in contexts)
        weights = self.dense + self.distinct(batch + prompt) * self.expert + self.vocabulary / self.ranks
        return weights + (batch + prompt) * self.row + batch * attended * self.position

    def prefill_flops(self) -> float:
        """Products and sums that a rank must do for a token of a prompt."""
        values = self.dense / self.itemsize + self.top_k / self.ranks * self.expert_values
        return 2 * values * (len(self.windows) - 1) / len(self.windows)


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of an elementwise kernel over arrays far larger than any cache."""
    source = torch.ones((1 << 30) if device.type != "cpu" else (1 << 25), dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: torch.neg(source, out=target), device)


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, large enough to fill the device."""
    size = 8192 if device.type != "cpu" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b), device)


def _seconds(call: Callable[[], object], device: torch.device, calls: int = 10, repeat: int = 5) -> float:
    """Seconds a call: the median of some series; one comes before as a warm-up."""
    times = []
    for _ in range(repeat + 1):
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        _synchronize(device)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
