"""Text that comes out while ids come in, and the stop strings that end it.

    id ──TextStream.feed──▶ piece ──StopStrings.feed──▶ piece to print

Special tokens are not text and are left out. In the harmony format of gpt-oss an answer is a row of messages,

    <|channel|>analysis<|message|> … <|end|><|start|>assistant<|channel|>final<|message|> … <|return|>

of which the bodies are text: what stands between <|start|> or <|channel|> and <|message|> is a header and left out too,
and a blank line separates two bodies.
"""

from collections.abc import Sequence

from epmoe.text.tokenizer import Tokenizer

BETWEEN_MESSAGES = "\n\n"
REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character, or not one yet


class TextStream:
    """Ids of one answer in, text out. A character is given out when its last byte has come.

    The pieces of `feed` and the last one of `flush` add up to the whole text: with a byte-level tokenizer exactly to
    what it decodes at once from ids without special ones, bytes that are no UTF-8 (shown as U+FFFD) included.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # ids[context:] are decoded. Those before `fresh` were given out, and stay as context since some decoders
        # treat a text's first token differently (no space before it).
        self.ids: list[int] = []
        self.context, self.fresh = 0, 0
        self.in_header, self.said_something, self.owes_break = False, False, False

    def feed(self, token: int) -> str:
        """The text that this id completes, "" when there is none."""
        if token in self.tokenizer.special_ids:
            piece = self.flush()
            if token in self.tokenizer.header_begins:
                self.in_header = True
            elif token == self.tokenizer.header_ends:
                self.in_header, self.owes_break = False, self.said_something
            return piece
        if self.in_header:
            return ""
        self.ids.append(token)
        piece = self._fresh_text()
        # U+FFFD at the end may be the beginning of a character.
        return "" if piece.endswith(REPLACEMENT) else self._give(piece)

    def flush(self) -> str:
        """What is left: the bytes of a character that was not finished. No later id will finish it."""
        piece = self._give(self._fresh_text())
        self.context = self.fresh
        return piece

    def _fresh_text(self) -> str:
        before = self.tokenizer.decode(self.ids[self.context : self.fresh])
        return self.tokenizer.decode(self.ids[self.context :])[len(before) :]

    def _give(self, piece: str) -> str:
        if len(self.ids) > self.fresh:
            self.context, self.fresh = self.fresh, len(self.ids)
        if piece and self.owes_break:
            piece, self.owes_break = BETWEEN_MESSAGES + piece, False
        self.said_something = self.said_something or bool(piece)
        return piece


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string, wherever the pieces' borders are.

    Of several stop strings in the text the one that ends first counts; of two that end together, the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""  # may be the beginning of a stop string
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that can be printed now; nothing after a stop string was found."""
        if self.found:
            return ""
        text = self.held + piece
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)[1]]
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        keep = next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-n:]) for stop in self.stops)
            ),
            0,
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self.held = self.held, ""
        return held
