"""The steps that go through a model: a ragged batch of new tokens, or one token of each of a batch's sequences.

Letters: T tokens of a step · B sequences · O tokens whose logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Span = tuple[int, int, int, int]  # of one sequence in a step: begin, end, cached, sequence


@dataclass(frozen=True)
class Step:
    """One forward pass over T new tokens of B sequences. A sequence's tokens stand together, in order of position."""

    token_T: torch.Tensor  # int64
    position_T: torch.Tensor  # int64, from 0
    start_B1: tuple[int, ...]  # tokens of sequence b are start[b] : start[b+1]
    cached_B: tuple[int, ...]  # positions that the cache already holds; the first new token has this position
    sequence_B: tuple[int, ...]  # the cache's handles
    output_O: torch.Tensor  # int64, rows of T whose logits are wanted

    @property
    def part(self) -> None:
        """All of the vocabulary."""
        return None

    def halves(self, least: int) -> tuple["Step", ...]:
        """This step as two, to be run one after the other in each layer, or itself where it has under `least` tokens.

        Of a sequence that the cut divides, the second half finds the first's keys and values in the cache. Each half
        has as many `output_O` as the step; those in the other half become one of its own tokens, so that nobody has to
        look on the host which are whose.
        """
        tokens = len(self.token_T)
        cut = _middle(self.start_B1) if tokens >= least else 0
        return (self._part(0, cut), self._part(cut, tokens)) if 0 < cut < tokens else (self,)

    def _part(self, begin: int, end: int) -> "Step":
        """Tokens begin : end."""
        kept = [
            (max(first, begin), min(last, end), cached + max(begin - first, 0), sequence)
            for first, last, cached, sequence in spans(self)
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

    def halves(self, least: int) -> tuple["DecodeStep"]:
        """This step itself, however large."""
        return (self,)


class SequenceState(NamedTuple):
    """What the device knows of every sequence, by its handle in the cache; the last handle is the spare one."""

    token_S: torch.Tensor  # int64, its last token
    position_S: torch.Tensor  # int64, that token's position
    seen_SV: torch.Tensor | None  # bool, ids of prompt and output; kept where a sequence has a penalty


def spans(step: Step) -> list[Span]:
    return list(zip(step.start_B1[:-1], step.start_B1[1:], step.cached_B, step.sequence_B, strict=True))


def _middle(start_B1: Sequence[int]) -> int:
    """Where to cut a step: after half its tokens, or at the next multiple of 64 in a step that is not small.

    >>> [_middle(starts) for starts in [(0, 300), (0, 7), (0, 2)]]
    [192, 3, 1]
    """
    tokens = start_B1[-1]
    return -(-tokens // 128) * 64 if tokens >= 256 else tokens // 2
