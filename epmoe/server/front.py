"""Front: what all endpoints share: the line to rank 0, the tokenizer, and what holds for what a request leaves out."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from epmoe.config.schema import LLMConfig
from epmoe.engine.request import Request, SamplingParams, check
from epmoe.errors import UserError
from epmoe.server.errors import ApiError
from epmoe.server.frames import Hello
from epmoe.server.line import Line
from epmoe.server.pieces import encoded, gathered
from epmoe.text import asked
from epmoe.text.asked import PromptLike
from epmoe.text.tokenizer import Tokenizer

SCORES = 2000  # log-probabilities that are spelled at once: some milliseconds


class Front:
    """Made once, from rank 0's first frame.

    Raises:
        UserError: the tokenizer, or its chat template, cannot be read.
    """

    def __init__(self, line: Line, hello: Hello) -> None:
        self.line, self.hello = line, hello
        self.tokenizer = Tokenizer(Path(hello.tokenizer_file), hello.templates or None, hello.special)
        assert self.tokenizer.chat is not None or not hello.templates  # it is read now
        template = tuple(hello.variables.items())
        self.chat = LLMConfig(chat=hello.chat, system=hello.system, template=template)
        self.plain = LLMConfig(chat="off")
        self.defaults = SamplingParams(**hello.defaults)
        self.writers = ThreadPoolExecutor(2, "epmoe-write")  # their own: what requests ask of other threads waits not

    async def written(self, scores: int, make: Callable[[], Any]) -> list[bytes]:
        """The JSON of what `make` gives, on a thread where it spells so many `scores` that others would wait."""
        if scores <= SCORES:
            return [msgspec.json.encode(make())]
        return await asyncio.get_running_loop().run_in_executor(self.writers, lambda: gathered(encoded(make())))

    @property
    def fingerprint(self) -> str:
        """Names weights and release, once the weights are there."""
        return self.line.ready.fingerprint if self.line.ready is not None else ""

    @property
    def room(self) -> int:
        """Most positions of one request: the model's, or what the cache holds."""
        room = self.hello.max_positions if self.line.ready is None else self.line.ready.room
        return min(room, self.hello.max_positions)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than there is."""
        if name not in (None, self.hello.model):
            raise ApiError(
                404, f"there is no model {name!r}; this server has {self.hello.model}",
                param="model", code="model_not_found",
            )  # fmt: skip

    def requests(
        self, prompts: Sequence[PromptLike], params: SamplingParams, length: int | None, *, chat: bool
    ) -> list[Request]:
        """What the engine is asked for these prompts; on a thread of its own, since it may take its time.

        Args:
            length: most new tokens of each; None: all that there is room for.
            chat: the prompts are conversations, which go through the template.
        Raises:
            UserError: a prompt that cannot be.
            ApiError: one that is too long, with both numbers; more answers than may wait.
        """
        if len(prompts) * params.n > self.hello.queue_requests:
            raise UserError(
                f"{len(prompts)} prompts with n={params.n} are more answers than may wait "
                f"(serve.queue_requests={self.hello.queue_requests}): ask for fewer at a time"
            )
        settings = self.chat if chat else self.plain
        found = []
        for request in asked.encoded(prompts, [params] * len(prompts), self.tokenizer, settings):
            tokens, most = len(request.ids), self.hello.max_positions
            if tokens >= most:
                raise ApiError(
                    400,
                    f"the prompt has {tokens} tokens, and this model's maximum context length is {most} tokens for "
                    "prompt and answer: shorten the prompt",
                    param="messages" if chat else "prompt",
                    code="context_length_exceeded",
                )
            if length is None:
                rest = replace(request.params, max_new_tokens=max(1, self.room - tokens))
                request = replace(request, params=rest)
            found.append(request)
        check(found, self.hello.vocab, self.hello.max_positions)
        return found

    def envelope(self, id: str, kind: str, created: int) -> dict[str, Any]:
        """What stands around each object of an answer."""
        return {
            "id": id,
            "object": kind,
            "created": created,
            "model": self.hello.model,
            "system_fingerprint": self.fingerprint,
        }
