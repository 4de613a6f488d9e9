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
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from epmoe.errors import UserError
from epmoe.transfer import to_device

# A decode step gathers the keys and values of several sequences at once, padded to the longest: at most this many
# positions a gather. 8 key/value heads of 64 in bf16 make it 1 GiB of keys and as much of values.
GATHER_POSITIONS = 2**20

# A step of so many tokens runs as two micro-batches, so that the rows of one travel between the ranks while the other
# computes. The products with the experts lose by it: where 8 of 32 are here, 8192 tokens take 812 µs at once and
# 2 · 443 in halves (README). The all-reduce of those tokens' rows takes 640 µs on 2 GPUs. For half as many tokens the
# loss is about the same and the gain half; for fewer there is little to win. The limit is an estimate by these figures.
# Whether a step is halved follows from its tokens alone, not from the ranks: a library's product of 4096 rows may give
# other bits than one of 8192, and slots promise the same bits on any number of ranks. So one rank, which gains nothing,
# halves as well: 2 · 1579 µs for 3043 where it has all 32 experts, 4 % of them.
HALVES_FROM = 4096

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

    def halves(self) -> tuple["Step", ...]:
        """This step as two, to be run one after the other in each layer, or itself where it is small (HALVES_FROM).

        Of a sequence that the cut divides, the second half finds the first's keys and values in the cache. Each half
        has as many `output_O` as the step; those in the other half become one of its own tokens, so that nobody has to
        look on the host which are whose.
        """
        tokens = len(self.token_T)
        cut = _middle(self.start_B1) if tokens >= HALVES_FROM else 0
        return (self._part(0, cut), self._part(cut, tokens)) if 0 < cut < tokens else (self,)

    def _part(self, begin: int, end: int) -> "Step":
        """Tokens begin : end."""
        kept = [
            (max(first, begin), min(last, end), cached + max(begin - first, 0), sequence)
            for first, last, cached, sequence in _spans(self)
            if first < end and last > begin
        ]
        return Step(
            # Own memory: kernels are compiled anew for addresses that 16 does not divide.
            token_T=self.token_T[begin:end].clone(),
            position_T=self.position_T[begin:end].clone(),
            start_B1=(*(first - begin for first, _, _, _ in kept), end - begin),
            cached_B=tuple(cached for _, _, cached, _ in kept),
            sequence_B=tuple(sequence for _, _, _, sequence in kept),
            output_O=(self.output_O - begin).clamp(0, end - begin - 1),
        )


@dataclass(frozen=True)
class DecodeStep:
    """One token for each of B rows; the logits of all rows are wanted, [B, V].

    Nothing of it is on the host and no size depends on its values, so the step fits a CUDA graph. Rows that fill a
    batch up have the sequence `Cache.spare`, any token and position 0; what comes of them means nothing.
    """

    token_B: torch.Tensor  # int64
    position_B: torch.Tensor  # int64, the token's; as many positions are cached before it
    sequence_B: torch.Tensor  # int64, the cache's handles
    part: tuple[int, int] | None = None  # first and last + 1 of the vocabulary's ids whose logits are wanted; None: all


@dataclass(frozen=True)
class Gather:
    """Some of a Decode's rows, spelled out. The last of the C rows attended to is the token's own."""

    token_B: torch.Tensor  # int64, the token's index in T
    row_B: torch.Tensor  # int64, the row of the token
    row_BC: torch.Tensor  # int64, ascending positions; the columns of positions below 0 repeat position 0 ...
    valid_BC: torch.Tensor  # bool ... and are False here: no row of another sequence is ever read


@dataclass(frozen=True)
class Decode:
    """Sequences that bring one token each. Its row is written, and then attended to like the cached ones."""

    token_B: torch.Tensor  # int64, the token's index in T
    position_B: torch.Tensor  # int64
    sequence_B: torch.Tensor  # int64
    pool: "PagedRows | RingRows"
    positions: tuple[int, ...] | None  # position_B on the host, if it is known there

    @cached_property
    def gathers(self) -> tuple[Gather, ...]:
        """The rows of neighbours together, up to GATHER_POSITIONS. Sizes come from the positions: may wait for them."""
        positions = self.position_B.tolist() if self.positions is None else self.positions
        columns_B = [self.pool.columns(position) for position in positions]
        return tuple(self._gather(slice(begin, end), max(columns_B[begin:end])) for begin, end in _groups(columns_B))

    def _gather(self, part: slice, columns: int) -> Gather:
        position_B1, sequence_B1 = self.position_B[part, None], self.sequence_B[part, None]
        position_BC = position_B1 + torch.arange(1 - columns, 1, device=position_B1.device)
        return Gather(
            self.token_B[part],
            self.pool.row(sequence_B1, position_B1).squeeze(1),
            self.pool.row(sequence_B1, position_BC.clamp(min=0)),
            position_BC >= 0,
        )


@dataclass(frozen=True)
class Prefill:
    """A sequence that brings several tokens: they attend to what is cached and to each other, and are written last."""

    begin: int  # its tokens are begin : end of T
    end: int
    cached: int
    sequence: int
    pool: "PagedRows | RingRows"

    @cached_property
    def past_C(self) -> torch.Tensor:
        """int64, rows of the cached positions that its first token attends to, ascending."""
        return self._rows(self.cached - self.pool.columns(self.cached) + 1, self.cached)

    @cached_property
    def row_R(self) -> torch.Tensor:
        """int64, rows of its last R tokens; a ring keeps no more than the window."""
        end = self.cached + self.end - self.begin
        return self._rows(max(self.cached, end - self.pool.columns(end - 1)), end)

    def _rows(self, begin: int, end: int) -> torch.Tensor:
        device = self.pool.device
        position_1C = torch.arange(begin, end, device=device)[None]
        return self.pool.row(torch.full((1, 1), self.sequence, device=device), position_1C)[0]


@dataclass(frozen=True)
class Plan:
    """Where the layers of one window read and write in one step."""

    window: int | None
    decode: Decode | None
    prefills: tuple[Prefill, ...]
    span_P4: torch.Tensor | None  # int32, the prefills' (begin, end, cached, sequence) on the device


class PagedRows:
    """Rows of full-attention layers: pages from a common stock, reserved when a sequence is admitted."""

    def __init__(self, tokens: int, sequences: int, page: int, device: torch.device) -> None:
        self.page, self.pages, self.device = page, -(-tokens // page), device
        self.rows = (self.pages + 1) * page
        self.free = list(range(self.pages))[::-1]
        self.held: dict[int, list[int]] = {}
        self.table = torch.zeros(sequences + 1, self.pages, dtype=torch.int32, device=device)
        self.table[sequences] = self.pages  # the spare sequence: all its positions share the last page

    def needs(self, max_tokens: int) -> int:
        return -(-max_tokens // self.page)

    def admit(self, sequence: int, max_tokens: int) -> None:
        held = [self.free.pop() for _ in range(self.needs(max_tokens))]
        self.held[sequence] = held
        self.table[sequence, : len(held)] = to_device(held, torch.int32, self.table.device)

    def release(self, sequence: int) -> None:
        self.free.extend(reversed(self.held.pop(sequence)))

    def columns(self, position: int) -> int:
        """How many positions a token attends to, its own included."""
        return position + 1

    def row(self, sequence_B1: torch.Tensor, position_BC: torch.Tensor) -> torch.Tensor:
        """int64 [B, C]: the row of each position; sequences as a column [B, 1]."""
        page_BC = self.table[sequence_B1, position_BC // self.page]
        return page_BC.long() * self.page + position_BC % self.page


class RingRows:
    """Rows of layers with a window: a ring a sequence, in which position p overwrites position p − ring."""

    def __init__(self, window: int, sequences: int, page: int, device: torch.device) -> None:
        self.window, self.ring, self.device = window, (-(-window // page) + 1) * page, device
        self.rows = (sequences + 1) * self.ring

    def columns(self, position: int) -> int:
        """How many positions a token attends to, its own included."""
        return min(position + 1, self.window)

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


def _spans(step: Step) -> list[Span]:
    return list(zip(step.start_B1[:-1], step.start_B1[1:], step.cached_B, step.sequence_B, strict=True))


def _middle(start_B1: Sequence[int]) -> int:
    """Where to cut a step: after half its tokens, or at the next multiple of 64 in a step that is not small.

    Where the cut would leave one token of a sequence by itself, it moves to that sequence's edge: attention has another
    kernel for single tokens, with other last bits.

    >>> [_middle(starts) for starts in [(0, 300), (0, 7), (0, 191, 300), (0, 193, 300), (0, 2)]]
    [192, 3, 191, 193, 0]
    """
    tokens = start_B1[-1]
    cut = -(-tokens // 128) * 64 if tokens >= 256 else tokens // 2
    for begin, end in pairwise(start_B1):
        if begin < cut < end and cut - begin == 1:
            return begin
        if begin < cut < end and end - cut == 1:
            return end
    return cut


def _groups(columns_B: list[int]) -> list[tuple[int, int]]:
    """(begin, end) of neighbouring sequences whose gathers stay below GATHER_POSITIONS together."""
    groups: list[tuple[int, int]] = []
    begin, widest = 0, 0
    for index, columns in enumerate(columns_B):
        widest = max(widest, columns)
        if index > begin and (index + 1 - begin) * widest > GATHER_POSITIONS:
            groups.append((begin, index))
            begin, widest = index, columns
    return [*groups, (begin, len(columns_B))]
