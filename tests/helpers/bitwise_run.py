"""One run whose every bit is compared: load, generate, and keep all logits. test_bitwise starts it on several ranks.

As a program (`python bitwise_run.py CHECKPOINT FILE`, also under torchrun) it writes rank 0's result to FILE.
"""

import hashlib
import random
import sys
from pathlib import Path
from typing import Any

import torch
from spawn import run_ranks

from epmoe.batch import Step
from epmoe.cache.cache import Cache
from epmoe.cache.fit import CacheSettings, fit_cache
from epmoe.engine.config import EngineConfig
from epmoe.engine.engine import Engine
from epmoe.engine.request import Request, SamplingParams
from epmoe.models.decoder import Decoder, Limits
from epmoe.ranks import mesh
from epmoe.weights.checkpoint import Checkpoint
from epmoe.weights.choices import DTYPES, Choices
from epmoe.weights.load import load

Run = tuple[list[tuple[int, ...]], torch.Tensor]  # new ids of each request, all logits


class Recorder:
    """A model that remembers the logits it gave, but those of rows that only fill up a batch."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.vocab_chunk = model, model.config, model.vocab_chunk
        self.distinct, self.sublayers = model.distinct, model.sublayers
        self.feature_layers: tuple[int, ...] = ()
        self.feature_TX: torch.Tensor | None = None
        self.made: list[torch.Tensor] = []
        self.real_O: torch.Tensor | None = None

    def hidden(self, step: Step, cache: Cache, /) -> torch.Tensor:
        self.real_O = step.sequence_B != cache.spare if step.output_O is None else None
        norm_OH: torch.Tensor = self.model.hidden(step, cache)
        return norm_OH

    def logits(self, norm_OH: torch.Tensor, part: tuple[int, int] | None, /) -> torch.Tensor:
        logits_OV: torch.Tensor = self.model.logits(norm_OH, None)
        real_O, self.real_O = self.real_O, None  # a head that is warmed up has no step before it
        self.made.append((logits_OV if real_O is None else logits_OV[real_O]).cpu().clone())
        return logits_OV[:, slice(*part)] if part else logits_OV


def requests(vocab: int) -> list[Request]:
    """Greedy, sampled; prompts of one token, within and beyond the window, a prefill chunk and YaRN's original 64."""
    rng, allowed = random.Random(8), tuple(range(250))
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 2},
        {"temperature": 1.5, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 3},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "logit_bias": {7: 2.0, 11: -100.0}},
        {"temperature": 1.0, "seed": 2**60, "presence_penalty": 0.7, "allowed_token_ids": allowed, "min_tokens": 4},
    ]
    lengths = [90, 1, 5, 23, 12, 3]
    return [
        Request(
            tuple(rng.randrange(vocab) for _ in range(length)),
            SamplingParams(max_new_tokens=10, ignore_eos=True, **kind),
        )
        for length, kind in zip(lengths, kinds, strict=True)
    ]


def run(mine: mesh.Ranks, checkpoint: str, options: dict[str, Any], limits: Limits | None = None) -> Run:
    """Each request's new ids, and all logits as they were made, [all outputs, V]; `options` are the loader's."""
    model, report = load(Checkpoint.open(checkpoint), mine, Choices(**options), progress=False)
    assert isinstance(model, Decoder)
    model.limits = limits or model.limits
    asked = requests(model.config.vocab)
    needs = [request.cached(model.config.max_positions) for request in asked]
    settings = CacheSettings(DTYPES[report.dtype], page=4, max_batch=4, kv_heads=model.own_kv_heads)
    cache = fit_cache(model.config, needs, mine, settings)
    recorder = Recorder(model)
    config = EngineConfig(prefill_chunk=16, max_batch=4)
    engine = Engine(recorder, cache, mine, config)
    engine.prepare_for(asked)
    recorder.made.clear()
    results = engine.generate(asked)
    return [result.ids for result in results], torch.cat(recorder.made)


def digest(found: Run) -> str:
    ids, logits = found
    return f"{ids} {tuple(logits.shape)} {hashlib.sha256(logits.numpy().tobytes()).hexdigest()}"


def runs(checkpoint: str, size: int, device: str = "cpu", timeout: float = 120, **options: str) -> Run:
    """Rank 0's run; all ranks must have the same."""
    first, *others = run_ranks(run, size, checkpoint, options, timeout=timeout, device=device)
    for other in others:
        assert other[0] == first[0] and torch.equal(other[1], first[1])
    return first


def assert_same(found: Run, expected: Run) -> None:
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1]), f"largest difference {(found[1] - expected[1]).abs().max()}"


if __name__ == "__main__":
    with mesh.start(device="cpu") as here:
        found = digest(run(here, sys.argv[1], {"combine": "slots"}))
        if here.is_main:
            Path(sys.argv[2]).write_text(found)
