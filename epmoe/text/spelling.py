"""Whether a vocabulary can spell a text.

A tokenizer without a token for a character (a byte, in byte-level vocabularies) says nothing: it leaves the character
out, or puts its token for the unknown there. The model would answer another question than was asked.
"""

import tokenizers
from tokenizers import models

from epmoe.errors import UserError

NOBODYS = "\U0010fffd"  # the last private character, which no vocabulary has


class Spelling:
    """What a tokenizer's vocabulary lacks; it remembers the characters that it has seen to be there."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.unknown = _unknown_id(tokenizer)
        # The other models either have a token for the unknown or raise an error.
        self.drops = isinstance(tokenizer.model, models.BPE) and self.unknown is None
        self.spelled: set[str] = set()

    def check(self, text: str, encoded: tokenizers.Encoding) -> None:
        """Look at what `text` was encoded to.

        Raises:
            UserError: it has a character without a token. What a tokenizer takes away on purpose (a normaliser's
                accents, the space between words) is not meant.
        """
        if self.unknown is not None and self.unknown in encoded.ids:
            for id, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True):
                if id == self.unknown and begin < end and text[begin:end].strip() != self.tokenizer.id_to_token(id):
                    raise _no_token(text, begin)
        if self.drops:
            self._check_characters(text, encoded)

    def _check_characters(self, text: str, encoded: tokenizers.Encoding) -> None:
        """In time linear in the text, whatever stands in it."""
        plain = self._normalized(text)
        unknown = {each for each in set(plain) - self.spelled if not self._is_spelled(each)}
        self.spelled |= set(plain) - unknown
        if not unknown:
            return
        becomes = {each: set(self._normalized(each)) for each in set(text)}
        if composed := unknown - set().union(*becomes.values()):  # made of several
            raise _no_token(plain, next(place for place, each in enumerate(plain) if each in composed))
        sources = {each for each, found in becomes.items() if found & unknown}
        if (place := self._outside_added_tokens(sources, text, encoded)) is not None:
            raise _no_token(text, place)

    def _normalized(self, text: str) -> str:
        normalizer = self.tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _is_spelled(self, character: str) -> bool:
        """Whether tokens cover all of what a character becomes on its way to the model.

        A model that leaves something out counts on as if it had not been there, so its last token ends early.
        """
        before = self.tokenizer.pre_tokenizer
        pieces = [character] if before is None else [piece for piece, _ in before.pre_tokenize_str(character)]
        return all(self._end(piece) == len(piece.encode()) for piece in pieces)

    def _end(self, piece: str) -> int:
        """The byte of a piece at which its last token ends."""
        return max((token.offsets[1] for token in self.tokenizer.model.tokenize(piece)), default=0)

    def _outside_added_tokens(self, characters: set[str], text: str, encoded: tokenizers.Encoding) -> int | None:
        """Where one of them stands but in the text of an added token, whose letters need no tokens of their own."""
        added = self.tokenizer.get_added_tokens_decoder()
        inside = {
            place
            for id, (begin, end) in zip(encoded.ids, encoded.offsets, strict=True)
            if id in added
            for place in range(begin, end)
        }
        return next((place for place, each in enumerate(text) if each in characters and place not in inside), None)


def _unknown_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id of the token for what has no token, where there is one."""
    model = tokenizer.model
    if not isinstance(model, models.Unigram):
        name = getattr(model, "unk_token", None)
        return None if name is None else tokenizer.token_to_id(name)
    try:  # that model does not tell, but shows it
        (token,) = model.tokenize(NOBODYS)
    except Exception:  # no such token: the library's error; several tokens: bytes
        return None
    return token.id if tokenizer.id_to_token(token.id) != NOBODYS else None


def _no_token(text: str, place: int) -> UserError:
    character = text[place]
    return UserError(
        f"the vocabulary has no token for {character!r} (U+{ord(character):04X}, character {place}): "
        "leave it out, or take the tokenizer.json that belongs to the model"
    )
