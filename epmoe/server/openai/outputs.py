"""An answer's messages → output items of /v1/responses, and the events that tell of them as they come.

    channel analysis                         reasoning
    a recipient, functions.NAME              a function_call of NAME
    final, plain text, a word before a call  message

Each message is an item of its own. An event has all but its number in the stream.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from epmoe.engine.request import TokenLogprobs
from epmoe.server.openai.spoken import NAMESPACE
from epmoe.server.openai.usage import chat_logprobs
from epmoe.text.harmony import Draft, Messages
from epmoe.text.tokenizer import Tokenizer

Event = dict[str, Any]
ANALYSIS, COMMENTARY = "analysis", "commentary"  # channels


class Outputs:
    """Follows one answer's parser; in time linear in the answer.

    Args:
        several: an answer may call several functions; else the first call counts alone.
        top: log-probabilities of messages' tokens, with the `top` likeliest of each; None: none.
    """

    def __init__(self, tokenizer: Tokenizer, parser: Messages, *, several: bool, top: int | None) -> None:
        self.tokenizer, self.parser, self.several, self.top = tokenizer, parser, several, top
        self.ids: list[int] = []  # of the answer so far, with its log-probabilities
        self.logprobs: list[TokenLogprobs] = []
        self.items: list[_Item] = []
        self.open: _Item | None = None  # the last of them, which goes on
        self.draft = self.piece = self.token = 0  # the next to be read
        self.called = False

    def heard(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """These have come; the parser knows them already."""
        self.ids += ids
        self.logprobs += logprobs

    def fresh(self, *, cut: bool = False) -> list[Event]:
        """What there is to tell since it was asked last; `cut`: the answer has ended, because of its length."""
        found: list[Event] = []
        drafts = self.parser.drafts
        while self.draft < len(drafts):
            draft = drafts[self.draft]
            goes_on = self.draft + 1 == len(drafts) and self.parser.open
            found += self._read(draft)
            if goes_on:
                break
            if self.open is not None:
                self.open.status = "incomplete" if cut and not draft.complete else "completed"
                found += self.open.end(self._scores(draft, 0))
            self.draft, self.piece, self.token, self.open = self.draft + 1, 0, 0, None
        return found

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The items."""
        return [each.object for each in self.items]

    @property
    def reasoning_tokens(self) -> int:
        """Of the answer, those of its reasoning's text."""
        return sum(len(each.places) for each in self.parser.drafts if each.header.channel == ANALYSIS)

    def _read(self, draft: Draft) -> list[Event]:
        """What is new of a message."""
        text = "".join(draft.pieces[self.piece :])
        self.piece = len(draft.pieces)
        found: list[Event] = []
        if self.open is None and (text or draft.header.recipient is not None):
            if (item := self._begun(draft)) is None:
                return []
            self.items.append(item)
            self.open = item
            found += item.begin()
        if self.open is not None and text:
            scores = self._scores(draft, self.token)
            self.token = len(draft.places)
            found.append(self.open.more(text, scores))
        return found

    def _begun(self, draft: Draft) -> "_Item | None":
        """The item of a message that begins; None: it is not wanted."""
        place, header = len(self.items), draft.header
        if header.recipient is not None:
            if self.called and not self.several:
                return None
            self.called = True
            return _Call(place, header.recipient.removeprefix(NAMESPACE))
        if header.channel == ANALYSIS:
            return _Reasoning(place)
        return _Said(place, "commentary" if header.channel == COMMENTARY else "final_answer")

    def _scores(self, draft: Draft, begin: int) -> list[dict[str, Any]]:
        """Log-probabilities of a message's tokens from `begin` on, as far as they have come."""
        if self.top is None:
            return []
        places = [place for place in draft.places[begin:] if place < len(self.logprobs)]
        ids, found = [self.ids[place] for place in places], [self.logprobs[place] for place in places]
        content: list[dict[str, Any]] = chat_logprobs(self.tokenizer, ids, found, self.top)["content"]
        return content


class _Item(ABC):
    """An item of the output, while it is written and afterwards."""

    prefix = ""

    def __init__(self, place: int) -> None:
        self.place, self.id = place, f"{self.prefix}_{secrets.token_hex(12)}"
        self.status = "in_progress"
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    @abstractmethod
    def object(self) -> dict[str, Any]: ...

    @abstractmethod
    def more(self, text: str, scores: list[dict[str, Any]]) -> Event: ...

    def begin(self) -> list[Event]:
        return [{"type": "response.output_item.added", "output_index": self.place, "item": self.object}]

    def end(self, scores: list[dict[str, Any]]) -> list[Event]:
        return [{"type": "response.output_item.done", "output_index": self.place, "item": self.object}]

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self.id, "output_index": self.place, **more}


class _Call(_Item):
    """A call of a function."""

    prefix = "fc"

    def __init__(self, place: int, name: str) -> None:
        super().__init__(place)
        self.name, self.call_id = name, f"call_{secrets.token_hex(12)}"

    @property
    def object(self) -> dict[str, Any]:
        made = {"id": self.id, "type": "function_call", "status": self.status}
        return {**made, "call_id": self.call_id, "name": self.name, "arguments": self.text}

    def more(self, text: str, scores: list[dict[str, Any]]) -> Event:
        self.pieces.append(text)
        return self._event("function_call_arguments.delta", delta=text)

    def end(self, scores: list[dict[str, Any]]) -> list[Event]:
        return [self._event("function_call_arguments.done", name=self.name, arguments=self.text), *super().end(scores)]


class _Text(_Item):
    """One whose text is a part of its content."""

    kind = ""  # of the part, and of its events

    @property
    def part(self) -> dict[str, Any]:
        return {"type": self.kind, "text": self.text}

    def begin(self) -> list[Event]:
        added = self._event("content_part.added", content_index=0, part=self.part)
        return [*super().begin(), added]

    def more(self, text: str, scores: list[dict[str, Any]]) -> Event:
        self.pieces.append(text)
        return self._event(f"{self.kind}.delta", content_index=0, delta=text)

    def end(self, scores: list[dict[str, Any]]) -> list[Event]:
        done = self._event(f"{self.kind}.done", content_index=0, text=self.text)
        return [done, self._event("content_part.done", content_index=0, part=self.part), *super().end(scores)]


class _Reasoning(_Text):
    """What the model thought; there are no summaries of it."""

    prefix, kind = "rs", "reasoning_text"

    @property
    def object(self) -> dict[str, Any]:
        content = [self.part] if self.pieces else []
        made = {"id": self.id, "type": "reasoning", "status": self.status}
        return {**made, "summary": [], "content": content, "encrypted_content": None}


class _Said(_Text):
    """What the model said to the user."""

    prefix, kind = "msg", "output_text"

    def __init__(self, place: int, phase: str) -> None:
        super().__init__(place)
        self.phase = phase
        self.scores: list[dict[str, Any]] = []  # once it has ended

    @property
    def part(self) -> dict[str, Any]:
        return {**super().part, "annotations": [], "logprobs": self.scores}

    @property
    def object(self) -> dict[str, Any]:
        content = [self.part] if self.pieces else []
        made = {"id": self.id, "type": "message", "status": self.status, "role": "assistant"}
        return {**made, "phase": self.phase, "content": content}

    def more(self, text: str, scores: list[dict[str, Any]]) -> Event:
        return {**super().more(text, scores), "logprobs": _in_event(scores)}

    def end(self, scores: list[dict[str, Any]]) -> list[Event]:
        self.scores = scores
        done, *others = super().end(scores)
        return [{**done, "logprobs": _in_event(scores)}, *others]


def _in_event(scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without bytes, as events have them."""
    return [{**_plain(each), "top_logprobs": [_plain(other) for other in each["top_logprobs"]]} for each in scores]


def _plain(score: dict[str, Any]) -> dict[str, Any]:
    return {"token": score["token"], "logprob": score["logprob"]}
