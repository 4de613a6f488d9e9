"""Requests over HTTP of all kinds, what `LLM.generate` says to each, and what a server has said to them.

asked(number) ─▶ Asked ─┬─▶ known(llm, …)      ids, text, reason and log-probabilities of each answer
                        └─▶ body ─▶ server ─▶ told(…)      the same, out of an object or a stream
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wire import Answer

from epmoe import LLM, SamplingParams
from epmoe.text.completion import Completion
from epmoe.text.grammar import Body, answer, of_choice, of_lark, of_regex, of_schema

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
PREFIX = "It was a fine morning, and the king said to his men: "
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2, 3]}}, "required": ["a"], "additionalProperties": False}
GRAMMARS: tuple[tuple[str, Any], ...] = (
    ("regex", "[a-z ]{3,20}[.!]"),
    ("choice", ["yes", "no", "the king"]),
    ("grammar", "start: /([A-Z][a-z]+, ){1,4}/"),
    ("json", SCHEMA),
)
MAKERS: dict[str, Callable[[Any], Body]] = {
    "regex": of_regex,
    "choice": of_choice,
    "grammar": of_lark,
    "json": of_schema,
}

# Of one answer: its ids (None where a response does not say them, and so their number alone counts), text, reason, and
# the log-probabilities of its tokens, where they are asked for.
Told = tuple[tuple[int, ...] | None, int, str, str, tuple[float, ...]]


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    text: str  # the prompt, or the last message
    params: Mapping[str, Any]  # by the names that both HTTP and SamplingParams have
    grammar: tuple[str, Any] | None = None
    logprobs: int = 0
    stream: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": "It was"}, {"role": "user", "content": self.text}]

    @property
    def body(self) -> dict[str, Any]:
        """What HTTP is told."""
        own = {**self.params, "stream": self.stream}
        if self.grammar is not None:
            own["structured_outputs"] = {self.grammar[0]: self.grammar[1]}
        if self.path == COMPLETIONS:
            own |= {"prompt": self.text, "return_token_ids": True}
            return own | ({"logprobs": self.logprobs} if self.logprobs else {})
        if self.path == CHAT:
            own |= {"messages": self.messages, "return_token_ids": True}
            return own | ({"logprobs": True, "top_logprobs": self.logprobs} if self.logprobs else {})
        if self.logprobs:
            own |= {"include": ["message.output_text.logprobs"], "top_logprobs": self.logprobs}
        return own | {"input": self.text, "instructions": "It was", "max_output_tokens": own.pop("max_tokens")}


def asked(number: int) -> Asked:
    """The request of that number: mixed paths, lengths, ways to choose tokens, ends; many begin alike."""
    rng = random.Random(f"asked {number}")
    path = rng.choice((COMPLETIONS, COMPLETIONS, CHAT, CHAT, RESPONSES))
    text = PREFIX[: rng.choice((5, 30, len(PREFIX)))] + rng.choice(("", "we", "let us go", "no"))
    params: dict[str, Any] = {"max_tokens": rng.choice((1, 4, 9, 20, 40)), "temperature": rng.choice((0.0, 1.0, 0.7))}
    if params["temperature"]:
        params["seed"] = rng.randrange(10**6)
        if path != RESPONSES and rng.random() < 0.3:
            params["n"] = rng.choice((2, 3))
    more = {
        "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.2, "frequency_penalty": 0.6,
        "presence_penalty": 0.4, "logit_bias": {"70": 4.0, "66": -100.0}, "stop": ["e", "th"], "ignore_eos": True,
        "stop_token_ids": [70, 71],
    }  # fmt: skip
    params |= {name: more[name] for name in rng.sample(sorted(more), rng.choice((0, 0, 1, 2, 3)))}
    grammar = rng.choice(GRAMMARS) if rng.random() < 0.15 else None
    if grammar is None and rng.random() < 0.2:
        params |= rng.choice(({"min_tokens": 1}, {"allowed_token_ids": list(range(3, 1500))}))
    return Asked(path, text, params, grammar, rng.choice((0, 0, 0, 2)), stream=rng.random() < 0.5)


def known(llm: LLM, many: Sequence[Asked]) -> list[list[Told]]:
    """What `LLM.generate` says to these, in one call."""
    prompts: list[Any] = [one.text if one.path == COMPLETIONS else {"messages": one.messages} for one in many]
    params = [_params(llm, one, prompt) for one, prompt in zip(many, prompts, strict=True)]
    return [_known(*each) for each in zip(many, llm.generate(prompts, params), strict=True)]


def _params(llm: LLM, one: Asked, prompt: Any) -> SamplingParams:
    own = dict(one.params)
    if "logit_bias" in own:
        own["logit_bias"] = {int(id): value for id, value in own["logit_bias"].items()}
    params = SamplingParams(**own, logprobs=max(1, one.logprobs) if one.logprobs else 0)
    if one.grammar is None:
        return params
    body = MAKERS[one.grammar[0]](one.grammar[1])
    return replace(params, grammar=answer(llm.tokenizer, llm.request(prompt, params).ids, body, (), "auto"))


def _known(one: Asked, found: Completion) -> list[Told]:
    return [
        (
            None if one.path == RESPONSES else each.ids,
            len(each.ids),
            each.text,
            "length" if each.finish_reason == "length" else "stop",
            tuple(token.chosen for token in each.logprobs) if one.logprobs else (),
        )
        for each in found.outputs
    ]


def told(one: Asked, answer: Answer) -> list[Told]:
    """What a server has said, whole."""
    assert answer.status == 200 and answer.whole, (answer.status, answer.whole, answer.body[:500])
    if one.path == RESPONSES:
        return [_response(answer.events[-1]["response"] if one.stream else answer.value)]
    if not one.stream:
        return [_choice(one, [each]) for each in answer.value["choices"]]
    *chunks, last = answer.events
    assert last == "[DONE]", chunks
    pieces = [each for chunk in chunks for each in chunk["choices"]]
    return [_choice(one, [each for each in pieces if each["index"] == index]) for index in range(_count(one))]


def _count(one: Asked) -> int:
    count: int = one.params.get("n", 1)
    return count


def _choice(one: Asked, pieces: Sequence[Mapping[str, Any]]) -> Told:
    """An answer out of its pieces, or the one."""
    ids = tuple(id for each in pieces for id in each.get("token_ids", ()))
    scores = [each["logprobs"] for each in pieces if each.get("logprobs")]
    if one.path == COMPLETIONS:
        text = "".join(each["text"] for each in pieces)
        values = tuple(value for each in scores for value in each["token_logprobs"])
    else:
        text = "".join(each.get("message", each.get("delta"))["content"] or "" for each in pieces if _speaks(each))
        values = tuple(token["logprob"] for each in scores for token in each["content"])
    ends = [each["finish_reason"] for each in pieces if each["finish_reason"]]
    assert len(ends) == 1, "an answer ends once"
    return ids, len(ids), text, ends[0], values


def _speaks(piece: Mapping[str, Any]) -> bool:
    return "content" in piece.get("message", piece.get("delta", {}))


def _response(said: Mapping[str, Any]) -> Told:
    texts = [part for item in said["output"] if item["type"] == "message" for part in item["content"]]
    reason = {"completed": "stop", "incomplete": "length"}[said["status"]]
    values = tuple(token["logprob"] for part in texts for token in part["logprobs"])
    return None, said["usage"]["output_tokens"], "".join(part["text"] for part in texts), reason, values
