"""Output: token ids → text on standard output while it is made, a JSON-lines file, the closing line.

Standard output has the text alone, each prompt's followed by a newline. Of several prompts, texts come in the order of
the prompts with a blank line between: the first unfinished one is streamed, later ones wait for their turn. Whoever
needs to tell them apart for certain takes the file.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from epmoe.engine.request import Request, Result
from epmoe.errors import UserError
from epmoe.ranks.mesh import Ranks
from epmoe.text.harmony import Message, Messages
from epmoe.text.tokenizer import Tokenizer


class Answer:
    """What is known of one request's answer: its messages, without special tokens, cut before a stop string.

    A stop string is looked for in what the model wrote in the message that is the answer (`Header.is_answer`). One that
    spells a special or added token of the tokenizer also ends the answer at that token's id, wherever it comes.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self.special_ids = tokenizer.special_ids
        self.stop_strings = request.params.stop
        self.stop_ids = {id for stop in self.stop_strings if (id := tokenizer.special_names.get(stop)) is not None}
        self.parser = Messages(tokenizer, request.ids, self.stop_strings)
        self.pieces: list[str] = []
        self.shown = 0  # pieces that `fresh` has given
        self.stopped = False  # by a stop string
        self.finished = False
        self.finish_reason = ""  # once it is finished: "eos", "stop" or "length"

    def feed(self, token: int) -> bool:
        """Whether a stop string is complete now."""
        stops = token in self.stop_ids
        if not self.stopped and (not stops or token in self.special_ids):
            self.pieces.append(self.parser.feed(token))
        self.stopped = self.stopped or stops or self.parser.stopped
        return self.stopped

    def fresh(self) -> str:
        """The text that came since this was called last."""
        text = "".join(self.pieces[self.shown :])
        self.shown = len(self.pieces)
        return text

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of them so far."""
        return self.parser.messages()

    def finish(self, result: Result) -> None:
        """No more tokens come. One that ended the text by itself was not fed, and may end a message."""
        ended = not self.stopped and result.finish_reason in ("eos", "stop")
        if ended and result.ids[-1] in self.special_ids:
            self.pieces.append(self.parser.feed(result.ids[-1]))
        self.pieces.append(self.parser.finish(complete=result.finish_reason == "eos"))
        self.stopped = self.stopped or self.parser.stopped  # in what was taken for a header up to the end
        self.finish_reason = "stop" if self.stopped else result.finish_reason
        self.finished = True


class Output:
    """The engine's listener. Every rank has one, since all must agree where a stop string ends a text.

    Args:
        stdout: None but on rank 0.
    """

    def __init__(self, tokenizer: Tokenizer, requests: Sequence[Request], stdout: TextIO | None) -> None:
        self.answers = [Answer(tokenizer, request) for request in requests]
        self.stdout = stdout
        self.turn = 0  # the answer that is being printed

    def on_token(self, index: int, token: int) -> bool:
        """Take a token; print what can be printed. Whether a stop string ends the request here."""
        if self.stdout is None and not self.answers[index].stop_strings:
            return False
        stopped = self.answers[index].feed(token)
        self._print()
        return stopped

    def on_finish(self, index: int, result: Result) -> None:
        """No more tokens come for this request."""
        self.answers[index].finish(result)
        self._print()

    def _print(self) -> None:
        if self.stdout is None:
            return
        while self.turn < len(self.answers):
            answer = self.answers[self.turn]
            text = answer.fresh()
            if answer.finished:
                self.turn += 1
                text += "\n" if self.turn == len(self.answers) else "\n\n"
            if text:
                _write(self.stdout, text)
            if not answer.finished:
                return

    def record(self, index: int, request: Request, result: Result) -> dict[str, Any]:
        """A request's line in the file; times in seconds from the beginning of generation."""
        line = {
            "index": index,
            "prompt_tokens": len(request.ids),
            "ids": result.ids,
            "text": self.answers[index].text,
            "messages": [asdict(message) for message in self.answers[index].messages],
            "finish_reason": self.answers[index].finish_reason,
            "first_token_s": round(result.first_token_s, 6),
            "total_s": round(result.total_s, 6),
        }
        if request.params.logprobs:
            line["logprobs"] = [{"logprob": each.chosen, "top": each.top} for each in result.logprobs]
        return line


def _write(stdout: TextIO, text: str) -> None:
    """Write at once. Raises UserError when the disk is full; BrokenPipeError, no mistake, for `ranks.main` to judge."""
    try:
        stdout.write(text)
        stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output cannot be written ({error.strerror}): send it elsewhere") from error


def _file(name: str) -> Path:
    """Where `output` is written: behind a link, so that the link stays."""
    return Path(os.path.realpath(os.path.expanduser(name)))


def check_writable(name: str) -> None:
    """Raises UserError now for an output file that could not be written at the end."""
    if not name:
        return
    path = _file(name)
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # the name is too long, or goes through a file
        raise UserError(f"output={name} cannot be written ({error.strerror}): choose another place") from error
    if path.is_dir():
        raise UserError(f"output={name} is a directory: give a file name")
    if path.exists() and not path.is_file():  # a device or a pipe; the file would take its place
        raise UserError(f"output={name} is no plain file: give a file name")
    if not path.parent.is_dir():
        raise UserError(f"output={name}: the directory {path.parent} does not exist: make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"output={name}: the directory {path.parent} cannot be written: choose another")


def write_lines(name: str, lines: Sequence[dict[str, Any]]) -> None:
    """Write a JSON-lines file; it appears under its name when it is whole, or not at all."""
    path = _file(name)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"output={name} cannot be written ({error.strerror}): choose another place") from error
    finally:
        unfinished.unlink(missing_ok=True)


def standard_output(ranks: Ranks) -> TextIO | None:
    """Standard output in UTF-8 on rank 0, None elsewhere."""
    if not ranks.is_main:
        return None
    if hasattr(sys.stdout, "reconfigure"):  # not what a test puts in its place
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    return sys.stdout
