"""Paged cache of keys and values, in which sliding-window layers keep only their window.

Letters: T tokens of a step · O of them whose logits are wanted · B sequences · C positions attended to · J key/value
heads · D head dimension · R rows of a pool (a row is the place of one position).

Layers that have the same window share a stock of pages of `page` rows, and a table that lists each sequence's:

    row = table[sequence, position // page] · page + position % page

so that a layer's cache is [J, R, D] keys and as many values, and attention only ever sees rows. A sequence holds pages
for all its positions where layers see all of them; where they see a window, for what its next tokens see
(epmoe/cache/pages.py). Each stock's last page belongs to no request: rows that fill a step up to a fixed batch go there
(Cache.spare).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epmoe.batch import Step
from epmoe.cache.pages import CacheFull, Pages
from epmoe.cache.plan import Plan, Rows, Spans
from epmoe.cache.rows import PagedRows
from epmoe.errors import UserError
from epmoe.ranks.memory import is_full
from epmoe.ranks.transfer import to_device

Changes = tuple[Sequence[int], Sequence[int]]  # places in `Cache.entries`, and the pages that stand there now


@dataclass(frozen=True)
class CacheConfig:
    """What a cache holds."""

    windows: Sequence[int | None]  # one a layer: positions it attends to, the token itself included; None = all
    kv_heads: int
    head_dim: int
    tokens: int  # positions of the full-attention layers, shared among the sequences in pages of `page`
    sequences: int  # that can be admitted at a time
    page: int = 16
    dtype: torch.dtype = torch.bfloat16
    step: int | None = None  # tokens of prompts in one step, at most; None: as many as `tokens`
    positions: int | None = None  # of a sequence, at most; None: as many as `tokens`
    prefix_cache: bool = True
    draft: tuple[int, int] | None = None  # key/value heads and head dimension of a draft model; None: there is none

    @property
    def pages(self) -> dict[int | None, int]:
        """Pages of each window's stock; every layer has as many, and a spare one.

        A window's are what all sequences see of it, each with a piece of a prompt that begins and ends within pages,
        and the step's tokens; no more than full attention has, since whoever holds one of these holds one of those.
        """
        full, step = -(-self.tokens // self.page), self.tokens if self.step is None else self.step

        def count(window: int | None) -> int:
            if window is None:
                return full
            seen = self.sequences * ((window + self.page - 2) // self.page + 2) + -(-step // self.page)
            return min(seen, full) if None in self.windows else seen

        return {window: count(window) for window in self.windows}

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each layer's keys and values."""
        pages = self.pages
        return [(2, self.kv_heads, (pages[window] + 1) * self.page, self.head_dim) for window in self.windows]

    @property
    def draft_shape(self) -> tuple[int, ...]:
        """Of the draft model's keys and values: it sees all positions, in the pages of the layers that do."""
        if self.draft is None:
            return (0,)
        kv_heads, head_dim = self.draft
        return 2, kv_heads, (self.pages[None] + 1) * self.page, head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(map(math.prod, [*self.shapes, self.draft_shape])) * self.dtype.itemsize


class Cache:
    """Keys and values of up to `sequences` sequences; all memory is taken by the constructor.

    Raises:
        UserError: the device has not enough memory.
    """

    def __init__(self, config: CacheConfig, device: torch.device | str) -> None:
        assert config.tokens > 0 and config.sequences > 0 and config.page > 0
        self.config, self.device = config, torch.device(device)
        self.tokens, self.sequences, page = config.tokens, config.sequences, config.page
        whole = -(-config.tokens // page) * page
        most = config.positions or whole
        if None in config.windows:
            most = min(most, whole)
        self.pages = Pages(config.pages, page, config.sequences, most=most, prefix_cache=config.prefix_cache)
        # A multiple of 4 columns: kernels are compiled anew for addresses that 16 does not divide.
        columns = -(-most // (4 * page)) * 4
        shape = len(config.pages), config.sequences + 1, columns
        self.entries = torch.zeros(math.prod(shape) + 1, dtype=torch.int32, device=self.device)
        self.table = self.entries[:-1].view(shape)
        self.pools = {
            window: PagedRows(window, count, page, table)
            for (window, count), table in zip(config.pages.items(), self.table, strict=True)
        }
        try:
            self.layers = [torch.empty(shape, dtype=config.dtype, device=self.device) for shape in config.shapes]
            # Zeros: what a draft model has not seen, of a prefix that is found, weighs little, and harms no text.
            self.draft_layer = torch.zeros(config.draft_shape, dtype=config.dtype, device=self.device)
        except (MemoryError, RuntimeError) as error:
            if not is_full(error):
                raise
            raise UserError(
                f"the key/value cache of {config.tokens} tokens and {config.sequences} sequences needs "
                f"{config.nbytes / 1e9:.1f} GB on {self.device}, which has less: lower runtime.cache_tokens or "
                "runtime.max_batch"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.config.nbytes

    def admit(self, end: int, begin: int = 0) -> int:
        """A handle with pages for positions begin : end, and for what these see.

        Raises:
            CacheFull: it does not fit now.
            UserError: it would not fit into an empty cache either.
        """
        self.pages.check(end)
        handle, _ = self.pages.admit()
        if self.grow(handle, begin, end) < end - begin:
            self.release(handle)
            raise CacheFull(f"no pages for positions {begin} to {end}")
        return handle

    def grow(self, handle: int, begin: int, end: int) -> int:
        """As `Pages.grow`; and the device knows."""
        count = self.pages.grow(handle, begin, end)
        self.write()
        return count

    def write(self, leave: int = 0) -> Changes:
        """Make known to the device which pages sequences have come to hold: one copy, where there are any.

        Up to so many as `leave` are left to who asks, and to `set`.
        """
        changed = self.pages.told()
        _, handles, columns = self.table.shape
        places = [(stock * handles + handle) * columns + place for stock, handle, place in changed]
        changes = places, list(changed.values())
        if len(changed) <= leave:
            return changes
        self.set(*to_device(changes, torch.int64, self.device))
        return [], []

    @property
    def nobody(self) -> int:
        """A place whose page means nothing."""
        return len(self.entries) - 1

    def set(self, place_X: torch.Tensor, page_X: torch.Tensor) -> None:
        """The pages of these places in `entries`: int64 [X] each."""
        self.entries.index_copy_(0, place_X, page_X.int())

    def release(self, handle: int) -> None:
        """Give a sequence's pages and its handle back."""
        self.pages.release(handle)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, [J, R, D] each; attention reads and writes them at the plan's rows."""
        key_JRD, value_JRD = self.layers[index]
        return key_JRD, value_JRD

    @property
    def draft(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft model's, likewise."""
        key_JRD, value_JRD = self.draft_layer
        return key_JRD, value_JRD

    @property
    def spare(self) -> int:
        """The handle of rows that only fill a batch up. It has rows of its own, is never admitted and never full."""
        return self.sequences

    def plan(self, step: Step) -> dict[int | None, Plan]:
        """Where each window's layers read and write in this step: {window: plan}."""
        held = [sequence for _, _, _, sequence in step.spans or ()]
        assert len(set(held)) == len(held), "a sequence stands in the step twice"
        for begin, end, cached, sequence in step.spans or ():
            assert end > begin and self.pages.holds(sequence, cached, cached + end - begin), "tokens without pages"
        span_P4 = step.span_P4
        if span_P4 is None and step.spans:
            span_P4 = to_device(step.spans, torch.int32, self.device)
        shared: dict[str, torch.Tensor] = {}
        most, plans = len(step.sequence_B), {}
        for window, pool in self.pools.items():
            rows = Rows(step.position_T[:most], step.sequence_B, step.rows_1, pool, step.drafted) if most else None
            spans = None if span_P4 is None else Spans(span_P4, len(step.token_T), step.spans, pool)
            plans[window] = Plan(window, rows, spans, shared)
        return plans
