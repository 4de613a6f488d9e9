"""Screen: lines in and text out. On a terminal with a prompt, a history, and reasoning dimmed; else text alone.

Nobody at a terminal: each line of standard input is a message, standard output has the answers, each with a newline.
"""

import os
import sys
from contextlib import suppress

from epmoe import streams
from epmoe.errors import UserError
from epmoe.server.openai.spoken import CALL, REASONING, Delta

PROMPT = "> "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model's text must not command the terminal: control characters, but for tab and newline.
CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Screen:
    """Where the conversation takes place.

    Raises:
        UserError: standard input is not UTF-8.
    """

    def __init__(self) -> None:
        self.live = sys.stdin.isatty() and sys.stdout.isatty()
        self.dims = self.live and os.environ.get("TERM", "") not in ("", "dumb") and not os.environ.get("NO_COLOR")
        self.kind: str | None = None  # of the text that was written last, in this answer
        if self.live:
            with suppress(ImportError):  # then there is no history
                import readline  # noqa: F401

    def ask(self) -> str | None:
        """The next line; None: there is none."""
        while True:
            try:
                if self.live:
                    return input(PROMPT)
                line = sys.stdin.readline()
                return line.removesuffix("\n") if line else None
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                if not self.live:
                    raise
                print()
            except UnicodeDecodeError as error:
                raise UserError(f"standard input is not UTF-8 text (byte {error.start}): convert it") from error

    def show(self, delta: Delta) -> None:
        """A piece of an answer. Reasoning is for those who look on."""
        if delta.kind == REASONING and not self.live:
            return
        begins = delta.kind == CALL and delta.name is not None
        if delta.kind != self.kind or begins:
            self._write(self._break() + (DIM if self.dims and delta.kind == REASONING else ""))
            self.kind = delta.kind
        text = f"{delta.name}({delta.text}" if begins else delta.text
        self._write(text.translate(CONTROLS) if self.live else text)

    def end(self) -> None:
        """The answer has ended."""
        if self.kind is not None or not self.live:
            self._write(self._after() + "\n")
        self.kind = None

    def note(self, text: str) -> None:
        """Something for who looks on."""
        if self.live:
            streams.tell(f"epmoe: {text}")

    def mistake(self, error: UserError) -> None:
        """Say it, where somebody may do it right; else it is raised."""
        if not self.live:
            raise error
        streams.tell(f"epmoe: error: {error}")

    def _break(self) -> str:
        """Between two texts of an answer."""
        return "" if self.kind is None else self._after() + ("\n" if self.kind == CALL else "\n\n")

    def _after(self) -> str:
        """What ends a text."""
        return (")" if self.kind == CALL else "") + (PLAIN if self.dims and self.kind == REASONING else "")

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UserError(f"standard output cannot be written ({error.strerror}): send it elsewhere") from error
