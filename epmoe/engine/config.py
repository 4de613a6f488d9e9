"""How an engine runs: what the configuration says, and what stands for `auto` and 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from llguidance import LLTokenizer

from epmoe.config.schema import Runtime
from epmoe.engine.drafts import Costs
from epmoe.models import DraftModel
from epmoe.ranks.mesh import Ranks


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs; the same on every rank.

    `eos_ids` end a text, unless a request ignores them. `prefill_chunk` is the most prompt tokens of a step, of all
    sequences together, 0 what `resolve_chunk` says; `max_batch` the most sequences at a time. With `graphs` steps are
    CUDA graphs; the tokens are the same without. `timeout_s` is how long the host waits for a step. With
    `progress` standard error shows what is prepared. Logits of prompts' tokens, where their log-probabilities are asked
    for, are made of `score_rows` rows at a time, at most: with 201,088 ids 0.8 MB each, and several times that to sort.
    `vocabulary` makes what grammars must know of the ids; without it there are none. With `drafts` answers are drafted
    (drafts.py) where it is worth it by these costs, by `draft_model` too, where there is one. `attention` is
    mesh.attention: with "data" each rank has requests of its own, and `max_batch` of them.
    """

    eos_ids: Sequence[int] = ()
    prefill_chunk: int = 0
    max_batch: int = 64
    graphs: bool = False
    timeout_s: float = 60.0
    progress: bool = False
    score_rows: int = 64
    vocabulary: Callable[[], LLTokenizer] | None = None
    drafts: Costs | None = None
    draft_model: DraftModel | None = None
    attention: str = "replicate"

    @classmethod
    def of(cls, run: Runtime, device: torch.device) -> "EngineConfig":
        """What the configuration's group `runtime` says."""
        chunk = resolve_chunk(run.prefill_chunk, device)
        return cls(prefill_chunk=chunk, max_batch=run.max_batch, timeout_s=run.timeout_s, progress=run.progress)


def resolve_chunk(wanted: int, device: torch.device) -> int:
    """runtime.prefill_chunk; 0 is 16384 tokens on an accelerator, 2048 on a CPU.

    A product with the experts is the more efficient the more rows each expert has: 8192 tokens of 4 out of 32 experts
    are 1024 rows, of 128 experts 256. Several ranks run a step in halves (`Step.halves`), hence twice as many. What a
    step holds beyond the weights grows with the chunk: for 16384 tokens of gpt-oss in bf16 on one rank twice the slot
    rows y [T, K, H], once its h [T·K, I] and gathered x, 0.38 GB each, and x, its norm, q, k and v 0.1 to 0.2 GB each.
    """
    return wanted or (2048 if device.type == "cpu" else 16384)


class Shape(Protocol):
    """What speculation needs to know of a model's configuration."""

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...


def resolve_drafts(wanted: str, model: Shape, ranks: Ranks, *, trained: bool = False) -> Costs | None:
    """What `speculate` stands for; `auto` drafts with a `trained` head, and on an accelerator, where several rows take
    little more than one."""
    if wanted == "off" or (wanted == "auto" and ranks.device.type == "cpu" and not trained):
        return None
    return Costs.of(model.num_experts, model.top_k, ranks.expert_size)
