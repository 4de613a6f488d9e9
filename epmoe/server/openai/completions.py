"""/v1/completions: text, ids or lists of them, as they are, without the chat template."""

from collections.abc import Sequence
from typing import Any, ClassVar

from epmoe.engine.call import Call
from epmoe.engine.request import Request
from epmoe.server.errors import ApiError
from epmoe.server.front import Front
from epmoe.server.openai.fields import Sampled
from epmoe.server.openai.structured import Structure, form
from epmoe.server.openai.usage import REASONS, completion_logprobs
from epmoe.text.asked import PromptLike
from epmoe.text.completion import Choice
from epmoe.text.delivery import Delivery, Piece

MOST_SCORES = 4_000_000  # log-probabilities of prompts in a request
SHORT = 16  # OpenAI's length of an answer for which nobody says one


class CompletionRequest(Sampled, kw_only=True):
    """A request's body."""

    prompt: Any = None
    echo: bool = False
    logprobs: int | None = None
    response_format: dict[str, Any] | None = None


class Completions:
    """What /v1/completions makes of an answer."""

    prefix: ClassVar = "cmpl-"
    whole: ClassVar = "text_completion"
    part: ClassVar = "text_completion"

    def __init__(self, front: Front, asked: CompletionRequest) -> None:
        self.front, self.asked, self.echo = front, asked, asked.echo
        self.prompts, self.form = listed(asked.prompt), form(asked, asked.response_format)
        self.offsets: dict[tuple[int, int], int] = {}  # characters of tokens so far, by prompt and answer

    def requests(self) -> list[Request]:
        asked = self.asked
        if asked.max_tokens == 0 and not asked.echo:
            raise ApiError(400, "max_tokens=0 asks for nothing: set echo, or ask for a token", param="max_tokens")
        streamed = asked.stream and asked.logprobs is not None  # whose scores may come after another answer's tokens
        if asked.echo and (asked.n or 1) > 1 and (asked.max_tokens == 0 or streamed):
            what = "max_tokens=0" if asked.max_tokens == 0 else "a stream of echo with logprobs"
            raise ApiError(400, f"n={asked.n} with {what} is not served: ask for one answer", param="n")
        structure = Structure(self.form)
        scores = 0 if asked.max_tokens == 0 else None
        length = asked.max_tokens if asked.max_tokens is not None else self.front.defaults.max_new_tokens or SHORT
        params = asked.params(
            self.front.defaults,
            max_new_tokens=length,
            logprobs=0 if asked.logprobs is None else max(1, asked.logprobs),
            prompt_logprobs=asked.logprobs if asked.echo and asked.logprobs is not None else scores,
        )
        requests = self.front.requests(self.prompts, params, length, chat=False)
        check_scores(requests)
        return structure.bind(self.front.tokenizer, requests)

    def opening(self, number: int, delivery: Delivery, index: int) -> dict[str, Any] | None:
        """What comes before the first token: the prompt, where it is asked for."""
        if not self.asked.echo:
            return None
        prompt, call = self.prompts[number], delivery.calls[0]
        ids = delivery.prompt.ids
        text = prompt if isinstance(prompt, str) else self.front.tokenizer.decode(ids)
        found = self._logprobs((number, index), ids, prompt_logprobs(call, len(ids)))
        return {"text": text, "logprobs": found, **self.asked.ids(())}

    def piece(self, number: int, delivery: Delivery, piece: Piece) -> list[dict[str, Any]]:
        """What a piece of an answer adds."""
        found = self._logprobs((number, piece.index), piece.ids, piece.logprobs)
        return [{"text": piece.text, "logprobs": found, **self.asked.ids(piece.ids)}]

    def closing(self, reason: str, delivery: Delivery, index: int) -> dict[str, Any]:
        """The last of an answer in a stream."""
        return {"text": "", "logprobs": None, "finish_reason": REASONS[reason]}

    def choice(self, number: int, delivery: Delivery, choice: Choice) -> dict[str, Any]:
        """An answer at once."""
        opening = self.opening(number, delivery, choice.index)
        text = choice.text if opening is None else opening["text"] + choice.text
        logprobs = self._logprobs((number, choice.index), choice.ids, choice.logprobs)
        if opening is not None and logprobs is not None:
            logprobs = {name: opening["logprobs"][name] + values for name, values in logprobs.items()}
        reason = REASONS[choice.finish_reason]
        return {"text": text, "logprobs": logprobs, "finish_reason": reason, **self.asked.ids(choice.ids)}

    def _logprobs(self, answer: tuple[int, int], ids: Sequence[int], found: Sequence[Any]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        before = self.offsets.get(answer, 0)
        made = completion_logprobs(self.front.tokenizer, ids, found, self.asked.logprobs, before)
        self.offsets[answer] = before + sum(map(len, made["tokens"]))
        return made


def check_scores(requests: Sequence[Request]) -> None:
    """Raises ApiError for more log-probabilities of prompts than a request may ask for, in all its answers together."""
    params = requests[0].params
    tokens, width = sum(len(each.ids) for each in requests), 1 + (params.prompt_logprobs or 0)
    count = tokens * params.n * width
    if params.prompt_logprobs is not None and count > MOST_SCORES:
        raise ApiError(
            400,
            f"echo of {tokens} tokens with logprobs={params.prompt_logprobs} in n={params.n} answers are {count} "
            f"log-probabilities, and a request may have {MOST_SCORES}: ask for fewer",
            param="logprobs",
        )


def prompt_logprobs(call: Call, count: int) -> Sequence[Any]:
    """Of the prompt's tokens, or nothing for each, where nobody asked."""
    return call.prompt_logprobs or [None] * count


def listed(prompt: Any) -> list[PromptLike]:
    """The prompts of a request: text, ids, or a list of either.

    Raises:
        ApiError: it is none of them.
    """
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_ids(prompt)):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(each, str) or _is_ids(each) for each in prompt):
        return prompt
    raise ApiError(400, "prompt is neither text, nor token ids, nor a list of these that is not empty", param="prompt")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)
