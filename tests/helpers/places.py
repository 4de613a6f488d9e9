"""Places of several ranks that lie in one process, as symmetric memory would map them (epmoe/kernels/symmetric.py)."""

import torch

from epmoe.kernels.symmetric import MARKS, Place


def places(ranks: int, room: int, device: str = "cpu") -> list[Place]:
    """One place of so many bytes of rows, POISON throughout, as each of the ranks sees it."""
    byte_N = tuple(torch.full((MARKS + room,), 255, dtype=torch.uint8, device=device) for _ in range(ranks))
    address_N = torch.tensor([each.data_ptr() for each in byte_N], device=device)
    return [Place(rank, byte_N, address_N) for rank in range(ranks)]


def full(rows_TKH: torch.Tensor, ranks: int) -> tuple[torch.Tensor, Place]:
    """The rows in the place of rank 0, where all have come, and that place."""
    place = places(ranks, max(rows_TKH.nbytes, 16), str(rows_TKH.device))[0]
    place.mark_N.fill_(1)
    return place.rows(rows_TKH.shape, rows_TKH.dtype).copy_(rows_TKH), place
