"""The key/value cache that fits into what is free.

Every rank must build the same cache, since all of them schedule the same steps: what differs between ranks is gathered
first, and the least counts.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from epmoe.cache.cache import Cache
from epmoe.errors import UserError
from epmoe.ranks.memory import free_bytes
from epmoe.ranks.mesh import Ranks

# Of what is free once the weights are loaded, the cache may take this much; the rest is for activations and logits.
CACHE_SHARE = 0.7


def fit_cache(
    config: Any,
    needs: Sequence[int],
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    page: int,
    max_batch: int,
    cache_tokens: int = 0,
) -> Cache:
    """The cache for requests that need `needs[i]` positions each; a collective.

    `config` is a model's (windows, kv_heads, head_dim). `cache_tokens` fixes the capacity; 0 takes what the requests
    need when as many as possible run at a time, and no more than CACHE_SHARE of the free memory. Where memory is the
    bound, batches and with them the last bits of logits depend on the machine and on the number of ranks, and rank 0
    says so; with a fixed capacity they don't.

    Raises:
        UserError: a request does not fit the capacity, or a fixed capacity the memory; the message names the key.
    """
    sequences = min(max_batch, len(needs))

    def build(tokens: int, device: torch.device | str) -> Cache:
        shape = config.windows, config.kv_heads, config.head_dim
        return Cache(*shape, tokens=tokens, sequences=sequences, page=page, dtype=dtype, device=device)

    def pages(tokens: int) -> int:
        return -(-tokens // page)

    largest = max(pages(need) for need in needs)
    fixed, per_page = _bytes(build(page, "meta"), build(2 * page, "meta"))
    neighbours = ranks.size // ranks.nodes if ranks.device.type == "cpu" else 1  # they share the host's memory
    least = min(free for (free,) in ranks.gather([free_bytes(ranks.device) // neighbours]))
    wanted = sum(sorted((pages(need) for need in needs), reverse=True)[:sequences])
    if cache_tokens:
        capacity = pages(cache_tokens)
        if fixed + capacity * per_page > least:
            raise UserError(
                f"runtime.cache_tokens={cache_tokens} needs {(fixed + capacity * per_page) / 1e9:.1f} GB on "
                f"{ranks.device}, of which {least / 1e9:.1f} GB are free: lower it, or leave it at 0"
            )
        remedy = "raise runtime.cache_tokens, shorten the prompt or lower max_new_tokens"
    else:
        budget = int(least * CACHE_SHARE)
        capacity = min(wanted, (budget - fixed) // per_page if per_page else wanted)
        remedy = (
            f"{budget / 1e9:.1f} GB of free memory are for the cache; "
            "lower max_new_tokens or runtime.max_batch, shorten the prompt, or use more memory"
        )
    if largest > capacity:
        index = next(i for i, need in enumerate(needs) if pages(need) > capacity)
        raise UserError(
            f"prompt {index + 1} needs {needs[index]} positions of the key/value cache, which holds "
            f"{max(capacity, 0) * page}: {remedy}"
        )
    if not cache_tokens and capacity < wanted and ranks.is_main:
        print(
            f"epmoe: free memory bounds the key/value cache at {capacity * page} positions, the requests want "
            f"{wanted * page}: batches, and so last bits, may differ with the number of ranks; "
            f"runtime.cache_tokens=N, at most {capacity * page} here, fixes them",
            file=sys.stderr,
        )
    return build(capacity * page, ranks.device)


def _bytes(one_page: Cache, two_pages: Cache) -> tuple[int, int]:
    """Bytes that do not depend on the number of pages, and bytes of a page."""
    per_page = two_pages.nbytes - one_page.nbytes
    return one_page.nbytes - per_page, per_page
