"""A conversation → the text that a model was trained to answer: the checkpoint's chat template."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from epmoe.errors import UserError
from epmoe.text.bounded import Bounded, ExceededError
from epmoe.text.messages import Message

DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of templates, where a checkpoint has several


class ChatTemplate:
    """A checkpoint's jinja template, in the environment that transformers gives to chat templates.

    Templates come with checkpoints from strangers: they run in a process of their own, within limits of time, memory
    and output, which starts with the first template.

    Args:
        source: the template, or several by name: "tool_use" is taken where there are tools, "default" else.
        special: bos_token, eos_token and the like, which templates may use as variables.
    Raises:
        UserError: the template is no valid jinja; of several, the default one.
    """

    def __init__(self, source: str | Mapping[str, str], special: Mapping[str, str]) -> None:
        self.sources: Mapping[str, str] = {DEFAULT: source} if isinstance(source, str) else source
        self.special = dict(special)
        self._reads: dict[str, tuple[str, ...]] = {}  # of a source, once it was asked for
        if DEFAULT in self.sources:
            self.reads(tools=False)

    def reads(self, *, tools: bool) -> tuple[str, ...]:
        """The variables that the template for conversations with or without tools reads, and that one may give it.

        Raises:
            UserError: there is none, or it is no valid jinja.
        """
        source = self._chosen(tools=tools)
        if source not in self._reads:
            names = _answer({"source": source})["reads"]
            self._reads[source] = tuple(name for name in names if name not in self.special)
        return self._reads[source]

    def render(self, messages: Sequence[Message], now: datetime | None = None, /, **variables: Any) -> str:
        """The conversation as text, up to where the assistant begins to answer.

        The messages come in any of the shapes that `messages.py` names; they and the variables are what JSON can hold.
        `now` is the moment that a template may ask for.

        Raises:
            UserError: the template refuses the messages or takes too much of this machine, or there is none for them.
        """
        source = self._chosen(tools=variables.get("tools") is not None)
        values = {"tools": None, "documents": None, "add_generation_prompt": True, **self.special, **variables}
        moment = (now or datetime.now()).isoformat()
        call = {"source": source, "messages": list(messages), "variables": values, "now": moment}
        text: str = _answer(call)["text"]
        return text

    def _chosen(self, *, tools: bool) -> str:
        """The source for conversations with or without tools; raises UserError where there is none."""
        name = WITH_TOOLS if tools and WITH_TOOLS in self.sources else DEFAULT
        if name not in self.sources:
            known = ", ".join(sorted(self.sources)) or "none"
            raise UserError(f"the checkpoint's chat templates ({known}) have none named {DEFAULT!r}: use chat=off")
        return self.sources[name]


def _answer(call: dict[str, Any]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = _process()(call)
    except ExceededError as error:
        raise UserError(f"the checkpoint's chat template {error}: use chat=off, or mend the template") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the messages or variables are no JSON ({error}): give text, numbers and lists") from error
    match answer:
        case {"broken": said}:
            raise UserError(f"the checkpoint's chat template is no valid jinja ({said}): use chat=off")
        case {"refused": said}:
            raise UserError(f"the checkpoint's chat template refuses the messages: {said}")
        case {"wrong": said}:
            raise UserError(said)
    return answer


@cache
def _process() -> Bounded:
    """One for all templates of this process."""
    return Bounded("epmoe.text.template:answer")
