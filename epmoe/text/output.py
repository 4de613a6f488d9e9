"""Output: token ids → text on standard output while it is made, and the lines of the file of answers.

Standard output has the text alone, each prompt's followed by a newline. Of several prompts, texts come in the order of
the prompts with a blank line between: the first unfinished one is streamed, later ones wait for their turn. Whoever
needs to tell them apart for certain takes the file.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from epmoe.engine.request import Request, Result, TokenLogprobs
from epmoe.errors import UserError
from epmoe.streams import let_go
from epmoe.text.harmony import Message, Messages
from epmoe.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # it brings torch
    from epmoe.ranks.mesh import Ranks


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
        self.finish_reason = ""  # once it is finished: "eos", "stop", "length" or "error"

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
        self.finish_reason = "stop" if self.stopped and result.finish_reason != "error" else result.finish_reason
        self.finished = True


class Output:
    """The engine's listener. Every rank has one, since all must agree where a stop string ends a text.

    Args:
        stdout: None but on rank 0, and where nobody reads it.
        keep: called with each answer's number among the requests and its record, as soon as it is finished. While
            somebody keeps answers, a reader of standard output that goes away ends nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        stdout: TextIO | None,
        keep: Callable[[int, dict[str, Any]], None] | None = None,
    ) -> None:
        self.requests = requests
        self.answers = [Answer(tokenizer, request) for request in requests]
        self.stdout, self.keep = stdout, keep
        self.turn = 0  # the answer that is being printed

    def on_token(self, index: int, token: int) -> bool:
        """Take a token; print what can be printed. Whether a stop string ends the request here."""
        if self.stdout is None and self.keep is None and not self.answers[index].stop_strings:
            return False
        stopped = self.answers[index].feed(token)
        self._print()
        return stopped

    def on_finish(self, index: int, result: Result) -> None:
        """No more tokens come for this request."""
        self.answers[index].finish(result)
        if self.keep is not None:
            self.keep(index, self.record(index, result))  # before anything can go wrong with standard output
        self._print()

    def _print(self) -> None:
        if self.stdout is None:
            return
        while self.turn < len(self.answers):
            answer = self.answers[self.turn]
            text = answer.fresh()
            if answer.finished:
                self.turn += 1
                if answer.text or answer.finish_reason != "error":
                    text += "\n" if self.turn == len(self.answers) else "\n\n"
            if text and not self._write(text):
                return
            if not answer.finished:
                return

    def _write(self, text: str) -> bool:
        """Write at once; whether anybody may still read.

        Raises:
            UserError: the disk is full.
            BrokenPipeError: no mistake, for `ranks.main` to judge: nobody reads, and nobody keeps the answers.
        """
        assert self.stdout is not None
        try:
            self.stdout.write(text)
            self.stdout.flush()
        except BrokenPipeError:
            if self.keep is None:
                raise
            let_go(self.stdout)
            self.stdout = None
        except OSError as error:
            raise UserError(f"standard output cannot be written ({error.strerror}): send it elsewhere") from error
        return self.stdout is not None

    def record(self, index: int, result: Result) -> dict[str, Any]:
        """What a request's line in the file says; times in seconds from the beginning of generation."""
        params, choice = self.requests[index].params, self.requests[index].choice
        line: dict[str, Any] = {
            **({} if choice is None else {"prompt": choice[0], "choice": choice[1]}),
            "prompt_tokens": len(self.requests[index].ids),
            "ids": result.ids,
            "text": self.answers[index].text,
            "messages": [asdict(message) for message in self.answers[index].messages],
            "finish_reason": self.answers[index].finish_reason,
            "seed": params.seed,
            "first_token_s": round(result.first_token_s, 6),
            "total_s": round(result.total_s, 6),
        }
        if params.logprobs:
            line["logprobs"] = [_plain(each) for each in result.logprobs]
        if params.prompt_logprobs is not None:
            line["prompt_logprobs"] = [None if each is None else _plain(each) for each in result.prompt_logprobs]
        return line


def _plain(found: TokenLogprobs) -> dict[str, Any]:
    return {"logprob": found.chosen, "top": found.top}


def standard_output(ranks: "Ranks") -> TextIO | None:
    """Standard output in UTF-8 on rank 0, None elsewhere and where it is closed."""
    if not ranks.is_main or sys.stdout is None:
        return None
    if hasattr(sys.stdout, "reconfigure"):  # not what a test puts in its place
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    return sys.stdout
