"""Which keys must be the same on every rank: all that shape the result or a collective, so all but those named here."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from epmoe.config.keys import keys_of

# Keys that a rank may have for itself, and why.
OWN: Mapping[str, str] = {
    "checkpoint": "a path; what lies there is compared",
    "runtime.timeout_s": "bounds a wait",
    "runtime.start_timeout_s": "bounds a wait",
    "runtime.progress": "for the eye",
    "runtime.profile": "a path, written by each rank for itself",
    # Rank 0 alone makes requests, and sends them with all that they ask for. What other ranks of an `LLM` would have
    # asked for is compared at each call.
    "max_new_tokens": "rank 0's",
    "system": "rank 0's",
    "chat": "rank 0's",
    "reasoning_effort": "rank 0's",
    "tools": "rank 0's, a path",
    "template": "rank 0's",
    "prompt": "rank 0's",
    "prompts": "rank 0's, a path",
    "output": "rank 0's, a path",
    "resume": "rank 0's, which alone reads what is there",
    "base_url": "a conversation's, which one process has",
    "model": "a conversation's",
    "serve.queue_requests": "rank 0's, to which requests come",
    "serve.queue_tokens": "rank 0's",
    "serve.host": "rank 0's, which alone listens",
    "serve.port": "rank 0's",
    "serve.model": "rank 0's",
    "serve.api_key_file": "rank 0's, a path",
    "serve.drain_s": "rank 0's, which says when all are to end",
    "serve.responses": "rank 0's",
    "serve.max_body": "rank 0's",
    "serve.max_bodies": "rank 0's",
    "serve.header_s": "rank 0's",
    "serve.stalled_s": "rank 0's",
    "serve.log": "rank 0's, a path",
    "sampling.temperature": "rank 0's",
    "sampling.top_k": "rank 0's",
    "sampling.top_p": "rank 0's",
    "sampling.min_p": "rank 0's",
    "sampling.repetition_penalty": "rank 0's",
    "sampling.frequency_penalty": "rank 0's",
    "sampling.presence_penalty": "rank 0's",
    "sampling.logit_bias": "rank 0's",
    "sampling.allowed_token_ids": "rank 0's",
    "sampling.min_tokens": "rank 0's",
    "sampling.grammar": "rank 0's",
    "sampling.seed": "rank 0's",
    "sampling.n": "rank 0's",
    "sampling.logprobs": "rank 0's",
    "sampling.prompt_logprobs": "rank 0's",
    "sampling.stop": "rank 0's",
    "sampling.stop_token_ids": "rank 0's",
    "sampling.ignore_eos": "rank 0's",
}


def agreed(config: Any) -> Mapping[str, str]:
    """The keys of `config`, a schema's instance, on which ranks must agree: full name → value, spelled as a word."""
    keys = keys_of(type(config)).items()
    return {name: each.spelled(attrgetter(name)(config)) for name, each in keys if name not in OWN}
