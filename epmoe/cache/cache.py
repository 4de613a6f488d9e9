"""Paged cache of keys and values, in which sliding-window layers keep only their window.

Letters: T tokens of a step · O of them whose logits are wanted · B sequences · C positions attended to · J key/value
heads · D head dimension · R rows of a pool (a row is the place of one position).

A pool serves all layers that have the same window, and turns (sequence, position) into a row:

    full attention    pages of `page` rows from a common stock, listed in table[sequence]:
                      row = table[sequence, position // page] · page + position % page
    window W          a ring of ⌈W/page⌉ + 1 pages a sequence:
                      row = sequence · ring + position % ring

so that a layer's cache is [J, R, D] keys and as many values, and attention only ever sees rows. The last page and the
last ring belong to no request: rows that fill a decode step up to a fixed batch go there (Cache.spare).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epmoe.batch import Step
from epmoe.cache.pages import Pages
from epmoe.cache.plan import Plan, Rows, Spans
from epmoe.cache.rows import PagedRows, RingRows
from epmoe.errors import UserError
from epmoe.ranks.memory import is_full
from epmoe.ranks.transfer import to_device


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


class Cache:
    """Keys and values of up to `sequences` sequences; all memory is taken by the constructor.

    Raises:
        UserError: the device has not enough memory.
    """

    def __init__(self, config: CacheConfig, device: torch.device | str) -> None:
        assert config.tokens > 0 and config.sequences > 0 and config.page > 0
        self.config, self.device = config, torch.device(device)
        self.tokens, self.sequences = config.tokens, config.sequences
        self.paged = PagedRows(config.tokens, config.sequences, config.page, self.device)
        self.pools: dict[int | None, PagedRows | RingRows] = {
            window: self.paged if window is None else RingRows(window, config.sequences, config.page, self.device)
            for window in config.windows
        }
        self.pages = Pages(self.paged.pages if None in self.pools else 0, config.page, config.sequences)
        shapes = [(2, config.kv_heads, self.pools[window].rows, config.head_dim) for window in config.windows]
        try:
            self.layers = [torch.empty(shape, dtype=config.dtype, device=self.device) for shape in shapes]
        except (MemoryError, RuntimeError) as error:
            if not is_full(error):
                raise
            need = sum(math.prod(shape) for shape in shapes) * config.dtype.itemsize
            raise UserError(
                f"the key/value cache of {config.tokens} tokens and {config.sequences} sequences needs "
                f"{need / 1e9:.1f} GB on {self.device}, which has less: lower runtime.cache_tokens or runtime.max_batch"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def admit(self, max_tokens: int) -> int:
        """Reserve a sequence's pages and make them known to the device; returns its handle. Raises as `Pages.admit`."""
        handle = self.pages.admit(max_tokens)
        self.write(handle)
        return handle

    def write(self, handle: int) -> None:
        """Make known to the device which pages an admitted sequence holds."""
        if self.pages.held[handle]:
            self.paged.write(handle, self.pages.held[handle])

    def release(self, handle: int) -> None:
        """Give a sequence's pages and its handle back."""
        self.pages.release(handle)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, [J, R, D] each; attention reads and writes them at the plan's rows."""
        key_JRD, value_JRD = self.layers[index]
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
            assert end > begin and cached + end - begin <= self.pages.reserved[sequence], (
                "more tokens than were reserved"
            )
        span_P4 = step.span_P4
        if span_P4 is None and step.spans:
            span_P4 = to_device(step.spans, torch.int32, self.device)
        shared: dict[str, torch.Tensor] = {}
        most, plans = len(step.sequence_B), {}
        for window, pool in self.pools.items():
            rows = Rows(step.position_T[:most], step.sequence_B, step.rows_1, pool) if most else None
            spans = None if span_P4 is None else Spans(span_P4, len(step.token_T), step.spans, pool)
            plans[window] = Plan(window, rows, spans, shared)
        return plans
