"""Which row of a layer's keys and values holds a position: pages for full attention, a ring for a window.

Letters: B sequences · C positions.
"""

from collections.abc import Sequence

import torch

from epmoe.ranks.transfer import to_device


class PagedRows:
    """Rows of full-attention layers, in pages that the sequences hold."""

    def __init__(self, tokens: int, sequences: int, page: int, device: torch.device) -> None:
        self.page, self.pages, self.device = page, -(-tokens // page), device
        self.rows = (self.pages + 1) * page
        self.table = torch.zeros(sequences + 1, self.pages, dtype=torch.int32, device=device)
        self.table[sequences] = self.pages  # the spare sequence: all its positions share the last page

    def write(self, sequence: int, pages: Sequence[int]) -> None:
        """Make these the sequence's pages, in order of position, for all later work on the stream."""
        self.table[sequence, : len(pages)] = to_device(pages, torch.int32, self.table.device)

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
