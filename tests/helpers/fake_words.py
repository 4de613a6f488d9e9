"""Letters for the fake model's ids, so that it can have grammars: id n is the ASCII character n + 32."""

from collections.abc import Sequence
from types import SimpleNamespace

from fake_model import EOS, VOCAB
from llguidance import LLTokenizer, TokenizerWrapper


def text(ids: Sequence[int]) -> str:
    """Without the end of the text."""
    return "".join(chr(id + 32) for id in ids if id != EOS)


def vocabulary() -> LLTokenizer:
    """What `EngineConfig.vocabulary` makes."""

    class Words(SimpleNamespace):
        def __call__(self, data: bytes) -> list[int]:
            return [byte - 32 for byte in data]

    tokens = [chr(id + 32).encode() for id in range(EOS)] + [b"<end>"]
    assert len(tokens) == VOCAB
    words = Words(eos_token_id=EOS, bos_token_id=None, tokens=tokens, special_token_ids=[EOS])
    return LLTokenizer(TokenizerWrapper(words))
