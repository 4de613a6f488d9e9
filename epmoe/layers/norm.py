"""The residual stream between two sublayers: add what one owes, and normalise for the next.

A sublayer's output comes as K rows a token that are still to be added (owed.py): one from attention, a token's slots
from the experts. So their sum, the residual and the next norm are one pass over memory, and one kernel on a GPU:

    x[t] += round(((+0 + rows[t, 0]) + rows[t, 1]) + … + rows[t, K-1])        in float32, rounded as each step says
    norm(x)[t] = x[t] / rms(x[t]) · weight                                    in float32, rounded once

A row whose mean square is not finite has a norm of NaN: an infinite rms would make zeros of its finite numbers, and
nobody would learn that they overflowed.

The experts' router reads the norm next: for few tokens its product is made in the same kernel.

Letters: T tokens · K rows a token · H hidden · E outputs of a linear layer.
"""

import torch
from torch import nn

from epmoe import kernels
from epmoe.layers import linear as dense
from epmoe.layers.twin import twin


def add_rows(rows_TKH: torch.Tensor) -> torch.Tensor:
    """[T, K, H] → [T, H]: a token's rows, added in float32 in the order of k, rounded once.

    Starts from +0, so that a row of -0 gives +0, as it does after other ranks' zeros were added to it. `sum(1)` would
    leave the order to the library.
    """
    sum_TH = torch.zeros(rows_TKH.shape[0], rows_TKH.shape[2], dtype=torch.float32, device=rows_TKH.device)
    for row_TH in rows_TKH.unbind(1):
        sum_TH += row_TH
    return sum_TH.to(rows_TKH.dtype)


def add_norm(
    x_TH: torch.Tensor, rows_TKH: torch.Tensor | None, weight_H: torch.Tensor, eps: float, *, clear: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + add_rows(rows), the norm of that), both [T, H] in x's dtype; without rows x itself comes back.

    `clear` leaves zeros in the rows. For any device and dtype; epmoe/kernels/norm.py has the fast one.
    """
    if rows_TKH is not None:
        x_TH = x_TH + add_rows(rows_TKH)
        if clear:
            rows_TKH.zero_()
    wide_TH = x_TH.float()
    square_T1 = wide_TH.square().mean(-1, keepdim=True)
    wide_TH = wide_TH * torch.rsqrt(square_T1 + eps).masked_fill(~square_T1.isfinite(), torch.nan)
    return x_TH, (wide_TH * weight_H.float()).to(x_TH.dtype)


def add_norm_linear(
    x_TH: torch.Tensor, rows_TKH: torch.Tensor, weight_H: torch.Tensor, eps: float, linear: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `add_norm` gives, and a linear layer of the norm: [T, E] in x's dtype."""
    x_TH, norm_TH = add_norm(x_TH, rows_TKH, weight_H, eps)
    return x_TH, norm_TH, dense.linear(norm_TH, linear)


class AddNorm(nn.Module):
    """RMSNorm of the residual stream, after the rows that are still to be added to it."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps = eps

    def forward(
        self, x_TH: torch.Tensor, rows_TKH: torch.Tensor | None, *, clear: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(the residual stream with `rows` added, its norm), [T, H] each; `clear` leaves zeros in the rows."""
        return twin("norm", x_TH).add_norm(x_TH, rows_TKH, self.weight, self.eps, clear=clear)

    def with_linear(
        self, x_TH: torch.Tensor, rows_TKH: torch.Tensor, linear: nn.Linear
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `forward` gives, and `linear` of the norm."""
        if kernels.native(x_TH):
            return twin("norm", x_TH).add_norm_linear(x_TH, rows_TKH, self.weight, self.eps, linear)
        x_TH, norm_TH = self(x_TH, rows_TKH)
        return x_TH, norm_TH, twin("linear", x_TH).linear(norm_TH, linear)
