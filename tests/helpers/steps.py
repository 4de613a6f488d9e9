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
    spans = []
    for handle, ids, cached in chunks:
        spans.append((len(token), len(token) + len(ids), cached, handle))
        token += ids
        position += range(cached, cached + len(ids))
    rows = range(len(token)) if every else [end - 1 for _, end, _, _ in spans]
    return Step(
        token_T=torch.tensor(token, dtype=torch.int64, device=device),
        position_T=torch.tensor(position, dtype=torch.int64, device=device),
        sequence_B=torch.empty(0, dtype=torch.int64, device=device),
        spans=tuple(spans),
        output_O=torch.tensor(list(rows), dtype=torch.int64, device=device),
    )
