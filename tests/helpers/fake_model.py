"""A model without weights for tests of the engine: logits are a hash of all tokens of the sequence so far."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from epmoe.batch import Step
from epmoe.cache.pages import Pages
from epmoe.engine.request import Request, Result, SamplingParams
from epmoe.models.decoder import prefill_kinds

VOCAB = 97
EOS = 96
SEQUENCES = 64


class FakeCache:
    """Pages of `page` positions, as the real cache's; holds the tokens that the model was fed."""

    def __init__(self, tokens: int = 10_000, sequences: int = SEQUENCES, page: int = 4) -> None:
        self.pages, self.spare = Pages(tokens // page, page, sequences), sequences
        self.fed: dict[int, list[int]] = {}
        self.device = torch.device("cpu")

    def write(self, handle: int) -> None:
        self.fed[handle] = []

    def admit(self, tokens: int) -> int:
        handle = self.pages.admit(tokens)
        self.write(handle)
        return handle

    def release(self, handle: int) -> None:
        self.pages.release(handle)


@dataclass
class FakeConfig:
    vocab: int = VOCAB
    max_positions: int = 400


class FakeModel:
    """Logits are a hash of all tokens of the sequence so far."""

    def __init__(self, **config: int) -> None:
        self.config = FakeConfig(**config)
        self.vocab_chunk = 10  # so that several ranks share the vocabulary
        self.steps: list[Step] = []
        self.outputs: list[list[int]] = []  # tokens so far of each output of the last step

    def sublayers(self) -> list[tuple[str, Any]]:
        return []

    def distinct(self, tokens: int, prompts: int) -> set[tuple[int, int]]:
        return prefill_kinds(tokens, prompts, halves_from=4096)

    def hidden(self, step: Step, cache: Any) -> torch.Tensor:
        """The number of each output, [O, 1]."""
        self.steps.append(step)
        tokens, positions, handles = step.token_T.tolist(), step.position_T.tolist(), step.sequence_B.tolist()
        spans = step.spans or ()
        used = [handle for handle in handles if handle != cache.spare] + [sequence for *_, sequence in spans]
        assert used and len(set(used)) == len(used)
        last: dict[int, list[int]] = {}
        for row, handle in enumerate(handles):
            if handle == cache.spare:  # spare rows stand last
                assert (tokens[row], positions[row]) == (0, 0) and set(handles[row:]) == {cache.spare} and not spans
                last[row] = [0]
            else:
                last[row] = self.feed(cache, handle, tokens[row : row + 1], positions[row : row + 1])
        at = len(handles)
        for begin, end, cached, handle in spans:
            assert at == begin < end and cached == len(cache.fed[handle])
            last[end - 1] = self.feed(cache, handle, tokens[begin:end], positions[begin:end])
            at = end
        assert at == len(tokens)
        self.outputs = [last[row] for row in (sorted(last) if step.output_O is None else step.output_O.tolist())]
        return torch.arange(len(self.outputs), dtype=torch.float32)[:, None]

    def logits(self, norm_O1: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
        logits_OV = torch.stack([logits_of(self.outputs[int(number)]) for number in norm_O1[:, 0]])
        return logits_OV[:, slice(*part)] if part else logits_OV

    def feed(self, cache: Any, handle: int, tokens: list[int], positions: list[int]) -> list[int]:
        fed: list[int] = cache.fed[handle]
        assert positions == list(range(len(fed), len(fed) + len(tokens)))
        fed += tokens
        assert len(fed) <= cache.pages.reserved[handle]
        return list(fed)

    def prefills(self) -> list[Step]:
        return [step for step in self.steps if step.spans]

    def batches(self) -> list[int]:
        """Rows of each step that belong to a sequence; the fake cache's spare handle is the highest."""
        found = [step.sequence_B.tolist() for step in self.steps]
        return [sum(handle < SEQUENCES for handle in handles) for handles in found if handles]


def logits_of(tokens: list[int]) -> torch.Tensor:
    """A function of the whole sequence."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**40)
    logits_V = torch.randn(VOCAB, generator=generator) * 4
    logits_V[EOS] += 3  # so that some sequences end early
    return logits_V


def expected(request: Request, max_positions: int = 400) -> tuple[tuple[int, ...], str]:
    """The same by hand, for greedy requests: one token after the other."""
    ids = list(request.ids)
    for _ in range(request.params.max_new_tokens or 0):
        ids.append(int(logits_of(ids).argmax()))
        if ids[-1] == EOS and not request.params.ignore_eos:
            return tuple(ids[len(request.ids) :]), "eos"
        if len(ids) == max_positions:
            break
    return tuple(ids[len(request.ids) :]), "length"


def some_requests(count: int, seed: int = 0, **params: float) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(VOCAB - 1) for _ in range(rng.choice([1, 2, 5, 17, 40]))),
            SamplingParams(max_new_tokens=rng.choice([1, 3, 20]), seed=rng.randrange(1000), **params),  # type: ignore[arg-type]
        )
        for _ in range(count)
    ]


def outputs(results: list[Result]) -> list[tuple[tuple[int, ...], str]]:
    return [(result.ids, result.finish_reason) for result in results]
