"""Steps for the tests that drive attention or a model without an engine."""

from collections.abc import Sequence

import torch

from epmoe.batch import Step


def make_step(
    chunks: Sequence[tuple[int, Sequence[int], int]], *, every: bool = True, device: torch.device | str = "cpu"
) -> Step:
    """A step from (handle, new tokens, positions cached before) triples; logits of every token or of the last."""
    token: list[int] = []
    position: list[int] = []
    starts = [0]
    for _, ids, cached in chunks:
        token += ids
        position += range(cached, cached + len(ids))
        starts.append(len(token))
    rows = range(len(token)) if every else [end - 1 for end in starts[1:]]
    return Step(
        token_T=torch.tensor(token, dtype=torch.int64, device=device),
        position_T=torch.tensor(position, dtype=torch.int64, device=device),
        start_B1=tuple(starts),
        cached_B=tuple(cached for _, _, cached in chunks),
        sequence_B=tuple(sequence for sequence, _, _ in chunks),
        output_O=torch.tensor(list(rows), dtype=torch.int64, device=device),
    )
