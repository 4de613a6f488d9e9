"""What `LLM` gives back for a prompt: one answer, or n of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from epmoe.engine.request import PromptLogprobs, Request, Result, TokenLogprobs
from epmoe.text.harmony import Message
from epmoe.text.output import Answer


@dataclass(frozen=True)
class Choice:
    """One answer. Times are seconds since the request was added, so they include waiting for its turn."""

    index: int  # among the prompt's n answers
    text: str  # of all messages, a blank line between two; without special tokens, cut before a stop string
    messages: tuple[Message, ...]  # channel, recipient and content type tell analysis, answer and calls of tools apart
    ids: tuple[int, ...]  # new ids; the one that ended it included
    finish_reason: str  # "eos", "stop" (a stop string, or one of stop_token_ids) or "length"
    logprobs: tuple[TokenLogprobs, ...]  # one for each id when asked for, else empty
    seed: int  # with it as SamplingParams.seed this answer comes again; a greedy one has no use for it
    first_token_s: float
    total_s: float
    cached_tokens: int  # of the prompt, those that were in the cache and cost nothing
    prompt_logprobs: PromptLogprobs  # of the first answer when asked for, else empty

    @classmethod
    def of(cls, request: Request, result: Result, answer: Answer) -> "Choice":
        assert request.params.seed is not None, "settled"
        return cls(
            index=0 if request.choice is None else request.choice[1],
            text=answer.text,
            messages=answer.messages,
            ids=result.ids,
            finish_reason=answer.finish_reason,
            logprobs=result.logprobs,
            seed=request.params.seed,
            first_token_s=result.first_token_s,
            total_s=result.total_s,
            cached_tokens=result.cached_tokens,
            prompt_logprobs=tuple(result.prompt_logprobs),  # another replica's are read here
        )


@dataclass(frozen=True)
class Completion:
    """What came of a prompt: `outputs` has SamplingParams.n answers. The other names are the first one's."""

    prompt_ids: tuple[int, ...]
    outputs: tuple[Choice, ...]

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.outputs[0].messages

    @property
    def ids(self) -> tuple[int, ...]:
        return self.outputs[0].ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self.outputs[0].logprobs

    @property
    def seed(self) -> int:
        return self.outputs[0].seed

    @property
    def first_token_s(self) -> float:
        return self.outputs[0].first_token_s

    @property
    def total_s(self) -> float:
        return self.outputs[0].total_s

    @property
    def cached_tokens(self) -> int:
        return self.outputs[0].cached_tokens

    @property
    def prompt_logprobs(self) -> PromptLogprobs:
        """One for each of `prompt_ids`, given those before it: None for the first; empty if not asked for."""
        return self.outputs[0].prompt_logprobs


def completions(prompts: Sequence[Request], answers: Sequence[Choice]) -> list[Completion]:
    """By prompt; `answers` are those of `choices(prompts)`, in their order."""
    found, rest = [], iter(answers)
    for prompt in prompts:
        found.append(Completion(prompt.ids, tuple(next(rest) for _ in range(prompt.params.n))))
    return found
