"""Text that comes out while ids come in, and the stop strings that end it.

    id ──TextStream.feed──▶ piece ──StopStrings.feed──▶ piece to print

Which ids are text, and of which message, is for `epmoe.text.harmony` to say.
"""

from collections.abc import Sequence

from epmoe.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character, or not one yet
UNFINISHED = 3  # of these at the end at most: a character's bytes but the last, where each is shown
CONTEXT = 8  # ids that are decoded again: some decoders treat a text's first token differently (no space before it)


class TextStream:
    """Ids in, text out; special tokens are none. A character is given out when its last byte has come.

    The pieces of `feed` and the last one of `flush` add up to the whole text: with a byte-level tokenizer exactly to
    what it decodes at once from ids without special ones, bytes that are no UTF-8 (shown as U+FFFD) included. The time
    of a `feed` does not grow with the text, whatever the bytes are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []  # the last ones
        self.given = 0  # characters of their text that were given out

    def feed(self, token: int) -> str:
        """The text that this id completes, "" when there is none."""
        if token in self.tokenizer.special_ids:
            return self.flush()
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        # U+FFFD at the end may be the beginning of a character.
        held = len(text) - len(text.rstrip(REPLACEMENT))
        piece = text[self.given : len(text) - min(held, UNFINISHED)]
        self.given += len(piece)
        if len(self.ids) > 2 * CONTEXT:
            self._forget(text[self.given :])
        return piece

    def flush(self) -> str:
        """What is left: the bytes of a character that was not finished. No later id will finish it."""
        piece = self.tokenizer.decode(self.ids)[self.given :] if self.ids else ""
        self.ids, self.given = [], 0
        return piece

    def _forget(self, held: str) -> None:
        """Drop all ids but the last ones; `held` is the end of their text, still to be given."""
        ids = self.ids[-CONTEXT:]
        text = self.tokenizer.decode(ids)
        if text.endswith(held):
            self.ids, self.given = ids, len(text) - len(held)


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string, wherever the pieces' borders are.

    Of several stop strings in the text the one that ends first counts; of two that end together, the longer. Each is
    found as Knuth, Morris and Pratt do: in time linear in the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [(stop, _borders(stop)) for stop in stops]
        self.matched = [0] * len(stops)  # how much of each the text ends with
        self.held = ""  # may be the beginning of a stop string
        self.found = False

    def feed(self, piece: str) -> str:
        """The text that can be printed now; nothing after a stop string was found."""
        if self.found:
            return ""
        text = self.held + piece
        for end, character in enumerate(piece, len(self.held) + 1):
            if longest := self._next(character):
                self.found, self.held = True, ""
                return text[: end - longest]
        kept = len(text) - max(self.matched, default=0)
        self.held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What was held back, when no more text comes. Another text may come after it."""
        held, self.held = self.held, ""
        self.matched = [0] * len(self.stops)
        return held

    def _next(self, character: str) -> int:
        """The length of the longest stop string that this character ends; 0: of none."""
        longest = 0
        for number, (stop, borders) in enumerate(self.stops):
            matched = self.matched[number]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            self.matched[number] = matched
            if matched == len(stop):
                longest = max(longest, matched)
        return longest


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest beginning, not the whole, that is its end too."""
    borders = [0] * len(stop)
    matched = 0
    for place in range(1, len(stop)):
        while matched and stop[matched] != stop[place]:
            matched = borders[matched - 1]
        matched += stop[matched] == stop[place]
        borders[place] = matched
    return borders
