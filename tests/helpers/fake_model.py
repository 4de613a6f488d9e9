"""A model without weights for tests of the engine: logits are a hash of all tokens of the sequence so far.

It knows these tokens from the cache's rows alone, as attention does: a row that was given away too early, shared with
the wrong sequence or written twice is seen at once.
"""

import random
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from epmoe.batch import Step
from epmoe.cache.cache import CacheConfig
from epmoe.cache.pages import Pages
from epmoe.engine.request import Request, Result, SamplingParams
from epmoe.models.decoder import prefill_kinds
from epmoe.ranks.mesh import Ranks

VOCAB = 97
EOS = 96
SEQUENCES = 64


class FakeCache:
    """Pages as the real cache's. A row of each stock holds the tokens of its sequence up to its position."""

    def __init__(self, tokens: int = 10_000, sequences: int = SEQUENCES, page: int = 4, **more: Any) -> None:
        """`more` is of CacheConfig."""
        config = CacheConfig(more.pop("windows", (None, 6)), 1, 1, tokens, sequences, page, **more)
        most = tokens // page * page
        self.pages = Pages(config.pages, page, sequences, most=most, prefix_cache=config.prefix_cache)
        self.spare, self.nobody, self.device = sequences, -1, torch.device("cpu")
        self.table: dict[tuple[int, int, int], int] = {}  # the device's
        self.rows: list[dict[int, tuple[int, ...]]] = [{} for _ in self.pages.stocks]
        self.fed = 0  # tokens so far

    def write(self, leave: int = 0) -> tuple[tuple[()], tuple[()]]:
        self.table |= self.pages.told()
        return (), ()

    def grow(self, handle: int, begin: int, end: int) -> int:
        count = self.pages.grow(handle, begin, end)
        self.write()
        return count

    def release(self, handle: int) -> None:
        self.pages.release(handle)

    def seen(self, stock: int, handle: int, position: int) -> tuple[int, ...]:
        return self.rows[stock][self._row(stock, handle, position)]

    def feed(self, handle: int, tokens: list[int], positions: list[int]) -> list[int]:
        """Attend to what each token sees, and write it; all tokens so far."""
        begin, end = positions[0], positions[0] + len(tokens)
        assert positions == list(range(begin, end)) and self.pages.holds(handle, begin, end)
        history = self.seen(0, handle, begin - 1) if begin else ()
        assert len(history) == begin
        whole = (*history, *tokens)
        for index, stock in enumerate(self.pages.stocks):
            for position in range(0 if stock.window is None else max(0, begin + 1 - stock.window), begin):
                assert self.seen(index, handle, position) == whole[: position + 1], "another history's"
            for position in positions:
                row = self._row(index, handle, position)
                page = row // self.pages.size
                assert stock.users[page] == 1 and stock.keys[page] is None, "another writer, or a page that is found"
                self.rows[index][row] = whole[: position + 1]
        self.fed += len(tokens)
        return list(whole)

    def empty(self) -> bool:
        """Whether nobody holds anything, and every page is free or may be found."""
        pages = self.pages
        whole = all(sorted([*each.free, *each.passed, *each.idle]) == list(range(each.count)) for each in pages.stocks)
        unused = not any(any(each.users) for each in pages.stocks) and not pages.held and not pages.together
        return whole and unused and len(pages.free_handles) == pages.sequences

    def _row(self, stock: int, handle: int, position: int) -> int:
        size = self.pages.size
        return self.table[stock, handle, position // size] * size + position % size


@dataclass
class FakeConfig:
    vocab: int = VOCAB
    max_positions: int = 400


class FakeModel:
    """Logits are a hash of all tokens of the sequence so far, or of the last `memory` ones.

    Ranks with requests of their own meet in each step, as in a layer's experts: its sizes must be what all were told.
    """

    def __init__(self, memory: int | None = None, meets: Ranks | None = None, **config: int) -> None:
        self.config, self.memory, self.meets = FakeConfig(**config), memory, meets
        self.idle = 0  # steps of nobody's tokens alone
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
        runs = [(handle, len(list(run))) for handle, run in groupby(used)]  # of one with a draft several rows
        if self.meets:
            self._meet(step, self.meets)
            self.idle += not used
        assert (
            (used or self.meets)
            and len({handle for handle, _ in runs}) == len(runs)
            and (step.drafted or len(runs) == len(used))
        )
        last: dict[int, list[int]] = {}
        row = 0
        for handle, count in runs[: len(runs) - len(spans)]:
            whole = cache.feed(handle, tokens[row : row + count], positions[row : row + count])
            last |= {token: whole[: positions[token] + 1] for token in range(row, row + count)}
            row += count
        for spare in range(row, len(handles)):  # they stand last
            assert (tokens[spare], positions[spare], handles[spare]) == (0, 0, cache.spare) and not spans
            last[spare] = [0]
        at = len(handles)
        for begin, end, cached, handle in spans:
            assert at == begin < end and cached == positions[begin]
            whole = cache.feed(handle, tokens[begin:end], positions[begin:end])
            last |= {token: whole[: positions[token] + 1] for token in range(begin, end)}
            at = end
        assert at == len(tokens)
        self.outputs = [last[row] for row in (sorted(last) if step.output_O is None else step.output_O.tolist())]
        return torch.arange(len(self.outputs), dtype=torch.float32)[:, None]

    def _meet(self, step: Step, ranks: Ranks) -> None:
        tokens = len(step.token_T)
        sizes = tokens, tokens if step.output_O is None else len(step.output_O)
        found = ranks.gather([*sizes, step.beside is None])
        if step.beside is None:
            assert found == [[*sizes, 1]] * ranks.size
        else:
            assert found == [[*each, 0] for each in zip(*step.beside, strict=True)]

    def logits(self, norm_O1: torch.Tensor, part: tuple[int, int] | None) -> torch.Tensor:
        known = [self.outputs[int(number)] for number in norm_O1[:, 0]]
        logits_OV = torch.stack([logits_of(tokens[-self.memory :] if self.memory else tokens) for tokens in known])
        return logits_OV[:, slice(*part)] if part else logits_OV

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
