"""A small tokenizer file: byte-level BPE, some of whose tokens end or begin in the middle of a character."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|startoftext|>", "<|return|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"]
VOCAB = 320  # without special tokens
TEXT = "naïve Übermut — 東京 is far, Ελλάδα near; 🙂🙃 👩‍👩‍👧 and \u00e9\u0301, \ufffd too. the then there " * 3


def make_tokenizer(path: Path) -> Path:
    """Train it on TEXT and write it to `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.save(str(path))
    return path
