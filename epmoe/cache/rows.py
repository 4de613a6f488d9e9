"""Which row of a layer's keys and values holds a position: pages of a stock, listed for each sequence in a table.

Letters: B sequences · C positions.
"""

import torch


class PagedRows:
    """Rows of the layers that see `window` positions (None: all), in pages that the sequences hold.

    Args:
        pages: of the stock; one more, the last, is the spare sequence's.
        table_SX: int32 [sequences + 1, pages of a sequence at most]; the spare sequence is the last one.
    """

    def __init__(self, window: int | None, pages: int, page: int, table_SX: torch.Tensor) -> None:
        self.window, self.pages, self.page, self.table = window, pages, page, table_SX
        self.rows, self.device = (pages + 1) * page, table_SX.device
        self.table[-1] = pages  # all positions of the spare sequence share the last page

    @property
    def positions(self) -> int:
        """Of a sequence, at most."""
        return self.table.shape[1] * self.page

    def columns(self, position: int) -> int:
        """How many positions a token attends to, its own included."""
        return position + 1 if self.window is None else min(position + 1, self.window)

    def row(self, sequence_B1: torch.Tensor, position_BC: torch.Tensor) -> torch.Tensor:
        """int64 [B, C]: the row of each position; sequences as a column [B, 1]."""
        page_BC = self.table[sequence_B1, position_BC // self.page]
        return page_BC.long() * self.page + position_BC % self.page
