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

from collections.abc import Sequence

import torch

from epmoe.batch import DecodeStep, Step, _spans
from epmoe.cache.plan import Decode, Plan, Prefill
from epmoe.cache.rows import PagedRows, RingRows
from epmoe.errors import UserError
from epmoe.ranks.transfer import to_device


class CacheFull(Exception):
    """The sequence does not fit now; it will when others were released."""


class Cache:
    """Keys and values of up to `sequences` sequences; all memory is taken by the constructor.

    Args:
        windows: one entry a layer, the number of positions it attends to (the token itself included), None = all.
        tokens: positions of the full-attention layers, shared among the sequences in pages of `page`.
        sequences: how many sequences can be admitted at a time.
    Raises:
        UserError: the device has not enough memory.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        kv_heads: int,
        head_dim: int,
        *,
        tokens: int,
        sequences: int,
        page: int = 16,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        assert tokens > 0 and sequences > 0 and page > 0
        self.windows, self.tokens, self.sequences = tuple(windows), tokens, sequences
        self.device = torch.device(device)
        self.paged = PagedRows(tokens, sequences, page, self.device)
        self.pools: dict[int | None, PagedRows | RingRows] = {
            window: self.paged if window is None else RingRows(window, sequences, page, self.device)
            for window in self.windows
        }
        self.free = list(range(sequences))[::-1]
        self.reserved: dict[int, int] = {}  # handle → max_tokens
        shapes = [(2, kv_heads, self.pools[window].rows, head_dim) for window in self.windows]
        try:
            self.layers = [torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes]
        except torch.OutOfMemoryError as error:
            need = sum(2 * kv_heads * rows * head_dim for _, _, rows, _ in shapes) * dtype.itemsize
            raise UserError(
                f"the key/value cache of {tokens} tokens and {sequences} sequences needs {need / 1e9:.1f} GB on "
                f"{self.device}, which has less: lower runtime.cache_tokens or runtime.max_batch"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def fits(self, max_tokens: int) -> bool:
        """Whether a sequence of that many positions would be admitted now."""
        needed = self.paged.needs(max_tokens) if None in self.pools else 0
        return bool(self.free) and needed <= len(self.paged.free)

    def admit(self, max_tokens: int) -> int:
        """Reserve a sequence's pages; returns its handle.

        Raises:
            CacheFull: it does not fit now.
            UserError: it would not fit into an empty cache either.
        """
        assert max_tokens > 0
        if None in self.pools and self.paged.needs(max_tokens) > self.paged.pages:
            raise UserError(
                f"a sequence of {max_tokens} tokens can never fit a cache of {self.tokens}: "
                "raise runtime.cache_tokens, or lower max_new_tokens"
            )
        if not self.fits(max_tokens):
            raise CacheFull(f"{max_tokens} tokens, {len(self.paged.free)} pages and {len(self.free)} sequences free")
        sequence = self.free.pop()
        if None in self.pools:
            self.paged.admit(sequence, max_tokens)
        self.reserved[sequence] = max_tokens
        return sequence

    def release(self, sequence: int) -> None:
        """Give a sequence's pages and its handle back."""
        del self.reserved[sequence]
        if None in self.pools:
            self.paged.release(sequence)
        self.free.append(sequence)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, [J, R, D] each; attention reads and writes them at the plan's rows."""
        key_JRD, value_JRD = self.layers[index]
        return key_JRD, value_JRD

    @property
    def spare(self) -> int:
        """The handle of rows that only fill a batch up. It has rows of its own, is never admitted and never full."""
        return self.sequences

    def plan(self, step: Step | DecodeStep) -> dict[int | None, Plan]:
        """Where each window's layers read and write in this step: {window: plan}."""
        if isinstance(step, DecodeStep):
            token_B = torch.arange(len(step.token_B), device=self.device)
            return {
                window: Plan(window, Decode(token_B, step.position_B, step.sequence_B, pool, None), (), None)
                for window, pool in self.pools.items()
            }
        assert len(set(step.sequence_B)) == len(step.sequence_B), "a sequence stands in the step twice"
        spans = _spans(step)
        for begin, end, cached, sequence in spans:
            assert end > begin and cached + end - begin <= self.reserved[sequence], "more tokens than were reserved"
        singles = [(begin, cached, sequence) for begin, end, cached, sequence in spans if end - begin == 1]
        longer = [span for span in spans if span[1] - span[0] > 1]
        # A tensor each, not rows of one: kernels are compiled anew for addresses that 16 does not divide.
        columns = list(zip(*singles, strict=True)) or [(), (), ()]
        token_B, position_B, sequence_B = (to_device(column, torch.int64, self.device) for column in columns)
        cached_B = tuple(cached for _, cached, _ in singles)
        span_P4 = to_device(longer, torch.int32, self.device) if longer else None
        return {
            window: Plan(
                window,
                Decode(token_B, position_B, sequence_B, pool, cached_B) if singles else None,
                tuple(Prefill(*span, pool) for span in longer),
                span_P4,
            )
            for window, pool in self.pools.items()
        }
