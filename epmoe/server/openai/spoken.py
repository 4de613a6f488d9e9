"""An answer's messages → what OpenAI's objects know: content, reasoning, calls of tools. At once, or as they come.

    channel analysis                         reasoning
    a recipient, functions.NAME              a call of the tool NAME, with the text as its arguments
    final, plain text, a word before a call  content

Of several messages of one kind the texts stand with a blank line between.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from epmoe.text.harmony import BETWEEN_MESSAGES, Draft, Messages

REASONING, CONTENT, CALL = "reasoning", "content", "call"
NAMESPACE = "functions."  # of a template's tools


@dataclass(frozen=True)
class Delta:
    """More text of one kind. A call's first one has its id and name."""

    kind: str
    text: str
    index: int = 0  # of the call
    id: str | None = None
    name: str | None = None


class Spoken:
    """Follows one answer's parser; `fresh` gives each text once, in time linear in the answer.

    Args:
        several: an answer may call several tools; else the first call counts alone.
        alone: the final message is the content, whose form was asked for; a word before a call is reasoning.
    """

    def __init__(self, parser: Messages, *, several: bool = True, alone: bool = False) -> None:
        self.parser, self.several, self.alone = parser, several, alone
        self.draft, self.piece = 0, 0  # the next to be read
        self.texts: dict[str, list[str]] = {REASONING: [], CONTENT: []}
        self.calls: list[dict[str, Any]] = []
        self.arguments: list[list[str]] = []  # of the calls
        self.begun = False  # something of this draft was given

    def fresh(self) -> list[Delta]:
        """What has come since it was asked last."""
        found: list[Delta] = []
        while self.draft < len(self.parser.drafts):
            draft = self.parser.drafts[self.draft]
            text = "".join(draft.pieces[self.piece :])
            self.piece = len(draft.pieces)
            if delta := self._delta(draft, text):
                found.append(delta)
            if self.draft + 1 == len(self.parser.drafts):
                break
            self.draft, self.piece, self.begun = self.draft + 1, 0, False
        return found

    def message(self) -> dict[str, Any]:
        """The whole of it, once the answer has ended."""
        self.fresh()
        reasoning, content = ("".join(self.texts[kind]) for kind in (REASONING, CONTENT))
        made: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if self.calls else ""),
            "refusal": None,
        }
        if reasoning:
            made |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if self.calls:
            made["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": "".join(arguments)}}
                for call, arguments in zip(self.calls, self.arguments, strict=True)
            ]
        return made

    def _delta(self, draft: Draft, text: str) -> Delta | None:
        header = draft.header
        if header.recipient is not None:
            return self._call(header.recipient, text)
        if not text:
            return None
        aside = not header.is_answer if self.alone else header.channel == "analysis"
        kind = REASONING if aside else CONTENT
        if self.texts[kind] and not self.begun:
            text = BETWEEN_MESSAGES + text
        self.begun = True
        self.texts[kind].append(text)
        return Delta(kind, text)

    def _call(self, recipient: str, text: str) -> Delta | None:
        if self.calls and not self.several and not self.begun:
            return None
        if self.begun:
            if not text:
                return None
            self.arguments[-1].append(text)
            return Delta(CALL, text, len(self.calls) - 1)
        self.begun = True
        id, name = f"call_{secrets.token_hex(12)}", recipient.removeprefix(NAMESPACE)
        self.calls.append({"id": id, "type": "function", "function": {"name": name}})
        self.arguments.append([text])
        return Delta(CALL, text, len(self.calls) - 1, id, name)
