"""Messages out of the ids of an answer: harmony's state machine, which never throws and loses no text.

         <|start|> ┌────────┐ <|message|> ┌──────┐
    outside ──────▶│ header │────────────▶│ body │        outside: plain text is a message of the assistant's, too
       ▲           └────────┘             └──────┘
       │ <|end|>, <|return|>, <|call|>        │
       └──────────────────────────────────────┘

The prompt has begun it: a chat template ends within a header (<|start|>assistant), a prompt of one's own may end within
a body. What the prompt wrote is not the answer's text.

What <|message|> does not end was no header: where <|start|>, the end of a message or of the output, or too many tokens
come first, or where words are left over. Role and channel are read from it all the same; its other words are text.
Control tokens are never text, special ones neither. Messages are those of openai-harmony wherever it gives any, but for
control tokens in odd places, which it spells in letters: within bodies; and a content type without a recipient,
`final <|constrain|>json`, which it takes for a recipient.

A vocabulary without this markup has one message, all the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from epmoe.text.markup import CHANNEL, CONSTRAIN, ROLES, Header, parse, salvage
from epmoe.text.stream import REPLACEMENT, StopStrings, TextStream
from epmoe.text.tokenizer import Tokenizer

BETWEEN_MESSAGES = "\n\n"


@dataclass(frozen=True)
class Message(Header):
    """A message that a model wrote, as far as it came."""

    text: str = ""  # cut before a stop string
    complete: bool = False  # whether the model ended it


class Draft:
    """A message that is being written."""

    def __init__(self, header: Header, *, body: bool) -> None:
        self.header = header
        self.body = body  # <|message|> began it, so that nothing but its end ends it
        self.pieces: list[str] = []
        self.places: list[int] = []  # of its text's ids among those of the answer
        self.complete = False

    def message(self) -> Message:
        return Message(**vars(self.header), text="".join(self.pieces), complete=self.complete)


class Messages:
    """Ids of one answer in, messages and text out, until a stop string stands in the message that is the answer.

    The pieces that `feed` and `finish` return add up to the messages' texts with a blank line between, without those
    that are empty. A character is given out when its last byte has come; words of a header, when it is none. The time
    is linear in the number of ids.

    Args:
        prompt: the ids before the answer.
        longest_header: more ids than these without <|message|> are no header.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stops: Sequence[str] = (), *, longest_header: int = 128
    ) -> None:
        self.tokenizer, self.markup = tokenizer, tokenizer.harmony
        self.controls = frozenset() if self.markup is None else self.markup.ids
        self.stream, self.stops = TextStream(tokenizer), StopStrings(stops)
        self.longest_header = longest_header
        self.drafts: list[Draft] = []
        self.open = False  # the last draft goes on
        self.header: list[int] | None = None  # what has come of a header
        self.role: str | None = None  # its role, where the prompt ended with it
        self.prompted = 0  # its first ids that are the prompt's
        self.pieces: list[str] = []  # text that was not returned yet
        self.silent = False  # the prompt is being read
        self.fed = 0  # ids of the answer
        self.said_something = False
        if self.markup is None:
            self._begin(Header(), body=False)
        else:
            self._continue(prompt, self.markup.start)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come; nothing is taken after it."""
        return self.stops.found

    def messages(self) -> tuple[Message, ...]:
        """All so far."""
        return tuple(draft.message() for draft in self.drafts)

    def feed(self, token: int) -> str:
        """The text that this id completes, "" when there is none."""
        if self.stopped:
            return ""
        if self.header is not None:
            self._feed_header(token, self.header)
        elif token in self.controls:
            self._feed_control(token)
        else:
            self._feed_text(token)
            if self.open:
                self.drafts[-1].places.append(self.fed)
        self.fed += 1
        return self._take()

    def finish(self, *, complete: bool) -> str:
        """No more ids come; the text that was held back.

        Args:
            complete: the model ended its text, which nothing cut.
        """
        if self.header is not None and not self.stopped:
            self._no_header(self.header)
        self._end(complete and not self.stopped)
        return self._take()

    def _continue(self, prompt: Sequence[int], start: int) -> None:
        """Come to the state in which the prompt ends: its last <|start|> began that."""
        self.silent = True
        begin = len(prompt) - 1 - prompt[::-1].index(start) if start in prompt else 0
        rest = () if self.controls.isdisjoint(prompt) else prompt[begin:]
        for id in rest:
            if self.header is not None or id in self.controls:  # a prompt may be long, and its text changes nothing
                self.feed(id)
        self.silent = False
        header = self.drafts[-1].header if self.open and self.drafts[-1].body else None
        self.drafts, self.pieces, self.open, self.fed = [], [], False, 0
        if header is not None:
            self._begin(header, body=True)
        if self.header is not None:
            text = self._spelled(self.header)
            # A whole role is what templates end with: the next token is another word.
            self.role, self.header = (text, []) if text in ROLES else (None, self.header)
            self.prompted = len(self.header)

    def _feed_text(self, token: int) -> None:
        """Where no header is, a token that is text, or special and no control token."""
        if not self.silent:
            if not self.open and token not in self.tokenizer.special_ids:
                self._begin(Header(), body=False)
            self._give(self.stream.feed(token))

    def _feed_control(self, token: int) -> None:
        """A control token where no header is."""
        assert self.markup is not None
        if token in self.markup.ends:
            self._end(complete=True)
        elif self.open and self.drafts[-1].body:
            self._give(self.stream.flush())
        elif token in (self.markup.start, self.markup.channel):
            self._end(complete=False)
            self.header = [] if token == self.markup.start else [token]
        elif token == self.markup.message:
            self._end(complete=False)
            self._begin(Header(), body=True)
        else:
            self._give(self.stream.flush())

    def _feed_header(self, token: int, header: list[int]) -> None:
        assert self.markup is not None
        if token == self.markup.message:
            text, spelled = "", self._spelled(header)
            found = parse(spelled, self.role)
            if found is None:
                found, text = salvage(spelled, self.role, self._prompted())
            self._forget_header()
            self._begin(found, body=True)
            self._give(text)
        elif token == self.markup.start:
            self._no_header(header)
            self._end(complete=False)
            self.header = []
        elif token in self.markup.ends:
            self._no_header(header)
            self._end(complete=True)
        elif token in (self.markup.channel, self.markup.constrain) or token not in self.tokenizer.special_ids:
            header.append(token)
            if len(header) > self.longest_header:
                self._too_long(header)

    def _no_header(self, header: list[int]) -> None:
        """What began like a header was none."""
        found, text = salvage(self._spelled(header), self.role, self._prompted())
        self._forget_header()
        if text or found.channel is not None:
            self._begin(found, body=False)
            self._give(text)

    def _too_long(self, header: list[int]) -> None:
        """It ends between two characters: of the last one up to three ids, which are a byte at least, may have come."""
        ends = range(len(header), max(len(header) - 4, -1), -1)
        end = next((end for end in ends if not self._spelled(header[:end]).endswith(REPLACEMENT)), ends[-1])
        self._no_header(header[:end])
        for id in header[end:]:
            self._feed_text(id)

    def _forget_header(self) -> None:
        self.header, self.role, self.prompted = None, None, 0

    def _prompted(self) -> int:
        """Characters of the header that are the prompt's."""
        return len(self._spelled((self.header or [])[: self.prompted]))

    def _spelled(self, header: Sequence[int]) -> str:
        """A header as `markup` takes it."""
        assert self.markup is not None
        controls = {self.markup.channel: CHANNEL, self.markup.constrain: CONSTRAIN}
        parts: list[str] = []
        begin = 0
        for place, id in enumerate([*header, self.markup.channel]):
            if id in controls:
                parts += [self.tokenizer.decode(header[begin:place]), controls[id]]
                begin = place + 1
        return "".join(parts[:-1])

    def _begin(self, header: Header, *, body: bool) -> None:
        self.drafts.append(Draft(header, body=body))
        self.open = True

    def _give(self, piece: str) -> None:
        """Text of the last message."""
        if not self.open or self.silent:
            return
        if self.drafts[-1].header.is_answer:
            piece = self.stops.feed(piece)
        self._write(piece)

    def _write(self, piece: str) -> None:
        if piece:
            pieces = self.drafts[-1].pieces
            if not pieces and self.said_something:
                self.pieces.append(BETWEEN_MESSAGES)
            self.said_something = True
            pieces.append(piece)
            self.pieces.append(piece)

    def _end(self, complete: bool) -> None:
        """The last message ends, if it has not ended before."""
        if self.open:
            self._give(self.stream.flush())
            self._write(self.stops.flush())
            self.drafts[-1].complete = complete and not self.stopped
            self.open = False

    def _take(self) -> str:
        text = "".join(self.pieces)
        self.pieces.clear()
        return text
