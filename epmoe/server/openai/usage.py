"""What is the same in all answers: usage, log-probabilities of tokens, why an answer ended."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from epmoe.engine.request import TokenLogprobs
from epmoe.text.stream import REPLACEMENT
from epmoe.text.tokenizer import Tokenizer

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}  # ours → OpenAI's


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Tokens, as they are billed elsewhere."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


@lru_cache(1 << 18)  # a vocabulary; log-probabilities name its likely ids again and again
def spelled(tokenizer: Tokenizer, id: int) -> str:
    """A token's text; one that is not whole characters has its id, so that no two are spelled alike."""
    text = tokenizer.decode([id])
    return f"token_id:{id}" if REPLACEMENT in text else text


def completion_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[TokenLogprobs | None], top: int, offset: int = 0
) -> dict[str, Any]:
    """The object of /v1/completions for some tokens, with the `top` likeliest of each; `offset`: characters before."""
    tokens, offsets, values, tops = [], [], [], []
    for id, each in zip(ids, found, strict=True):
        tokens.append(spelled(tokenizer, id))
        offsets.append(offset)
        offset += len(tokens[-1])
        values.append(None if each is None else each.chosen)
        listed = {} if each is None else {spelled(tokenizer, other): value for other, value in each.top[:top]}
        tops.append(None if each is None or not top else listed)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[TokenLogprobs], top: int) -> dict[str, Any]:
    """The object of /v1/chat/completions for some tokens."""
    content = [
        {**_entry(tokenizer, id, each.chosen), "top_logprobs": [_entry(tokenizer, *one) for one in each.top[:top]]}
        for id, each in zip(ids, found, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, id: int, value: float) -> dict[str, Any]:
    text = spelled(tokenizer, id)
    return {"token": text, "logprob": value, "bytes": list(text.encode())}
