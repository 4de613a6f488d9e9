"""The step that goes through a model: one ragged batch of new tokens, rows that decode and pieces of prompts.

    tokens   [ row 0 · row 1 · … | span 0: several tokens of a prompt | span 1 … | none's ]

Letters: T tokens of a step · B rows, a token of each of as many sequences · P spans, pieces of prompts, or sampling
parameters · O tokens whose logits are wanted · S handles of the cache · V vocabulary · K ids that a request lists, at
most · W words of 32 bits, a bit an id.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

Span = tuple[int, int, int, int]  # a piece of a prompt in a step: first token, last + 1, cached positions, sequence


class Beside(NamedTuple):
    """The steps that ranks run at once, each with requests of its own: numbers by expert rank."""

    tokens: tuple[int, ...]
    outputs: tuple[int, ...]  # tokens whose logits are wanted


@dataclass(frozen=True)
class Step:
    """One forward pass over T new tokens. A span's tokens stand together, in order of position.

    Where `spans` is None, the host knows sizes only: there may be fewer rows than B, some spans may be empty, and the
    last tokens may belong to nobody; then no size depends on a value, and the step fits a CUDA graph.
    """

    token_T: torch.Tensor  # int64
    position_T: torch.Tensor  # int64, from 0; positions before it are cached, or in the step
    sequence_B: torch.Tensor  # int64, handles of the rows, which are the first tokens; `Cache.spare` fills up
    rows_1: torch.Tensor | None = None  # int32, how many rows there are; None: B
    spans: tuple[Span, ...] | None = ()
    span_P4: torch.Tensor | None = None  # int32, the spans on the device; None: they are known on the host
    output_O: torch.Tensor | None = None  # int64, tokens whose logits are wanted; None: all
    drafted: bool = False  # several rows may be of one sequence, one position after the other
    beside: Beside | None = None  # this step and other ranks'; None: all ranks' have the sizes of this one

    def halves(self, least: int) -> tuple["Step", ...]:
        """This step as two, to be run one after the other in each layer, or itself where it has under `least` tokens.

        All rows are in the first half. Of a sequence that the cut divides, the second half finds the first's keys and
        values in the cache. Each half has as many `output_O` as the step; those in the other half become one of its
        own tokens, so that nobody has to look on the host which are whose.
        """
        tokens, rows = len(self.token_T), len(self.sequence_B)
        if tokens < least or not self.spans or self.output_O is None:
            return (self,)
        cut = max(_middle(tokens), rows)
        return (self._part(0, cut), self._part(cut, tokens)) if 0 < cut < tokens else (self,)

    def _part(self, begin: int, end: int) -> "Step":
        """Tokens begin : end."""
        assert self.output_O is not None and self.beside is None
        kept = tuple(
            (max(first, begin) - begin, min(last, end) - begin, cached + max(begin - first, 0), sequence)
            for first, last, cached, sequence in self.spans or ()
            if first < end and last > begin
        )
        return Step(
            # Own memory: kernels are compiled anew for addresses that 16 does not divide.
            token_T=self.token_T[begin:end].clone(),
            position_T=self.position_T[begin:end].clone(),
            sequence_B=self.sequence_B if begin == 0 else self.sequence_B[:0],
            spans=kept,
            output_O=(self.output_O - begin).clamp(0, end - begin - 1),
            drafted=self.drafted,
        )


class SequenceState(NamedTuple):
    """What the device knows of every sequence, by its handle in the cache; the last handle is the spare one."""

    token_S: torch.Tensor  # int64, its last token
    position_S: torch.Tensor  # int64, that token's position
    seen_SV: torch.Tensor | None  # bool, ids of prompt and output; kept where a sequence has a repetition penalty
    count_SV: torch.Tensor | None = None  # int32, how often the output has an id; kept where one has another penalty


class Drafted(NamedTuple):
    """Which outputs of a step count: those of a draft do if all before them have chosen what it says."""

    ahead_O: torch.Tensor  # int64, how many outputs before this one are of the same draft
    wanted_O: torch.Tensor  # int64, the id that this one must choose for the next one to count; -1: none follows


class SamplingTensors(NamedTuple):
    """How every sequence's tokens are chosen, by its handle."""

    value_SP: torch.Tensor  # float64: temperature, top-k, top-p, min-p, 1 / temperature (1 where that is 0)
    seed_S: torch.Tensor  # int64
    kind_S: torch.Tensor  # int32: a bit for each of KINDS that its logits need


KINDS = ("seen", "count", "listed", "allowed")  # bits of kind_S, the lowest first


class Listed(NamedTuple):
    """Some ids and what is added to their logits at positions before `until_SK`; where a list is shorter, 0 to id 0."""

    id_SK: torch.Tensor  # int64
    value_SK: torch.Tensor  # float32
    until_SK: torch.Tensor  # int64


@dataclass(frozen=True)
class Adjustments:
    """What is done to every sequence's logits (layers/adjust.py), by its handle. What nobody has needed is None."""

    penalty_S3: torch.Tensor  # float32: repetition, frequency, presence
    seen_SV: torch.Tensor | None = None  # bool, the ids of prompt and answer
    count_SV: torch.Tensor | None = None  # int32, how often the answer has an id
    listed: Listed | None = None
    allowed_SW: torch.Tensor | None = None  # int32, id 32 · w + b is bit b of word w

    def __getitem__(self, sequence_B: torch.Tensor) -> "Adjustments":
        """Those of some sequences."""
        listed = None if self.listed is None else Listed(*(each[sequence_B] for each in self.listed))
        others = (self.seen_SV, self.count_SV, self.allowed_SW)
        seen_BV, count_BV, allowed_BW = (None if each is None else each[sequence_B] for each in others)
        return Adjustments(self.penalty_S3[sequence_B], seen_BV, count_BV, listed, allowed_BW)


def _middle(tokens: int) -> int:
    """Where to cut a step: after half its tokens, or at the next multiple of 64 in a step that is not small.

    >>> [_middle(tokens) for tokens in [300, 7, 2]]
    [192, 3, 1]
    """
    return -(-tokens // 128) * 64 if tokens >= 256 else tokens // 2
