"""Prompts for the embedded model, and all that a request may ask for, one kind for each."""

from typing import Any

LIST = "one cup, two cups, three cups; one cup, two cups, three cups; one cup, two"
PROMPTS = ["And the king said", LIST, "a b c d e f g a b c d e", LIST, "And it came to pass", LIST, "b", LIST]
KINDS: list[dict[str, Any]] = [
    {"logprobs": 2},
    {"temperature": 0.6, "seed": 5, "logprobs": 3, "prompt_logprobs": 1},
    {"temperature": 0.8, "top_p": 0.8, "top_k": 40, "seed": 6, "frequency_penalty": 0.4, "logprobs": 1},
    {"repetition_penalty": 1.05, "presence_penalty": 0.2, "logit_bias": {70: 3.0}},
    {"stop": ("e",), "logprobs": 1},
    {"grammar": "start: /([a-z]{2,7}, ){3,30}/", "logprobs": 2},
    {"min_tokens": 20, "allowed_token_ids": tuple(range(300, 330)), "temperature": 0.3, "seed": 9},
    {"grammar": "start: (<[72]> <[73]> <[300]> <[301-340]>){3,9}", "temperature": 0.9, "seed": 4},
]
