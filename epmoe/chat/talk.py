"""Talk: a conversation of turns. A line is a message, or a command that begins with a slash."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from epmoe.chat.screen import Screen
from epmoe.errors import UserError
from epmoe.server.openai.spoken import CALL, CONTENT, REASONING, Delta

Message = dict[str, Any]
Show = Callable[[Delta], None]

HELP = {
    "/reset": "forget what was said",
    "/system TEXT": "say this to the model before all else; without TEXT: nothing",
    "/quit": "end the conversation, as Ctrl-D does",
    "/help": "these lines",
    "//…": "a message that begins with a slash",
}


class Source(Protocol):
    """Who answers."""

    name: str  # the model's

    def answer(self, messages: Sequence[Message], show: Show) -> str:
        """Answer the conversation, piece by piece; why it ended: "stop", "length" or "tool_calls".

        Raises:
            UserError: there is no answer to it.
            KeyboardInterrupt: it was stopped by Ctrl-C; nothing more comes.
        """
        ...

    def close(self) -> None:
        """Nothing is asked any more."""
        ...


class Talk:
    """What has been said, and what comes next."""

    def __init__(self, source: Source, screen: Screen, system: str | None) -> None:
        self.source, self.screen, self.system = source, screen, system or ""
        self.messages: list[Message] = []

    def run(self) -> None:
        """Until the last line.

        Raises:
            UserError: no answer, where nobody is there to say something else.
        """
        self.screen.note(f"{self.source.name}: /help explains, Ctrl-C stops an answer, Ctrl-D ends")
        while (line := self.screen.ask()) is not None:
            if line.startswith("/") and not line.startswith("//"):
                if not self._obey(line):
                    return
            elif text := line.removeprefix("/").strip():
                self._turn(text)

    def _obey(self, line: str) -> bool:
        """Do what a command says; whether the conversation goes on."""
        name, _, rest = line.strip().partition(" ")
        match name:
            case "/quit":
                return False
            case "/reset":
                self.messages = []
            case "/system":
                self.system = rest.strip()
            case "/help":
                for each, about in HELP.items():
                    self.screen.note(f"{each:<14} {about}")
            case _:
                self.screen.mistake(UserError(f"{name} is no command; known: {', '.join(HELP)}"))
        return True

    def _turn(self, text: str) -> None:
        """One message and its answer. Without an answer it was not said."""
        asked = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = Said()

        def show(delta: Delta) -> None:
            said.add(delta)
            self.screen.show(delta)

        why = "stopped"
        try:
            why = self.source.answer([*system, *asked], show)
        except UserError as error:
            if said.begun:
                self.screen.end()
            self.screen.mistake(error)
            return
        except KeyboardInterrupt:
            if not self.screen.live:
                raise
        self.screen.end()
        if why in ("stopped", "length"):
            self.screen.note(
                "stopped" if why == "stopped" else "cut by its length: max_new_tokens, or the cache's room"
            )
        if message := said.message():
            self.messages = [*asked, message]


class Said:
    """An answer as it comes."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {REASONING: [], CONTENT: []}
        self.calls: list[Message] = []
        self.begun = False

    def add(self, delta: Delta) -> None:
        self.begun = True
        if delta.kind != CALL:
            self.texts[delta.kind].append(delta.text)
        elif delta.name is not None:
            function = {"name": delta.name, "arguments": delta.text}
            self.calls.append({"id": delta.id, "type": "function", "function": function})
        else:
            self.calls[delta.index]["function"]["arguments"] += delta.text

    def message(self) -> Message | None:
        """The assistant's message; None where it has said nothing to the user."""
        reasoning, content = ("".join(self.texts[kind]) for kind in (REASONING, CONTENT))
        if not content and not self.calls:
            return None
        made: Message = {"role": "assistant", "content": content}
        if reasoning and not (content and self.calls):  # templates know no message that has all three
            made["reasoning_content"] = reasoning
        return {**made, "tool_calls": self.calls} if self.calls else made
