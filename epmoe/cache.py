"""Paged cache of keys and values, in which sliding-window layers keep only their window.

Letters: T tokens of a step · O of them whose logits are wanted · B sequences · C positions attended to · J key/value
heads · D head dimension · R rows of a pool (a row is the place of one position).

A pool serves all layers that have the same window, and turns (sequence, position) into a row:

    full attention    pages of `page` rows from a common stock, listed in table[sequence]:
                      row = table[sequence, position // page] · page + position % page
    window W          a ring of ⌈W/page⌉ + 1 pages a sequence:
                      row = sequence · ring + position % ring

so that a layer's cache is [J, R, D] keys and as many values, and attention only ever sees rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from epmoe.errors import UserError

# A decode step gathers the keys and values of several sequences at once, padded to the longest: at most this many
# positions a gather. 8 key/value heads of 64 in bf16 make it 1 GiB of keys and as much of values.
GATHER_POSITIONS = 2**20

Span = tuple[int, int, int, int]  # of one sequence in a step: begin, end, cached, sequence


class CacheFull(Exception):
    """The sequence does not fit now; it will when others were released."""


@dataclass(frozen=True)
class Step:
    """One forward pass over T new tokens of B sequences. A sequence's tokens stand together, in order of position."""

    token_T: torch.Tensor  # int64
    position_T: torch.Tensor  # int64, from 0
    start_B1: tuple[int, ...]  # tokens of sequence b are start[b] : start[b+1]
    cached_B: tuple[int, ...]  # positions that the cache already holds; the first new token has this position
    sequence_B: tuple[int, ...]  # the cache's handles
    output_O: torch.Tensor  # int64, rows of T whose logits are wanted


@dataclass(frozen=True)
class Decode:
    """Sequences that bring one token each. Its row is written first, and is the last of the C rows attended to."""

    token_B: torch.Tensor  # int64, the token's index in T
    row_B: torch.Tensor  # int64, the row of the token
    row_BC: torch.Tensor  # int64, ascending positions; the columns of positions below 0 repeat position 0 ...
    valid_BC: torch.Tensor  # bool ... and are False here: no row of another sequence is ever read


@dataclass(frozen=True)
class Prefill:
    """A sequence that brings several tokens: they attend to what is cached and to each other, and are written last."""

    begin: int  # its tokens are begin : end of T
    end: int
    past_C: torch.Tensor  # int64, rows of the cached positions that its first token attends to, ascending
    row_R: torch.Tensor  # int64, rows of its last R tokens; a ring keeps no more than the window


@dataclass(frozen=True)
class Plan:
    """Where the layers of one window read and write in one step."""

    window: int | None
    decodes: tuple[Decode, ...]
    prefills: tuple[Prefill, ...]


class PagedRows:
    """Rows of full-attention layers: pages from a common stock, reserved when a sequence is admitted."""

    def __init__(self, tokens: int, sequences: int, page: int, device: torch.device) -> None:
        self.page, self.pages = page, -(-tokens // page)
        self.rows = self.pages * page
        self.free = list(range(self.pages))[::-1]
        self.held: dict[int, list[int]] = {}
        self.table = torch.zeros(sequences, self.pages, dtype=torch.int32, device=device)

    def needs(self, max_tokens: int) -> int:
        return -(-max_tokens // self.page)

    def admit(self, sequence: int, max_tokens: int) -> None:
        held = [self.free.pop() for _ in range(self.needs(max_tokens))]
        self.held[sequence] = held
        self.table[sequence, : len(held)] = torch.tensor(held, dtype=torch.int32, device=self.table.device)

    def release(self, sequence: int) -> None:
        self.free.extend(reversed(self.held.pop(sequence)))

    def row(self, sequence_B1: torch.Tensor, position_BC: torch.Tensor) -> torch.Tensor:
        """int64 [B, C]: the row of each position; sequences as a column [B, 1]."""
        page_BC = self.table[sequence_B1, position_BC // self.page]
        return page_BC.long() * self.page + position_BC % self.page


class RingRows:
    """Rows of layers with a window: a ring a sequence, in which position p overwrites position p − ring."""

    def __init__(self, window: int, sequences: int, page: int) -> None:
        self.ring = (-(-window // page) + 1) * page
        self.rows = sequences * self.ring

    def row(self, sequence_B1: torch.Tensor, position_BC: torch.Tensor) -> torch.Tensor:
        """int64 [B, C]: the row of each position; sequences as a column [B, 1]."""
        return sequence_B1 * self.ring + position_BC % self.ring


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
            window: self.paged if window is None else RingRows(window, sequences, page) for window in self.windows
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

    def plan(self, step: Step) -> dict[int | None, Plan]:
        """Where each window's layers read and write in this step: {window: plan}."""
        assert len(set(step.sequence_B)) == len(step.sequence_B), "a sequence stands in the step twice"
        for begin, end, cached, sequence in _spans(step):
            assert end > begin and cached + end - begin <= self.reserved[sequence], "more tokens than were reserved"
        return {window: self._plan_window(step, window) for window in self.pools}

    def _plan_window(self, step: Step, window: int | None) -> Plan:
        spans = _spans(step)
        singles = [span for span in spans if span[1] - span[0] == 1]
        return Plan(
            window,
            tuple(self._decode(group, columns, window) for group, columns in _groups(singles, window)),
            tuple(self._prefill(*span, window) for span in spans if span[1] - span[0] > 1),
        )

    def _decode(self, spans: list[Span], columns: int, window: int | None) -> Decode:
        pool = self.pools[window]
        token_B, _, position_B, sequence_B = torch.tensor(spans, dtype=torch.int64).T.contiguous().to(self.device)
        position_B1, sequence_B1 = position_B[:, None], sequence_B[:, None]
        position_BC = position_B1 + torch.arange(1 - columns, 1, device=self.device)
        return Decode(
            token_B,
            pool.row(sequence_B1, position_B1).squeeze(1),
            pool.row(sequence_B1, position_BC.clamp(min=0)),
            position_BC >= 0,
        )

    def _prefill(self, begin: int, end: int, cached: int, sequence: int, window: int | None) -> Prefill:
        count = end - begin
        past, keep = (cached, count) if window is None else (min(cached, window - 1), min(count, window))
        position_C = torch.arange(cached - past, cached + count, device=self.device)
        sequence_11 = torch.full((1, 1), sequence, device=self.device)
        row_C = self.pools[window].row(sequence_11, position_C[None])[0]
        return Prefill(begin, end, row_C[:past], row_C[past + count - keep :])


def _spans(step: Step) -> list[Span]:
    return list(zip(step.start_B1[:-1], step.start_B1[1:], step.cached_B, step.sequence_B, strict=True))


def _groups(spans: list[Span], window: int | None) -> list[tuple[list[Span], int]]:
    """Neighbouring sequences whose gathers stay below GATHER_POSITIONS together, and the columns of each gather."""
    groups: list[tuple[list[Span], int]] = []
    group: list[Span] = []
    widest = 0
    for span in spans:
        columns = span[2] + 1 if window is None else min(span[2] + 1, window)
        if group and (len(group) + 1) * max(columns, widest) > GATHER_POSITIONS:
            groups.append((group, widest))
            group, widest = [], 0
        group.append(span)
        widest = max(columns, widest)
    return [*groups, (group, widest)] if group else groups
