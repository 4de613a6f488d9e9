"""The key/value cache that fits into what is free.

Every rank must build the same cache, since all of them schedule the same steps: what differs between ranks is gathered
first, and the least counts.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.errors import UserError
from epmoe.ranks.memory import free_bytes
from epmoe.ranks.mesh import Ranks
from epmoe.streams import tell

# Of what is free once the weights are loaded, the cache may take this much; the rest is for activations and logits.
CACHE_SHARE = 0.7


class ModelShape(Protocol):
    """What the cache needs to know of a model's configuration."""

    @property
    def windows(self) -> Sequence[int | None]: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_positions(self) -> int: ...


@dataclass(frozen=True)
class CacheSettings:
    """What the configuration says of the cache."""

    dtype: torch.dtype
    page: int = 16
    max_batch: int = 64
    tokens: int = 0  # runtime.cache_tokens; 0: what the requests need, as far as memory goes
    step: int | None = None  # tokens of prompts in one step, at most; None: any number
    prefix_cache: bool = True
    draft: tuple[int, int] | None = None  # as CacheConfig's
    kv_heads: int | None = None  # on this rank; None: all


def fit_cache(config: ModelShape, needs: Sequence[int] | None, ranks: Ranks, settings: CacheSettings) -> Cache:
    """The cache for requests that need `needs[i]` positions each, or for any (None); a collective.

    `settings.tokens` fixes the capacity; 0 takes what the requests need when as many as possible run at a time (any
    requests: as many as may run, each as long as the model's positions), and no more than CACHE_SHARE of the free
    memory. Where memory is the bound, when a request runs, and how often it is put back, depend on the machine and on
    the number of ranks, and rank 0 says so; with a fixed capacity they don't.

    Raises:
        UserError: a request does not fit the capacity, or a fixed capacity the memory; the message names the key.
    """
    page, sequences = settings.page, settings.max_batch if needs is None else min(settings.max_batch, len(needs))

    def shaped(pages: int) -> CacheConfig:
        return CacheConfig(
            windows=config.windows,
            kv_heads=config.kv_heads if settings.kv_heads is None else settings.kv_heads,
            head_dim=config.head_dim,
            tokens=pages * page,
            sequences=sequences,
            page=page,
            dtype=settings.dtype,
            step=settings.step,
            positions=config.max_positions,
            prefix_cache=settings.prefix_cache,
            draft=settings.draft,
        )

    neighbours = ranks.neighbours if ranks.device.type == "cpu" else 1  # they share the host's memory
    free = min(each for (each,) in ranks.gather_all([free_bytes(ranks.device) // neighbours]))
    pages = [-(-need // page) for need in needs or [config.max_positions] * sequences]
    wanted = sum(sorted(pages, reverse=True)[:sequences])
    if settings.tokens:
        capacity = -(-settings.tokens // page)
        _check_fixed(settings, shaped(capacity).nbytes, free, ranks)
        remedy = "raise runtime.cache_tokens, shorten the prompt or lower max_new_tokens"
    else:
        budget = int(free * CACHE_SHARE)
        capacity = bisect_right(range(wanted + 1), budget, key=lambda pages: shaped(pages).nbytes) - 1
        remedy = (
            f"{budget / 1e9:.1f} GB of free memory are for the cache; "
            "lower max_new_tokens or runtime.max_batch, shorten the prompt, or use more memory"
        )
    largest = max(pages) if needs else 1
    if largest > capacity:
        index = next((i for i, count in enumerate(pages) if count > capacity), 0)
        raise UserError(
            f"prompt {index + 1} needs {needs[index] if needs else 1} positions of the key/value cache, which holds "
            f"{max(capacity, 0) * page}: {remedy}"
        )
    if not settings.tokens and capacity < wanted:
        _say_bound(capacity * page, wanted * page if needs else 0, ranks)
    return Cache(shaped(capacity), ranks.device)


def _check_fixed(settings: CacheSettings, need: int, free: int, ranks: Ranks) -> None:
    """Raises UserError when a fixed capacity needs more bytes than are free."""
    if need > free:
        raise UserError(
            f"runtime.cache_tokens={settings.tokens} needs {need / 1e9:.1f} GB on "
            f"{ranks.device}, of which {free / 1e9:.1f} GB are free: lower it, or leave it at 0"
        )


def _say_bound(capacity: int, wanted: int, ranks: Ranks) -> None:
    """Rank 0 says that memory bounds the cache at `capacity` positions; `wanted` is 0 where no requests are known."""
    if ranks.is_main:
        wish = f", the requests want {wanted}" if wanted else ""
        tell(
            f"epmoe: free memory bounds the key/value cache at {capacity} positions{wish}: "
            "what runs when, and is put back, may differ with the number of ranks; "
            f"runtime.cache_tokens=N, at most {capacity} here, fixes them"
        )
