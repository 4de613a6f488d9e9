"""The two sides of the parity tests, driven alike: transformers' GptOssForCausalLM (the oracle) and our model.

Letters: P positions of a sequence (prompt and generated) · V vocabulary · B sequences.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loading import load_rank
from steps import make_step

from epmoe.cache.cache import Cache, CacheConfig
from epmoe.models.gpt_oss import GptOss
from epmoe.weights.checkpoint import Checkpoint

Trace = tuple[list[int], torch.Tensor]  # the greedy tokens, and the logits_PV of every position that was fed


def load_oracle(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """transformers' model, experts dequantised on load, plain attention and plain experts; every weight in `dtype`."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    quantised = "quantization_config" in Checkpoint.open(path).config
    extra: dict[str, Any] = {"quantization_config": Mxfp4Config(dequantize=True)} if quantised else {}
    if device != "cpu":
        extra["device_map"] = device
    model = GptOssForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager", **extra
    )
    for parameter in model.parameters():  # some releases dequantise into bf16, which holds every value exactly
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def load_ours(path: Path, device: str = "cpu", **names: Any) -> GptOss:
    """Our model on one rank, through the loader that everybody uses."""
    return load_rank(path, device=device, progress=False, **names)[0]


def sharpen(tensors: dict[str, torch.Tensor]) -> None:
    """Four times larger queries and keys (exact in bf16), so that attention looks at few tokens, as trained ones do.

    Synthetic weights alone attend almost evenly, and then hardly notice where a position's rotation went wrong.
    """
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            tensor.mul_(4)


@functools.cache
def trace_oracle(oracle: Any, prompt: tuple[int, ...], count: int) -> Trace:
    """The prompt in one pass, then `count` greedy tokens one by one through the oracle's own cache."""
    ids, cache = list(prompt), None
    rows: list[torch.Tensor] = []
    tokens: list[int] = []
    with torch.no_grad():
        while True:
            fed = torch.tensor([ids], device=oracle.device)
            out = oracle(fed, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0].float())
            if len(tokens) == count:
                return tokens, torch.cat(rows)
            tokens.append(int(rows[-1][-1].argmax()))
            ids = tokens[-1:]


def trace_ours(
    model: GptOss, prompts: Sequence[Sequence[int]], count: int, *, chunk: int, page: int = 4, singly: int = 0
) -> list[Trace]:
    """All prompts in the same steps: each brings `chunk` tokens of its prompt, or its next greedy token.

    The last `singly` tokens of a prompt are brought one by one, as if they had been generated.
    """
    config, weight = model.config, model.norm.weight
    cache = Cache(
        CacheConfig(
            config.windows,
            config.kv_heads,
            config.head_dim,
            tokens=sum(len(prompt) + count + page for prompt in prompts),
            sequences=len(prompts),
            page=page,
            dtype=model.embedding.weight.dtype,
        ),
        weight.device,
    )
    handles = [cache.admit(len(prompt) + count) for prompt in prompts]
    fed = [0] * len(prompts)
    ids = [list(prompt) for prompt in prompts]
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    while True:
        busy = [b for b in range(len(prompts)) if fed[b] < len(ids[b])]
        if not busy:
            break
        ends = [fed[b] + max(1, min(chunk, len(prompts[b]) - singly - fed[b])) for b in busy]
        chunks = [(handles[b], ids[b][fed[b] : end], fed[b]) for b, end in zip(busy, ends, strict=True)]
        logits = model(make_step(chunks, device=weight.device), cache)
        for b, (_, new, _), own_PV in zip(busy, chunks, logits.split([len(new) for _, new, _ in chunks]), strict=True):
            rows[b].append(own_PV)
            fed[b] += len(new)
            if fed[b] == len(ids[b]) < len(prompts[b]) + count:
                ids[b].append(int(own_PV[-1].argmax()))
    return [(own[len(prompt) :], torch.cat(r)) for own, prompt, r in zip(ids, prompts, rows, strict=True)]


@dataclass(frozen=True)
class Parity:
    """How far two traces of the same prompts are apart; errors are relative to the RMS of the expected logits."""

    equal_tokens: int  # before the first difference
    tokens: int
    max_error: float
    rms_error: float

    def failures(self, max_bound: float, rms_bound: float) -> list[str]:
        """What is out of bounds; empty for parity."""
        found = []
        if self.equal_tokens < self.tokens:
            found.append(f"token {self.equal_tokens} of {self.tokens} differs")
        if not self.max_error <= max_bound:
            found.append(f"maximum error {self.max_error:.2e} > {max_bound:.0e}")
        if not self.rms_error <= rms_bound:
            found.append(f"RMS error {self.rms_error:.2e} > {rms_bound:.0e}")
        return found


def compare(ours: Sequence[Trace], expected: Sequence[Trace]) -> Parity:
    """Logits are compared up to the first token that differs: from there on the two were fed different text."""
    equal, total, errors, values = 0, 0, [], []
    for (got_ids, got_PV), (ids, logits_PV) in zip(ours, expected, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(got_ids, ids, strict=True)) if a != b), len(ids))
        if same < len(ids) and equal == total:
            equal += same
        elif equal == total:
            equal += len(ids)
        total += len(ids)
        rows = len(logits_PV) - (len(ids) - same)
        errors.append((got_PV[:rows].double() - logits_PV[:rows].double()).flatten())
        values.append(logits_PV[:rows].double().flatten())
    error, scale = torch.cat(errors), torch.cat(values).square().mean().sqrt()
    return Parity(equal, total, float(error.abs().max() / scale), float(error.square().mean().sqrt() / scale))
